"""What helps while developing: trial runs, overfitting, timers, profilers, seeds, precision, several loggers, state of hooks."""

import io
from contextlib import redirect_stdout
from datetime import timedelta

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from observe import Diary, attempt, blobs, csv_columns, files, loader, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Small(L.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))
        self.dtypes = []
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1].tolist())
        logits = self.net(batch[0])
        self.dtypes.append(str(logits.dtype))
        loss = F.cross_entropy(logits, batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Noise(Dataset):
    """Samples that draw random numbers in the workers."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((8,), float(np.random.rand())), index % 3


class Stopper(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 3


@rank_zero_only
def once(value):
    return value + 1


def fit(folder, *callbacks, batches=None, **options):
    L.seed_everything(6, verbose=False)
    model, diary = Small(), Diary()
    trainer = quiet(folder, diary, *callbacks, **options)
    trainer.fit(model, batches or loader(blobs(40)), loader(blobs(16, seed=3)))
    return (
        trainer,
        model,
        diary.pages()
        | {
            "weights": weights(model),
            "seen": model.seen,
            "dtypes": sorted(set(model.dtypes)),
            "metrics": numbers(trainer.callback_metrics),
            "end": [trainer.current_epoch, trainer.global_step, trainer.num_training_batches, trainer.num_val_batches],
        },
    )


def main(folder):
    found = {"once": once(1), "rank": rank_zero_only.rank, "seed": L.seed_everything(6, workers=True)}
    for name, options in {
        "fast_dev_run": {
            "fast_dev_run": True,
            "logger": True,
            "enable_checkpointing": True,
            "callbacks": [ModelCheckpoint()],
        },
        "fast_dev_run_3": {"fast_dev_run": 3, "logger": True},
        "overfit_2": {"overfit_batches": 2, "max_epochs": 3},
        "overfit_part": {"overfit_batches": 0.5, "max_epochs": 2},
        "bf16-mixed": {"precision": "bf16-mixed", "max_epochs": 2},
        "64-true": {"precision": "64-true"},
        "bf16-true": {"precision": "bf16-true"},
        "detect": {"detect_anomaly": True, "deterministic": True, "num_sanity_val_steps": -1},
        "barebones": {"barebones": True, "logger": None, "enable_checkpointing": None},
    }.items():
        callbacks = options.pop("callbacks", [])
        if name == "barebones":
            options |= {"enable_progress_bar": None, "enable_model_summary": None}
        batches = None if name == "64-true" else loader(blobs(40))
        if name.startswith("overfit"):
            batches = loader(blobs(40), shuffle=True, generator=torch.Generator().manual_seed(1))
        if name == "64-true":
            batches = loader([(x.double(), y) for x, y in blobs(40)])
            options["limit_val_batches"] = 0
        if name == "bf16-true":
            batches = loader([(x.bfloat16(), y) for x, y in blobs(40)])
            options["limit_val_batches"] = 0
        trainer, _, found[name] = fit(folder / name, *callbacks, batches=batches, **options)
        found[name]["files"] = files(folder / name)

    for name, least in (("stopped", None), ("stopped_late", 7)):
        _, _, pages = fit(folder, Stopper(), max_epochs=4, min_steps=least)
        found[name] = {key: pages[key] for key in ("losses", "counters", "validations", "weights")}
        found[name]["current_epoch"] = pages["end"][0]
    timer = Timer(timedelta(days=1), interval="epoch")
    _, _, found["timed"] = fit(folder, timer, max_epochs=2)
    both = {"max_time": {"hours": 3}, "max_epochs": 2}
    found["timer_and_max_time"] = attempt(ValueError, lambda: fit(folder, Timer("00:01:00:00"), **both)[2]["losses"])
    found["timer"] = [
        timer.time_elapsed("train") > 0,
        timer.time_remaining("train") > 80000,
        timer.start_time("train") > 0,
    ]
    _, _, found["no_time"] = fit(folder, max_epochs=-1, max_time=timedelta(0))

    L.seed_everything(6, workers=True, verbose=False)
    noisy = [batch for batch, _ in DataLoader(Noise(), 4)]
    found["noise"] = noisy
    profiler = SimpleProfiler(dirpath=folder / "profile", filename="report")
    trainer, model, _ = fit(folder / "loggers", logger=[CSVLogger(folder / "loggers"), TensorBoardLogger(folder / "loggers")],
                            profiler=profiler, log_every_n_steps=1)  # fmt: skip
    found["loggers"] = [[type(each).__name__, each.name, each.version] for each in trainer.loggers]
    found["logger_files"] = [name.split("events.out")[0] for name in files(folder / "loggers")]
    found["csv"] = csv_columns(folder / "loggers" / "lightning_logs" / "version_0" / "metrics.csv")
    found["profiled"] = attempt(ValueError, lambda: len(profiler.recorded_durations["run_training_batch"]))
    report = (folder / "profile" / "fit-report.txt").read_text()
    found["report"] = [word in report for word in ("run_training_epoch", "optimizer_step", "training_step")]
    with redirect_stdout(io.StringIO()) as out:
        fit(folder, profiler="simple")
    found["profiler"] = type(trainer.profiler).__name__
    with redirect_stdout(io.StringIO()) as out:
        trainer.print("printed")
        model.print("by", "the module")
        rank_zero_info("logged, not printed")
    found["printed"] = out.getvalue()
    return found
