"""What was read of a Trainer in former days, and what it is today."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.compat import former_attributes, once
from leyden.compat.former_attributes import trainer_attribute
from leyden.errors import LeydenWarning
from quiet import Memory, make_trainer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def say_everything_again() -> Iterator[None]:
    once.forget()
    yield
    once.forget()


def read(trainer: L.Trainer, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeydenWarning)
        return trainer_attribute(trainer, name)


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.note()
        loss = self.layer(batch).square().mean()
        self.log("shown", 2.0, prog_bar=True)
        return loss

    def note(self) -> None:
        self.seen.append((read(self.trainer, "batch_idx"), read(self.trainer, "total_batch_idx")))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", 1.0)

    def on_validation_end(self) -> None:
        self.note()

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(6, 2), batch_size=2)  # type: ignore[arg-type]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(torch.ones(4, 2), batch_size=2)]  # type: ignore[arg-type]

    test_dataloader = val_dataloader


STOPPING = EarlyStopping("val_loss")
# On the CPU, after a fit of two epochs, and what is said.
VALUES: list[tuple[str, Any, str]] = [
    ("proc_rank", 0, "trainer.global_rank"),
    ("nb_gpu_nodes", 1, "trainer.num_nodes"),
    ("num_gpu_nodes", 1, "trainer.num_nodes"),
    ("num_processes", 1, "trainer.num_devices"),
    ("root_device", torch.device("cpu"), "trainer.device"),
    ("num_gpus", 0, "trainer.num_devices"),
    ("gpus", 0, "trainer.num_devices and trainer.device_ids"),
    ("data_parallel_device_ids", None, "trainer.device_ids"),
    ("root_gpu", None, "trainer.device.index"),
    ("on_gpu", False, "trainer.device.type == 'cuda'"),
    ("single_gpu", False, "trainer.world_size == 1"),
    ("on_tpu", False, "trainer.device.type == 'xla'"),
    ("use_tpu", False, "trainer.device.type == 'xla'"),
    ("use_ddp", False, "isinstance(trainer.strategy, leyden.strategies.DDPStrategy)"),
    ("use_dp", False, "there is no such strategy"),
    ("use_ddp2", False, "there is no such strategy"),
    ("use_horovod", False, "there is no such strategy"),
    ("data_parallel", False, "trainer.world_size > 1"),
    ("distributed_backend", None, "trainer.strategy"),
    ("use_amp", False, "trainer.precision == '16-mixed'"),
    ("use_native_amp", False, "trainer.precision == '16-mixed'"),
    ("amp_level", "O1", "has no levels"),
    ("max_nb_epochs", 2, "trainer.max_epochs"),
    ("min_nb_epochs", 1, "trainer.min_epochs"),
    ("nb_sanity_val_steps", 0, "trainer.num_sanity_val_steps"),
    ("gradient_clip", 0.5, "trainer.gradient_clip_val"),
    ("row_log_interval", 7, "trainer.log_every_n_steps"),
    ("add_row_log_interval", 7, "trainer.log_every_n_steps"),
    ("train_percent_check", 1.0, "trainer.limit_train_batches"),
    ("val_percent_check", 0.5, "trainer.limit_val_batches"),
    ("test_percent_check", 1.0, "trainer.limit_test_batches"),
    ("overfit_pct", 0.0, "trainer.limit_train_batches"),
    ("resume_from_checkpoint", None, "trainer.ckpt_path"),
    ("show_progress_bar", False, "trainer.progress_bar_callback is not None"),
    ("running_sanity_check", False, "trainer.sanity_checking"),
    ("nb_training_batches", 3, "trainer.num_training_batches"),
    ("nb_val_batches", 1, "sum(trainer.num_val_batches)"),
    ("nb_test_batches", 0, "sum(trainer.num_test_batches)"),
    ("total_batches", 4, "trainer.num_training_batches + sum(trainer.num_val_batches)"),
    ("disable_validation", False, "not trainer.enable_validation"),
    ("batch_idx", 0, "batch_idx, which every hook of a batch is given"),
    ("batch_nb", 0, "batch_idx, which every hook of a batch is given"),
    ("total_batch_nb", 6, "trainer.global_step * trainer.accumulate_grad_batches"),
    ("total_batch_idx", 6, "trainer.global_step * trainer.accumulate_grad_batches"),
    ("early_stop_callback", STOPPING, "trainer.early_stopping_callback"),
    ("training_tqdm_dict", {"v_num": 0, "shown": 2.0}, "trainer.progress_bar_metrics"),
    ("tng_tqdm_dic", {"v_num": 0, "shown": 2.0}, "trainer.progress_bar_metrics"),
    ("progress_bar_dict", {"v_num": 0, "shown": 2.0}, "trainer.progress_bar_metrics"),
]
# Those whose value is an object of the run: by what today's expression gives.
OBJECTS = {
    "get_model": ("trainer.lightning_module", lambda trainer: trainer.lightning_module),
    "get_train_dataloader": ("trainer.train_dataloader", lambda trainer: trainer.train_dataloader),
    "get_val_dataloaders": ("trainer.val_dataloaders", lambda trainer: trainer.val_dataloaders),
    "get_test_dataloaders": ("trainer.test_dataloaders", lambda trainer: trainer.test_dataloaders),
    "training_type_plugin": ("trainer.strategy", lambda trainer: trainer.strategy),
    "default_save_path": ("trainer.default_root_dir", lambda trainer: trainer.default_root_dir),
    "weights_save_path": ("trainer.checkpoint_callback.dirpath", lambda trainer: trainer.default_root_dir),
    "experiment": ("trainer.logger.experiment", lambda trainer: None),
    "lr_schedulers": ("trainer.lr_scheduler_configs", lambda trainer: trainer.lr_scheduler_configs),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> L.Trainer:
    trainer = make_trainer(
        tmp_path_factory.mktemp("ran"), STOPPING, max_epochs=2, min_epochs=1, gradient_clip_val=0.5, log_every_n_steps=7,
        limit_val_batches=0.5, logger=Memory(),
    )  # fmt: skip
    trainer.fit(Model())
    return trainer


@pytest.mark.parametrize(("name", "value", "today"), VALUES, ids=[row[0] for row in VALUES])
def test_what_each_is(name: str, value: Any, today: str, ran: L.Trainer) -> None:
    with pytest.warns(LeydenWarning) as caught:
        found = trainer_attribute(ran, name)
    assert found == value
    assert type(found) is type(value)
    assert str(caught[0].message).startswith(f"[LEY-former-name] trainer.{name} is a former spelling. Today: ")
    assert today in str(caught[0].message)
    trainer_attribute(ran, name)  # told once: another warning would be an error


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_of_the_run(name: str, ran: L.Trainer) -> None:
    today, expected = OBJECTS[name]
    with pytest.warns(LeydenWarning, match=f"trainer.{name} is a former spelling. Today: {today}"):
        found = trainer_attribute(ran, name)
    if name.startswith("get_"):
        found = found()
    if name == "lr_schedulers":
        found = [(one["scheduler"], one["interval"], one["frequency"]) for one in found]
        assert found == [(one.scheduler, one.interval, one.frequency) for one in ran.lr_scheduler_configs]
        assert len(found) == 1
    else:
        assert found is expected(ran) or found == expected(ran)


def test_a_trainer_has_them_and_tells_where_they_are_read(ran: L.Trainer) -> None:
    with pytest.warns(
        LeydenWarning, match="trainer.proc_rank is a former spelling. Today: trainer.global_rank"
    ) as caught:
        assert ran.proc_rank == 0
    assert [each.filename for each in caught] == [__file__]
    assert ran.proc_rank == 0
    with pytest.raises(AttributeError, match="Did you mean 'current_epoch'"):
        ran.curent_epoch  # noqa: B018
    assert not hasattr(ran, "zzz")


def test_every_name_is_tested() -> None:
    assert sorted([name for name, _, _ in VALUES] + list(OBJECTS)) == sorted(former_attributes._MEANINGS)


def test_no_name_is_one_of_today(ran: L.Trainer) -> None:
    assert not [name for name in former_attributes._MEANINGS if hasattr(type(ran), name)]


def test_batches_are_counted_as_they_were(ran: L.Trainer) -> None:
    module = ran.lightning_module
    assert isinstance(module, Model)
    in_epochs = [[(n - first, n + after) for n in range(first, first + 3) for after in (0, 1)] for first in (0, 3)]
    # in the step, after it, and after validation
    assert module.seen == [*in_epochs[0], (2, 3), *in_epochs[1], (2, 6)]


def test_where_checkpoints_went(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path / "w"), enable_checkpointing=True)
    assert read(trainer, "weights_save_path") == str(tmp_path / "w")


def test_parts_that_are_all_the_same(tmp_path: Path) -> None:
    limits = {f"limit_{kind}_batches": 0.25 for kind in ("train", "val", "test")}
    assert read(make_trainer(tmp_path, **limits), "overfit_pct") == 0.25


@pytest.mark.parametrize(
    ("name", "meant"), [("curent_epoch", "current_epoch"), ("proc_rnk", "proc_rank"), ("zzz", None)]
)
def test_names_that_never_were(name: str, meant: str | None, ran: L.Trainer) -> None:
    with pytest.raises(AttributeError) as caught:
        trainer_attribute(ran, name)
    hint = f" Did you mean {meant!r}?" if meant else ""
    assert str(caught.value) == f"Trainer has no attribute {name!r}.{hint}"
    assert (caught.value.name, caught.value.obj) == (name, ran)


def test_what_a_property_has_raised_stays(tmp_path: Path) -> None:
    class Odd(L.Trainer):
        @property
        def odd(self) -> int:
            raise AttributeError("for its own reason")

    trainer = Odd(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(AttributeError, match="for its own reason"):
        trainer_attribute(trainer, "odd")
