"""Every hook of the module, the datamodule and the callbacks, in the order in which they come, and what they can read."""

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from observe import blobs, loader, quiet
from torch import nn

STAGES = ("train", "validation", "test", "predict")
SHARED = [
    "setup",
    "teardown",
    *[f"on_{verb}_{when}" for verb in ("fit", *STAGES) for when in ("start", "end")],
    *[f"on_{stage}_{what}_{when}" for stage in STAGES for what in ("epoch", "batch") for when in ("start", "end")],
    *["on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"],
    *["on_save_checkpoint", "on_load_checkpoint"],
]
MODULE = [
    *[f"on_{stage}_model_{mode}" for stage in STAGES[1:3] for mode in ("eval", "train")],
    *["configure_callbacks", "configure_model", "configure_optimizers", "prepare_data"],
    *["training_step", "validation_step", "test_step", "predict_step"],
    *["optimizer_zero_grad", "backward", "configure_gradient_clipping"],
    *["on_validation_model_zero_grad"],
]
DATA = [
    *[
        "prepare_data",
        "setup",
        "teardown",
        "train_dataloader",
        "val_dataloader",
        "test_dataloader",
        "predict_dataloader",
    ],
    *["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "on_exception"],
]
CALLBACK = ["on_sanity_check_start", "on_sanity_check_end", "on_exception", "state_dict", "load_state_dict"]


def recorded(base, names, owner):
    """A subclass of ``base`` whose hooks write down that they were called, then do what they did."""

    def wrap(name):
        original = getattr(base, name)

        def hook(self, *args, **kwargs):
            self.tape.append(f"{owner}.{name}")
            return original(self, *args, **kwargs)

        return hook

    return type(f"Recorded{base.__name__}", (base,), {name: wrap(name) for name in names})


class Net(L.LightningModule):
    def __init__(self, tape):
        super().__init__()
        self.tape = tape
        self.layer = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step_loss(batch))

    def test_step(self, batch, batch_idx):
        return self.training_step_loss(batch)

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def training_step_loss(self, batch):
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    def __init__(self, tape):
        super().__init__()
        self.tape = tape

    def train_dataloader(self):
        return loader(blobs(16))

    def val_dataloader(self):
        return loader(blobs(8))

    def test_dataloader(self):
        return loader(blobs(8))

    predict_dataloader = test_dataloader


class Breaks(L.Callback):
    def __init__(self, hook, error):
        def fail(*args, **kwargs):
            raise error("on purpose")

        setattr(self, hook, fail)


def everything(tape):
    callback = type("Own", (L.Callback,), {})
    recorder = recorded(callback, SHARED + CALLBACK, "callback")()
    recorder.tape = tape
    net = recorded(Net, SHARED + MODULE, "module")(tape)
    return net, recorded(Data, DATA, "data")(tape), recorder


def standing(trainer):
    """What a hook reads of the trainer."""
    state = trainer.state
    return [
        str(getattr(state.fn, "value", None)),
        str(getattr(state.stage, "value", None)),
        [trainer.training, trainer.validating, trainer.testing, trainer.predicting, trainer.sanity_checking],
        [trainer.current_epoch, trainer.global_step, bool(trainer.is_last_batch), trainer.should_stop],
        [len(trainer.optimizers), len(trainer.lr_scheduler_configs), len(trainer.callbacks) > 0, trainer.max_epochs],
        [trainer.world_size, trainer.global_rank, trainer.is_global_zero, trainer.num_devices, trainer.num_nodes],
    ]


def main(folder):
    found = {}
    tape = []
    net, data, callback = everything(tape)
    keeper = ModelCheckpoint(folder, "kept", save_top_k=1)
    trainer = quiet(folder, callback, keeper, enable_checkpointing=True, max_epochs=2, gradient_clip_val=1.0)
    for verb in ("fit", "validate", "test", "predict"):
        tape.clear()
        getattr(trainer, verb)(net, datamodule=data)
        found[verb] = list(tape)
    tape.clear()
    again = quiet(folder, everything(tape)[2], max_epochs=3, limit_val_batches=0)
    again.fit(net, datamodule=data, ckpt_path=folder / "kept.ckpt")
    found["resumed"] = list(tape)

    tape.clear()
    net, data, callback = everything(tape)
    del type(net).configure_gradient_clipping, type(net).backward
    quiet(folder, callback, accumulate_grad_batches=2, limit_val_batches=0, max_epochs=1).fit(net, datamodule=data)
    found["accumulated"] = list(tape)

    for hook, error in (("on_train_batch_end", ValueError), ("on_train_epoch_start", KeyboardInterrupt)):
        tape.clear()
        net, data, callback = everything(tape)
        trainer = quiet(folder, callback, Breaks(hook, error), limit_val_batches=0)
        try:
            trainer.fit(net, datamodule=data)
            raised = None
        except (ValueError, SystemExit, KeyboardInterrupt) as caught:
            raised = type(caught).__name__
        found[f"broken_{hook}"] = [list(tape), raised, trainer.state.status.value, str(trainer.interrupted)]

    places = {}

    def reader(name):
        return lambda trainer, *args, **kwargs: places.setdefault(name, standing(trainer))

    hooks = ("setup", *[name for name in SHARED if name.startswith("on_") and "checkpoint" not in name])
    counts = {}

    def count(trainer, module):
        counts[trainer.state.stage.value] = [
            [trainer.num_training_batches, trainer.num_val_batches, trainer.num_sanity_val_batches],
            [trainer.num_test_batches, trainer.num_predict_batches],
        ]

    counted = ("on_sanity_check_start", "on_train_start", "on_test_start", "on_predict_start")
    counter = LambdaCallback(**dict.fromkeys(counted, count))
    watcher = LambdaCallback(
        **{name: reader(name) for name in (*hooks, "on_sanity_check_start", "on_sanity_check_end")}
    )
    trainer = quiet(folder, watcher, counter, max_epochs=2)
    for verb in ("fit", "test", "predict"):
        getattr(trainer, verb)(Net([]), datamodule=Data([]))
    found |= {"places": places, "counts": counts}
    found["after"] = standing(trainer)
    return found
