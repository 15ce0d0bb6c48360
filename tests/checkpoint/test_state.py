"""The state of a run: what is captured under which key, and what is refused when it is applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from leyden.callbacks import Callback
from leyden.checkpoint import state
from leyden.checkpoint.format import load_checkpoint
from leyden.checkpoint.store import write_checkpoint
from leyden.datamodule import LightningDataModule
from leyden.errors import CheckpointError, LeydenError, LeydenWarning
from leyden.module import LightningModule
from leyden.trainer import Trainer

torch.set_num_threads(1)


class Net(LightningModule):
    def __init__(self, optimizers: int = 1, width: int = 2, schedulers: bool = True, frozen: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="frozen")
        self.automatic_optimization = optimizers == 1
        self.layers = nn.ModuleList(nn.Linear(3, width) for _ in range(optimizers))
        self.extra = nn.Linear(1, 1)
        self.frozen = frozen

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        losses = [layer(batch).square().sum() for layer in self.layers]
        if self.automatic_optimization:
            return losses[0]
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            optimizer.minimize(loss)
        return None

    def configure_optimizers(self) -> Any:
        made = [
            torch.optim.SGD([*layer.parameters()][: 1 if self.frozen else 2], lr=0.1, momentum=0.9)
            for layer in self.layers
        ]
        if not self.hparams.schedulers:
            return made
        return made, [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in made]


class Data(LightningDataModule):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.served = 0

    def train_dataloader(self) -> Any:
        self.served += 1
        return loader()

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.served = 100 + state_dict["served"]


class Counter(Callback):
    def __init__(self, name: str = "one") -> None:
        self.name, self.count = name, 0

    @property
    def state_key(self) -> str:
        return f"Counter-{self.name}"

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class Stateless(Callback):
    pass


def loader() -> DataLoader[Any]:
    return DataLoader(torch.ones(4, 3), batch_size=2)  # type: ignore[arg-type]


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "max_epochs": 1, "default_root_dir": folder,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**settings, **options})


def saved(folder: Path, module: LightningModule, *callbacks: Callback, weights_only: bool = False) -> Path:
    trainer = make_trainer(folder, *callbacks)
    trainer.fit(module, loader())
    trainer.save_checkpoint(folder / "state.ckpt", weights_only=weights_only)
    return folder / "state.ckpt"


def test_every_part_is_under_the_key_that_hooks_know(tmp_path: Path) -> None:
    module, data = Net(), Data()
    trainer = make_trainer(tmp_path, Counter("a"), Counter("b"), Stateless(), max_epochs=2)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    found = load_checkpoint(tmp_path / "state.ckpt")
    assert set(found) == {
        "epoch", "global_step", "state_dict", "hyper_parameters", "hparams_name", "hparams_omitted", "hparams_type",
        "datamodule_hyper_parameters", "optimizer_states", "lr_schedulers", "scaler", "progress", "callbacks", "random_state",
        "Data", "run_id", "metrics", "loader_states", "should_stop", "optimizer_windows", "loggers",
    }  # fmt: skip
    assert (found["epoch"], found["global_step"]) == (2, 4)
    assert found["hyper_parameters"] == {"optimizers": 1, "width": 2, "schedulers": True}
    assert found["datamodule_hyper_parameters"] == {"size": 4}
    assert found["callbacks"] == {"Counter-a": {"count": 2}, "Counter-b": {"count": 2}}
    assert found["Data"] == {"served": 1}
    assert found["lr_schedulers"][0]["last_epoch"] == 2
    assert found["optimizer_states"][0]["param_groups"][0]["lr"] == 0.025
    assert set(found["state_dict"]) == set(module.state_dict())
    assert found["progress"]["total_batches"] == 4


def test_capture_does_not_change_or_copy_the_weights(tmp_path: Path) -> None:
    module = Net()
    trainer = make_trainer(tmp_path)
    trainer.fit(module, loader())
    captured = state.capture(trainer, module, None, [], None, weights_only=True)
    assert captured["state_dict"]["layers.0.weight"].data_ptr() == module.layers[0].weight.data_ptr()


def test_before_any_run_there_is_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(LeydenError, match="has not run a module yet"):
        make_trainer(tmp_path).save_checkpoint(tmp_path / "x.ckpt")


def test_optimizers_schedulers_callbacks_and_datamodule_come_back(tmp_path: Path) -> None:
    data = Data()
    first = make_trainer(tmp_path, Counter("a"), Counter("b"), max_epochs=2)
    module = Net()
    first.fit(module, datamodule=data)
    first.save_checkpoint(tmp_path / "state.ckpt")
    momentum = first.optimizers[0].state_dict()["state"][0]["momentum_buffer"].clone()

    seen: dict[str, Any] = {}

    class Look(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            seen["momentum"] = trainer.optimizers[0].state_dict()["state"][0]["momentum_buffer"].clone()
            seen["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            seen["last_epoch"] = trainer.lr_scheduler_configs[0].scheduler.last_epoch
            seen["where"] = (trainer.current_epoch, trainer.global_step)
            seen["weight"] = pl_module.layers[0].weight.detach().clone()

    weight = module.layers[0].weight.detach().clone()
    counters, again = (Counter("b"), Counter("a")), Data()
    make_trainer(tmp_path, *counters, Look(), max_epochs=3).fit(
        Net(), datamodule=again, ckpt_path=tmp_path / "state.ckpt"
    )
    assert torch.equal(seen["momentum"], momentum)
    assert torch.equal(seen["weight"], weight)
    assert (seen["lr"], seen["last_epoch"], seen["where"]) == (0.025, 2, (2, 4))
    assert [counter.count for counter in counters] == [3, 3]
    assert again.served == 102  # 100 + 1 of the checkpoint, and asked for once more


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_weights_that_do_not_fit_are_refused_with_the_file_and_the_names(verb: str, tmp_path: Path) -> None:
    class Validates(Net):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            pass

        def val_dataloader(self) -> Any:
            return loader()

    path = saved(tmp_path, Net(width=2))
    pattern = r"(?s)state\.ckpt does not fit Validates: .*size mismatch for layers\.0\.weight.*\[2, 3\].*\[5, 3\]"
    with pytest.raises(CheckpointError, match=pattern):
        getattr(make_trainer(tmp_path), verb)(Validates(width=5), loader(), ckpt_path=path)


def test_strict_loading_false_takes_what_fits(tmp_path: Path) -> None:
    class Lenient(Net):
        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = False
            self.head = nn.Linear(2, 2)

    path = saved(tmp_path, Net())
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(Lenient(), loader(), ckpt_path=path)
    assert trainer.global_step == 4


def test_weights_only_cannot_be_gone_on_from(tmp_path: Path) -> None:
    path = saved(tmp_path, Net(), weights_only=True)
    with pytest.raises(
        CheckpointError, match=r"state\.ckpt holds weights only.*leyden\.load_checkpoint\(path\)\['state_dict'\]"
    ):
        make_trainer(tmp_path, max_epochs=2).fit(Net(), loader(), ckpt_path=path)


def test_a_plain_safetensors_file_is_weights_only(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(Net().state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="holds weights only"):
        make_trainer(tmp_path).fit(Net(), loader(), ckpt_path=tmp_path / "plain.safetensors")


@pytest.mark.parametrize("before", [1, 2])
def test_another_number_of_optimizers_is_refused(before: int, tmp_path: Path) -> None:
    path = saved(tmp_path, Net(optimizers=before))
    module = Net(optimizers=3 - before)
    module.strict_loading = False
    with pytest.raises(CheckpointError, match=rf"state\.ckpt has {before} optimizer states.*made {3 - before}"):
        make_trainer(tmp_path).fit(module, loader(), ckpt_path=path)


def test_another_number_of_schedulers_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Net())
    with pytest.raises(CheckpointError, match=r"has 1 lr schedulers, but configure_optimizers made 0"):
        make_trainer(tmp_path).fit(Net(schedulers=False), loader(), ckpt_path=path)


def test_an_optimizer_of_other_parameters_is_refused_with_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, Net())
    with pytest.raises(CheckpointError, match=r"state\.ckpt does not fit SGD: .*parameter group"):
        make_trainer(tmp_path).fit(Net(frozen=True), loader(), ckpt_path=path)


def test_several_optimizers_come_back_each_to_its_own(tmp_path: Path) -> None:
    torch.manual_seed(3)
    path = saved(tmp_path, Net(optimizers=2))
    held = load_checkpoint(path)["optimizer_states"]
    trainer = make_trainer(tmp_path)  # max_epochs is reached: nothing is trained
    trainer.fit(Net(optimizers=2), loader(), ckpt_path=path)
    for optimizer, before in zip(trainer.optimizers, held, strict=True):
        assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"])
    first, second = (optimizer.state_dict()["state"][0]["momentum_buffer"] for optimizer in trainer.optimizers)
    assert not torch.equal(first, second)


def test_the_state_of_a_missing_callback_is_announced_and_the_rest_applied(tmp_path: Path) -> None:
    path = saved(tmp_path, Net(), Counter("a"), Counter("b"))
    counter = Counter("b")
    with pytest.warns(LeydenWarning, match=r"LEY-callback-state.*Counter-a"):
        make_trainer(tmp_path, counter, max_epochs=2).fit(Net(), loader(), ckpt_path=path)
    assert counter.count == 2


def test_a_new_callback_starts_from_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path, Net())
    counter = Counter()
    make_trainer(tmp_path, counter, max_epochs=2).fit(Net(), loader(), ckpt_path=path)
    assert counter.count == 1


def test_random_state_is_that_of_the_checkpoint_when_training_begins(tmp_path: Path) -> None:
    path = saved(tmp_path, Net())
    expected = load_checkpoint(path)["random_state"]["torch"]
    seen: list[Tensor] = []

    class Draws(Net):
        def on_train_start(self) -> None:
            torch.manual_seed(1234)

        def on_train_epoch_start(self) -> None:
            seen.append(torch.get_rng_state())

    make_trainer(tmp_path, max_epochs=2).fit(Draws(), loader(), ckpt_path=path)
    assert torch.equal(seen[0], expected)


def test_a_run_without_checkpoint_keeps_the_random_state_that_hooks_leave(tmp_path: Path) -> None:
    seen: list[int] = []

    class Seeds(Net):
        def on_train_start(self) -> None:
            torch.manual_seed(1234)

        def on_train_epoch_start(self) -> None:
            seen.append(torch.initial_seed())

    make_trainer(tmp_path).fit(Seeds(), loader())
    assert seen == [1234]


def test_what_a_hook_takes_out_is_missed_with_its_name(tmp_path: Path) -> None:
    path = saved(tmp_path, Net())
    held = load_checkpoint(path)
    del held["progress"]
    write_checkpoint(path, held)
    with pytest.raises(CheckpointError, match="holds weights only"):
        make_trainer(tmp_path).fit(Net(), loader(), ckpt_path=path)
    del held["state_dict"]
    write_checkpoint(path, held)
    with pytest.raises(CheckpointError, match=r"state\.ckpt has no 'state_dict'"):
        make_trainer(tmp_path).fit(Net(), loader(), ckpt_path=path)
