"""Hooks of then, at their places: each one's moment among those of today."""

from __future__ import annotations

from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as pl
from leyden.errors import HookError, LeydenWarning
from leyden.former import is_former
from leyden.hooks import FORMER_MODULE_HOOKS
from quiet import make_trainer

pytestmark = pytest.mark.filterwarnings(r"ignore:\[LEY-(former-name|no-val-loader)\]")


def loader(count: int = 4, size: int = 2) -> Any:
    return DataLoader(torch.ones(count, 3), batch_size=size)


class Base(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.calls: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls.append(("step", batch_idx))
        return {"loss": self.layer(batch).mean()}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls.append(("val", batch_idx))
        return {"v": self.layer(batch).mean()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Old(Base):
    def on_epoch_start(self) -> None:
        self.calls.append("on_epoch_start")

    def on_epoch_end(self) -> None:
        self.calls.append("on_epoch_end")

    def on_batch_start(self, batch: Any) -> Any:
        self.calls.append(("on_batch_start", tuple(batch.shape)))

    def on_batch_end(self) -> None:
        self.calls.append("on_batch_end")

    def on_pre_performance_check(self) -> None:
        self.calls.append("on_pre_performance_check")

    def on_post_performance_check(self) -> None:
        self.calls.append("on_post_performance_check")

    def on_sanity_check_start(self) -> None:
        self.calls.append("on_sanity_check_start")

    def on_train_start(self) -> None:
        self.calls.append("on_train_start")

    def tng_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(2)

    def validation_end(self, outputs: Any) -> Any:
        self.calls.append(("validation_end", len(outputs), sorted(outputs[0])))
        return {"val_loss": outputs[0]["v"]}


def test_each_hook_has_its_moment(tmp_path: Path) -> None:
    model = Old()
    make_trainer(tmp_path, num_sanity_val_steps=1).fit(model)
    validation = ["on_pre_performance_check", ("val", 0), ("validation_end", 1, ["v"]), "on_post_performance_check"]
    assert model.calls == [
        "on_sanity_check_start",
        *validation,
        "on_train_start",
        "on_epoch_start",
        ("on_batch_start", (2, 3)),
        ("step", 0),
        "on_batch_end",
        ("on_batch_start", (2, 3)),
        ("step", 1),
        "on_batch_end",
        *validation,
        "on_epoch_end",
    ]


def test_both_generations_on_one_module(tmp_path: Path) -> None:
    class Both(Old):
        def on_train_epoch_start(self) -> None:
            self.calls.append("on_train_epoch_start")

        def on_train_epoch_end(self) -> None:
            self.calls.append("on_train_epoch_end")

    model = Both()
    make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(model)
    assert [call for call in model.calls if "epoch" in call] == [
        "on_epoch_start",
        "on_train_epoch_start",
        "on_train_epoch_end",
        "on_epoch_end",
    ]


def test_minus_one_ends_the_epoch(tmp_path: Path) -> None:
    class Stops(Old):
        def on_batch_start(self, batch: Any) -> Any:
            return -1 if len([call for call in self.calls if call == ("step", 0)]) == 2 else None

    model = Stops()
    trainer = make_trainer(tmp_path, max_epochs=3, limit_val_batches=0)
    trainer.fit(model)
    assert [call for call in model.calls if call[0] == "step"] == [("step", 0), ("step", 1), ("step", 0)]
    assert trainer.current_epoch == 3


def test_several_validation_loaders_give_a_list_of_lists(tmp_path: Path) -> None:
    class Several(Base):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:  # type: ignore[override]
            return {"n": (dataloader_idx, batch_idx)}

        def validation_epoch_end(self, outputs: Any) -> Any:
            self.calls.append([[one["n"] for one in each] for each in outputs])
            return {"log": {"count": float(sum(map(len, outputs)))}}

    model = Several()
    trainer = make_trainer(tmp_path)
    trainer.validate(model, [loader(4), loader(2)])
    assert model.calls == [[[(0, 0), (0, 1)], [(1, 0)]]]
    assert float(trainer.callback_metrics["count"]) == 3


@pytest.mark.parametrize("name", ["training_end", "training_step_end"])
def test_the_end_of_a_step_gets_what_the_step_returned(tmp_path: Path, name: str) -> None:
    def end(self: Any, output: Any) -> Any:
        self.calls.append(sorted(output))
        return {"loss": 2 * output["loss"], "log": {"doubled": 2 * output["loss"]}}

    cls = type("Ends", (Base,), {name: end})
    torch.manual_seed(0)
    model = cls()
    trainer = make_trainer(tmp_path, limit_train_batches=1)
    trainer.fit(model, loader())
    torch.manual_seed(0)
    hand = Base()
    loss = 2 * hand.layer(torch.ones(2, 3)).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in hand.parameters():
            parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(model.layer.weight, hand.layer.weight)
    assert float(trainer.callback_metrics["doubled"]) == pytest.approx(loss.item())
    assert model.calls == [("step", 0), ["loss"]]


def test_the_end_of_a_training_epoch_gets_all_outputs(tmp_path: Path) -> None:
    class Collects(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.layer(batch).mean(), "n": torch.tensor(batch_idx + 1.0)}

        def training_epoch_end(self, outputs: Any) -> Any:
            assert not any(output["loss"].requires_grad for output in outputs)
            return {"log": {"mean_n": torch.stack([output["n"] for output in outputs]).mean()}}

    model = Collects()
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(model, loader(6))
    assert float(trainer.callback_metrics["mean_n"]) == 2.0  # of 1, 2 and 3: the epoch before is forgotten


def test_test_epoch_end_may_call_validation_epoch_end(tmp_path: Path) -> None:
    class Shares(Base):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return self.validation_step(batch, batch_idx)

        def validation_epoch_end(self, outputs: Any) -> Any:
            return {"val_loss": torch.stack([each["v"] for each in outputs]).mean()}

        def test_epoch_end(self, outputs: Any) -> Any:
            return {"log": {"test_loss": self.validation_epoch_end(outputs)["val_loss"]}}

    model = Shares()
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader(), loader(2))
    assert "val_loss" in trainer.callback_metrics
    (results,) = trainer.test(model, loader(2))
    assert results["test_loss"] == pytest.approx(model.layer(torch.ones(2, 3)).mean().item())


class OldCallback(pl.Callback):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_init_end(self, trainer: Any) -> None:
        self.calls.append(("on_init_end", type(trainer).__name__))

    def on_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append(("on_epoch_start", trainer.current_epoch))

    def on_batch_start(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append("on_batch_start")

    def on_batch_end(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append("on_batch_end")

    def on_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append(("on_epoch_end", type(pl_module).__name__))

    def on_train_batch_end(  # as of 1.x
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        self.calls.append((sorted(outputs), batch_idx, dataloader_idx))


def test_callbacks_of_then(tmp_path: Path) -> None:
    callback = OldCallback()
    make_trainer(tmp_path, callback).fit(Base(), loader(2))
    assert callback.calls == [
        ("on_init_end", "Trainer"),
        ("on_epoch_start", 0),
        "on_batch_start",
        (["loss"], 0, 0),
        "on_batch_end",
        ("on_epoch_end", "Base"),
    ]
    assert set(vars(callback)) == {"calls"}


def test_keyboard_interrupt_is_told_to_callbacks_of_then(tmp_path: Path) -> None:
    class Told(pl.Callback):
        calls: tuple[str, ...] = ()

        def on_keyboard_interrupt(self, trainer: Any, pl_module: Any) -> None:
            self.calls = (*self.calls, type(pl_module).__name__)

    class Interrupted(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyboardInterrupt

    callback = Told()
    with pytest.raises(SystemExit):
        make_trainer(tmp_path, callback).fit(Interrupted(), loader())
    assert callback.calls == ("Interrupted",)


def test_a_hook_that_today_s_own_calls_is_a_helper(tmp_path: Path) -> None:
    class Helping(Base):
        def validation_epoch_end(self, outputs: Any) -> Any:
            self.calls.append(outputs)

        def on_validation_epoch_end(self) -> None:
            self.validation_epoch_end("mine")

    model = Helping()
    make_trainer(tmp_path).validate(model, loader(2))
    assert [call for call in model.calls if call[0] != "val"] == ["mine"]


def test_a_dict_of_today_is_left_alone(tmp_path: Path) -> None:
    class Modern(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch).mean()
            self.log("loss", loss, on_epoch=True)
            return {"loss": loss, "more": torch.tensor(1.0)}

        def note(self) -> str:
            return "log"  # a word that looks like the key of then

    model = Modern()
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader())
    assert set(trainer.callback_metrics) == {"loss", "loss_step", "loss_epoch"}


def test_values_that_are_logged_by_hand_keep_their_flags(tmp_path: Path) -> None:
    class Mixed(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch).mean()
            self.log("loss", loss, on_epoch=True)
            return {"loss": loss}

        def training_epoch_end(self, outputs: Any) -> None:
            self.calls.append(len(outputs))

    model = Mixed()
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(model, loader())
    assert model.calls == [2, 2]
    assert set(trainer.callback_metrics) == {"loss", "loss_step", "loss_epoch"}


def test_an_error_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    class Fails(Old):
        def on_epoch_start(self) -> None:
            raise RuntimeError("no")

    model = Fails()
    before = set(vars(model))
    with pytest.raises(RuntimeError, match="no"):
        make_trainer(tmp_path).fit(model)
    assert set(vars(model)) == before


def test_a_slip_of_the_pen_is_still_refused_beside_hooks_of_then(tmp_path: Path) -> None:
    class Slips(Old):
        def configure_optimizer(self) -> Any:
            return None

        configure_optimizers = None  # type: ignore[assignment]

    with pytest.raises(HookError, match="configure_optimizers"):
        make_trainer(tmp_path).fit(Slips())
    assert "on_train_epoch_start" not in vars(Slips())


def test_configure_apex_is_told_of_and_not_called(tmp_path: Path) -> None:
    class Apex(Base):
        def configure_apex(self, amp: Any, model: Any, optimizers: Any, amp_level: str) -> Any:
            raise AssertionError("never called")

    model = Apex()
    with pytest.warns(LeydenWarning, match=r"configure_apex.*16-mixed.*it is not called"):
        make_trainer(tmp_path).fit(model, loader())
    assert ("step", 0) in model.calls


def test_hparams_that_are_assigned_are_saved_as_they_are_in_the_end(tmp_path: Path) -> None:
    class WithDict(Base):
        def __init__(self, hparams: Any) -> None:
            super().__init__()
            self.hparams = hparams

    given = {"lr": 0.5}
    model = WithDict(given)
    assert model.hparams == given
    assert model.hparams.lr == 0.5
    model.hparams["batch_size"] = 4  # what is changed later is saved as well
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = WithDict.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.hparams == {"lr": 0.5, "batch_size": 4}
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="hparams=3 is not valid"):
        model.hparams = 3


def test_explain_shows_where_the_hooks_of_then_are(tmp_path: Path) -> None:
    model, callback = Old(), OldCallback()
    text = make_trainer(tmp_path, callback).explain(model)
    for hook, owner in (
        ("on_train_epoch_start", "Old"),
        ("on_validation_epoch_end", "Old"),
        ("on_train_batch_end", "OldCallback"),
    ):
        (line,) = [each for each in text.splitlines() if each.split("(")[0].strip().startswith(hook)][:1]
        assert owner in line, line
        assert "test_2020_hooks.py" in line, line
    assert callback.calls == []
    assert "training_step" not in vars(model)


def written(body: str) -> type[Base]:
    names: dict[str, Any] = {}
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    code = compile(f"def training_step(self, batch, batch_idx):\n{indented}", "written.py", "exec")
    function = next(each for each in code.co_consts if hasattr(each, "co_code"))
    names["training_step"] = FunctionType(function, globals(), "training_step")
    return type("Written", (Base,), names)


@pytest.mark.parametrize(
    ("body", "former"),
    [
        ("return {'loss': 1, 'log': {}}", True),
        ("return {'log': {}}", True),
        ("return dict(loss=1, progress_bar={})", True),
        ("out = {}\nout['log'] = {'a': 1}\nreturn out", True),
        ("def inner():\n    return {'loss': 2, 'progress_bar': {}}\nreturn inner()", True),
        ("return {'loss': 1 if batch else 2, 'log': {'a': batch_idx}}", True),
        ("self.log('log', 1)\nreturn {'loss': 1}", False),
        ("mode = 'log'\nreturn {'loss': mode}", False),
        ("return {'loss': 1} if self.mode == 'log' else {'loss': 2}", False),
        ("return {'loss': 1, 'logits': 2}", False),
        ("return self.net(batch, 'progress_bar')", False),
    ],
)
def test_the_keys_of_then_are_found_in_the_code_of_a_module(body: str, former: bool) -> None:
    assert is_former(written(body)(), pl.LightningModule, FORMER_MODULE_HOOKS) is former


class Of08(pl.Callback):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.calls.append((tuple(batch.shape), batch_idx, dataloader_idx))

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        self.calls.append((tuple(batch.shape), batch_idx, dataloader_idx))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any, outputs: Any) -> None:
        self.calls.append([sorted(output) for output in outputs])


def test_parameters_in_another_order_are_given_by_their_names(tmp_path: Path) -> None:
    callback = Of08()
    make_trainer(tmp_path, callback).fit(Base(), loader(3), loader(2))
    assert callback.calls == [((2, 3), 0, 0), ((1, 3), 1, 0), ((2, 3), 0, 0), [["loss"], ["loss"]]]
    assert set(vars(callback)) == {"calls"}


def test_one_hook_under_two_names_is_refused(tmp_path: Path) -> None:
    class Doubled(Old):
        def validation_epoch_end(self, outputs: Any) -> Any:
            return {}

    model = Doubled()
    before = set(vars(model))
    with pytest.raises(HookError, match=r"Doubled has both validation_epoch_end and validation_end.*Keep one"):
        make_trainer(tmp_path).fit(model)
    assert set(vars(model)) == before


def test_an_epoch_end_without_a_place_for_the_outputs_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    class Blind(Base):
        def validation_epoch_end(self) -> Any:
            return {}

    model = Blind()
    with pytest.raises(HookError, match=r"Blind\.validation_epoch_end\(\).*def validation_epoch_end\(self, outputs\)"):
        make_trainer(tmp_path).fit(model, loader(), loader())
    assert model.calls == []


def test_a_plateau_watches_val_loss_if_it_does_not_say(tmp_path: Path) -> None:
    class Plateau(Old):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, mode="max")
            return [optimizer], [self.scheduler]

    model = Plateau()
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(model)
    assert trainer.lr_scheduler_configs[0].monitor == "val_loss"
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)  # the mean of a linear layer fell


@pytest.mark.parametrize("way", ["property", "class attribute"])
def test_manual_optimization_is_chosen_on_the_class(tmp_path: Path, way: str) -> None:
    class Manual(Base):
        automatic_optimization = property(lambda self: False) if way == "property" else False  # type: ignore[assignment]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.optimizers().minimize(self.layer(batch).mean())

    model = Manual()
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader())
    assert trainer.global_step == 2
    assert Base().automatic_optimization is True


def test_a_value_that_cannot_be_logged_is_named_with_the_dict_that_it_was_in(tmp_path: Path) -> None:
    class Wrong(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.layer(batch).mean(), "log": {"picture": batch}}

    with pytest.raises(
        pl.errors.MetricError, match=r"'picture' in the dict that training_step returned cannot be logged"
    ):
        make_trainer(tmp_path).fit(Wrong(), loader())


def test_hparams_before_super_init_say_so() -> None:
    class Hasty(pl.LightningModule):
        def __init__(self) -> None:
            self.hparams = {"lr": 1}
            super().__init__()

    with pytest.raises(ValueError, match=r"self\.hparams = … in Hasty\.__init__ comes before super\(\)\.__init__\(\)"):
        Hasty()
