"""configure_optimizers in every form, and the user's own hooks of optimization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

import leyden
from leyden.errors import ConfigurationError, HookError, LeydenWarning, StepError
from leyden.optimizers import LightningOptimizer, SchedulerConfig, clip_gradients, normalize_optimizers

torch.set_num_threads(1)


@pytest.fixture
def sgd() -> SGD:
    return SGD([nn.Parameter(torch.zeros(2))], lr=1.0)


@pytest.fixture
def adam() -> Adam:
    return Adam([nn.Parameter(torch.zeros(2))], lr=1.0)


# Accepted forms


def test_none_is_no_optimizer() -> None:
    found = normalize_optimizers(None)
    assert (found.optimizers, found.schedulers) == ([], [])


def test_optimizers_alone(sgd: SGD, adam: Adam) -> None:
    for form, expected in (
        (sgd, [sgd]),
        ([sgd], [sgd]),
        ((sgd,), [sgd]),
        ([sgd, adam], [sgd, adam]),
        ((sgd, adam), [sgd, adam]),
        ({"optimizer": sgd}, [sgd]),
        ({"optimizer": sgd, "lr_scheduler": None}, [sgd]),
        ([{"optimizer": sgd}, {"optimizer": adam}], [sgd, adam]),
        (([sgd], []), [sgd]),
        (([sgd, adam], None), [sgd, adam]),
        ([[sgd], []], [sgd]),
    ):
        found = normalize_optimizers(form)
        assert found.optimizers == expected
        assert found.schedulers == []


def test_a_scheduler_by_itself_steps_each_epoch(sgd: SGD) -> None:
    scheduler = StepLR(sgd, 1)
    for form in (
        ([sgd], [scheduler]),
        ([sgd], (scheduler,)),
        [[sgd], [scheduler]],
        ((sgd,), (scheduler,)),
        {"optimizer": sgd, "lr_scheduler": scheduler},
        [{"optimizer": sgd, "lr_scheduler": scheduler}],
        ({"optimizer": sgd, "lr_scheduler": scheduler},),
        ([sgd], [{"scheduler": scheduler}]),
        {"optimizer": sgd, "lr_scheduler": {"scheduler": scheduler}},
    ):
        found = normalize_optimizers(form)
        assert found.optimizers == [sgd]
        assert found.schedulers == [
            SchedulerConfig(scheduler, interval="epoch", frequency=1, monitor=None, strict=True, name=None)
        ]


def test_a_config_is_taken_whole(sgd: SGD) -> None:
    scheduler = ReduceLROnPlateau(sgd)
    config = {
        "scheduler": scheduler, "interval": "step", "frequency": 3, "monitor": "loss", "strict": False, "name": "lr"
    }  # fmt: skip
    for form in (
        {"optimizer": sgd, "lr_scheduler": config},
        ([sgd], [config]),
        {"optimizer": sgd, "lr_scheduler": config, "monitor": "not this one"},
    ):
        assert normalize_optimizers(form).schedulers == [
            SchedulerConfig(scheduler, "step", 3, "loss", strict=False, name="lr", reduce_on_plateau=True)
        ]


def test_monitor_may_stand_beside_the_optimizer(sgd: SGD) -> None:
    scheduler = ReduceLROnPlateau(sgd)
    for given in (scheduler, {"scheduler": scheduler}):
        found = normalize_optimizers({"optimizer": sgd, "lr_scheduler": given, "monitor": "val_loss"})
        assert found.schedulers == [SchedulerConfig(scheduler, monitor="val_loss", reduce_on_plateau=True)]


def test_dicts_keep_each_optimizers_scheduler(sgd: SGD, adam: Adam) -> None:
    one, other = StepLR(sgd, 1), ExponentialLR(adam, 0.5)
    found = normalize_optimizers(
        [
            {"optimizer": sgd, "lr_scheduler": one},
            {"optimizer": adam, "lr_scheduler": {"scheduler": other, "interval": "step"}},
        ]
    )
    assert found.optimizers == [sgd, adam]
    assert found.schedulers == [SchedulerConfig(one), SchedulerConfig(other, interval="step")]


# Refused forms


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: 3, r"configure_optimizers returned int 3\. Allowed: an optimizer; a list or tuple of optimizers; "),
        (lambda o: "adam", r"configure_optimizers returned str 'adam'\. Allowed"),
        (lambda o: [], r"returned a list of \(\)\. Allowed"),
        (lambda o: SGD, r"configure_optimizers returned type <class 'torch\.optim\.sgd\.SGD'>"),
        (lambda o: (o, StepLR(o, 1)), r"returned a tuple of \(SGD, StepLR\)\. Allowed.*\(\[optimizers\], \[schedulers\]"),
        (lambda o: [o, None], r"returned a list of \(SGD, NoneType\)"),
        (lambda o: ([o], [StepLR(o, 1)], []), r"returned a tuple of \(list, list, list\)"),
        (lambda o: ([], []), r"returned a tuple of \(list, list\)"),
        (lambda o: [o, {"optimizer": o}], r"returned a list of \(SGD, dict\)"),
        (lambda o: o.param_groups[0]["params"], r"returned a list of \(Parameter\)"),
        (lambda o: {"optimiser": o}, r"a dict with the key 'optimiser'\. Allowed: optimizer, lr_scheduler.*Did you mean 'opt"),
        (lambda o: {"optimizer": o, "scheduler": 1}, r"the key 'scheduler'.*Did you mean 'lr_scheduler'\?"),
        (lambda o: {"lr_scheduler": StepLR(o, 1)}, r"a dict whose 'optimizer' is NoneType None; it must be a torch\.optim"),
        (lambda o: {"optimizer": [o]}, r"whose 'optimizer' is a list of \(SGD\); it must be"),
        (lambda o: {"optimizer": o, "lr_scheduler": {"interval": "step"}}, r"needs the key 'scheduler'; it has interval"),
        (
            lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": StepLR(o, 1), "freq": 1}},
            r"has the key 'freq'\. Allowed: scheduler, interval, frequency, monitor, strict, name",
        ),
        (
            lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": StepLR(o, 1), "intervall": "step"}},
            r"has the key 'intervall'.*Did you mean 'interval'\?",
        ),
        (
            lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": StepLR(o, 1), "interval": "batch"}},
            r"interval='batch' is not valid\. Allowed: 'epoch', 'step'",
        ),
        (
            lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": StepLR(o, 1), "frequency": 0}},
            r"frequency=0 is not valid\. Allowed: an integer ≥ 1",
        ),
        (
            lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": StepLR(o, 1), "frequency": 1.5}},
            r"frequency=1\.5 is not valid",
        ),
        (lambda o: {"optimizer": o, "lr_scheduler": 0.1}, r"returned float 0\.1 as a scheduler; it has no step\(\)"),
        (lambda o: {"optimizer": o, "lr_scheduler": [StepLR(o, 1)]}, r"a list of \(StepLR\) as a scheduler; it has no step"),
        (lambda o: ([o], [o.param_groups]), r"as a scheduler; it has no step\(\)"),
        (lambda o: ([o], StepLR(o, 1)), r"returned a tuple of \(list, StepLR\)\. Allowed"),
        (lambda o: ([o], [ReduceLROnPlateau(o)]), r"ReduceLROnPlateau needs to know what to watch.*'monitor': 'val_loss'"),
    ],
)  # fmt: skip
def test_other_forms_are_refused_with_what_is_allowed(make: Callable[[SGD], Any], message: str, sgd: SGD) -> None:
    with pytest.raises(ConfigurationError, match=message):
        normalize_optimizers(make(sgd))


def test_a_scheduler_of_an_optimizer_that_was_not_returned_is_refused(sgd: SGD, adam: Adam) -> None:
    with pytest.raises(ConfigurationError, match=r"a StepLR of an optimizer that it did not return\. Return that opti"):
        normalize_optimizers(([sgd], [StepLR(adam, 1)]))


# In a run


def make_trainer(folder: Path, **options: Any) -> leyden.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "max_epochs": 1,
    }
    return leyden.Trainer(**(settings | options))


def rows(count: int) -> DataLoader[Any]:
    return DataLoader(torch.arange(1.0, count + 1)[:, None], batch_size=1)  # type: ignore[arg-type]


class Line(leyden.LightningModule):
    """The loss is w·x: each step moves w by -lr·x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1.0)


def test_several_optimizers_in_automatic_mode_are_refused_with_the_mend(tmp_path: Path) -> None:
    class Two(Line):
        def configure_optimizers(self) -> Any:
            return [SGD(self.parameters(), lr=1.0), Adam(self.parameters())]

    with pytest.raises(
        ConfigurationError,
        match=r"returned 2 optimizers.*automatic_optimization = False in __init__.*opt_a, opt_b = self\.optimizers\(\)",
    ):
        make_trainer(tmp_path).fit(Two(), rows(1))


def test_no_optimizer_runs_the_steps_and_says_that_nothing_is_optimized(tmp_path: Path) -> None:
    class Bare(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.calls.append(batch_idx)

        def configure_optimizers(self) -> None:
            return None

    module = Bare()
    trainer = make_trainer(tmp_path)
    with pytest.warns(LeydenWarning, match=r"\[LEY-no-optimizer\].*nothing is optimized"):
        trainer.fit(module, rows(3))
    assert module.calls == [0, 1, 2]
    assert trainer.global_step == 3  # without an optimizer every batch counts, so that max_steps still ends the run


def test_a_module_without_configure_optimizers_is_refused(tmp_path: Path) -> None:
    class Forgetful(leyden.LightningModule):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return batch.sum()

    with pytest.raises(HookError, match=r"Forgetful has no configure_optimizers.*return None from it"):
        make_trainer(tmp_path).fit(Forgetful(), rows(1))


def test_optimizers_and_schedulers_are_handed_out_as_configured(tmp_path: Path) -> None:
    class Asking(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            handle = self.optimizers()
            assert isinstance(handle, LightningOptimizer)
            assert handle.optimizer is self.optimizers(use_pl_optimizer=False) is self.trainer.optimizers[0]
            assert handle.param_groups is handle.optimizer.param_groups
            assert isinstance(self.lr_schedulers(), StepLR)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=1.0)
            return [optimizer], [StepLR(optimizer, 1)]

    trainer = make_trainer(tmp_path)
    trainer.fit(Asking(), rows(1))
    assert [type(config.scheduler) for config in trainer.lr_scheduler_configs] == [StepLR]


# Overriding optimizer_step


def test_own_optimizer_step_gets_what_is_documented(tmp_path: Path) -> None:
    class Own(Line):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            assert isinstance(optimizer, LightningOptimizer)
            before = self.weight.item()
            loss = optimizer.step(closure=optimizer_closure)
            self.calls.append((epoch, batch_idx, before, loss.item()))

    module = Own()
    trainer = make_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, rows(3))
    # windows [1, 2] and [3] move w by 1.5 and 3; the closure's loss is the last batch's part
    assert module.calls == [(0, 1, 0.0, 0.0), (0, 2, -1.5, -4.5), (1, 1, -4.5, -4.5), (1, 2, -6.0, -18.0)]
    assert trainer.global_step == 4


def test_warm_up_by_hand(tmp_path: Path) -> None:
    class WarmUp(Line):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = min(1.0, (self.trainer.global_step + 1) / 4)
            optimizer.step(closure=optimizer_closure)

    module = WarmUp()
    make_trainer(tmp_path, max_epochs=2).fit(module, rows(3))
    assert module.weight.item() == -(0.25 * 1 + 0.5 * 2 + 0.75 * 3 + 1 + 2 + 3)


def test_super_does_what_the_default_does(tmp_path: Path) -> None:
    class Super(Line):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.calls.append(len(args))
            super().optimizer_step(*args, **kwargs)

    module = Super()
    make_trainer(tmp_path).fit(module, rows(3))
    assert module.weight.item() == -6.0
    assert module.calls == [4, 4, 4]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_stepping_every_second_batch_only(precision: str, tmp_path: Path) -> None:
    class EverySecond(Line):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            if batch_idx % 2 == 0:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=1.0)
            return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"}]

    module = EverySecond()
    trainer = make_trainer(tmp_path, precision=precision)
    trainer.fit(module, rows(5))
    assert module.weight.item() == -(1 + 0.5 * 3 + 0.25 * 5)  # gradients of the others are set to none
    assert trainer.global_step == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125


def test_not_calling_the_closure_is_an_error(tmp_path: Path) -> None:
    class Lazy(Line):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            optimizer.step()

    with pytest.raises(StepError, match=r"did not call its optimizer_closure.*optimizer\.step\(closure=optimizer_clos"):
        make_trainer(tmp_path).fit(Lazy(), rows(1))


def test_the_closure_may_be_evaluated_twice(tmp_path: Path) -> None:
    """As sharpness-aware methods do: each evaluation starts from gradients set to none."""

    class Twice(Line):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            optimizer_closure()
            optimizer.step(closure=optimizer_closure)

    module = Twice()
    trainer = make_trainer(tmp_path)
    trainer.fit(module, rows(3))
    assert module.weight.item() == -6.0
    assert trainer.global_step == 3


def test_a_patched_instance_counts_as_overridden(tmp_path: Path) -> None:
    module = Line()
    module.optimizer_step = lambda epoch, batch_idx, optimizer, optimizer_closure: (  # type: ignore[method-assign]
        module.calls.append(batch_idx),
        optimizer.step(optimizer_closure),
    )
    make_trainer(tmp_path).fit(module, rows(3))
    assert module.calls == [0, 1, 2]
    assert module.weight.item() == -6.0


# The other hooks


class Noting(Line):
    """Overrides every hook of optimization with what the default does, and notes the calls."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        assert type(optimizer) is SGD
        self.calls.append(("zero_grad", epoch, batch_idx))
        optimizer.zero_grad()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("backward", loss.item(), args, kwargs))
        loss.backward()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        assert type(optimizer) is SGD
        assert self.weight.grad is not None
        self.calls.append(("clip", self.weight.grad.item(), gradient_clip_val, gradient_clip_algorithm))
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.calls.append(("scheduler", type(scheduler).__name__, metric))
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=1.0)
        return [optimizer], [StepLR(optimizer, 1, 0.5)]


def test_hooks_get_what_is_documented_in_order(tmp_path: Path) -> None:
    module = Noting()
    make_trainer(tmp_path, accumulate_grad_batches=2, gradient_clip_val=2.0, gradient_clip_algorithm="value").fit(
        module, rows(3)
    )
    assert module.calls == [
        ("zero_grad", 0, 0),
        ("backward", 0.0, (), {}),
        ("backward", 0.0, (), {}),
        ("clip", 1.5, 2.0, "value"),
        ("zero_grad", 0, 2),
        ("backward", -4.5, (), {}),
        ("clip", 3.0, 2.0, "value"),
        ("scheduler", "StepLR", None),
    ]
    assert module.weight.item() == -3.5


def test_hooks_that_do_what_the_default_does_change_nothing(tmp_path: Path) -> None:
    class Default(Line):
        configure_optimizers = Noting.configure_optimizers

    for options in ({}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.7}, {"precision": "16-mixed"}):
        noting, plain = Noting(), Default()
        make_trainer(tmp_path, max_epochs=2, **options).fit(noting, rows(3))
        make_trainer(tmp_path, max_epochs=2, **options).fit(plain, rows(3))
        assert torch.equal(noting.weight, plain.weight)
        assert plain.weight.item() < 0


def test_own_clipping_is_asked_also_without_a_bound_and_sees_unscaled_gradients(tmp_path: Path) -> None:
    class OwnClip(Line):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
        ) -> None:
            assert (gradient_clip_val, gradient_clip_algorithm) == (None, None)
            assert self.weight.grad is not None
            self.calls.append(self.weight.grad.item())
            self.weight.grad.clamp_(max=0.5)

    for precision in ("32-true", "16-mixed"):
        module = OwnClip()
        make_trainer(tmp_path, precision=precision).fit(module, rows(3))
        assert module.calls == [1.0, 2.0, 3.0]
        assert module.weight.item() == -1.5


def test_own_backward_gets_the_scaled_loss(tmp_path: Path) -> None:
    class OwnBackward(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.weight * batch).sum() + 1.0

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self.calls.append(loss.item())
            loss.backward(*args, **kwargs)

    module = OwnBackward()
    make_trainer(tmp_path, precision="16-mixed", max_steps=1).fit(module, rows(1))
    assert module.calls == [65536.0]
    assert module.weight.item() == -1.0


def test_own_scheduler_step_gets_the_monitored_value(tmp_path: Path) -> None:
    class Plateau(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("seen", batch.sum(), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            self.calls.append(float(metric))
            scheduler.step(metric)

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=1.0)
            scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "seen"}

    module = Plateau()
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, rows(3))
    assert module.calls == [2.0, 2.0]
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


# Clipping


@pytest.mark.parametrize(("algorithm", "expected"), [("norm", [0.6, 0.8]), ("value", [1.0, 1.0])])
def test_clip_gradients_bounds_the_norm_or_each_element(algorithm: str, expected: list[float]) -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    clip_gradients(SGD([first, second]), 1.0, algorithm)
    torch.testing.assert_close(torch.cat([first.grad, second.grad]), torch.tensor(expected), atol=1e-5, rtol=0)


def test_clipping_leaves_parameters_of_no_optimizer_alone(tmp_path: Path) -> None:
    class Partly(Line):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.zeros(()))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.weight * 3.0 + self.idle * 4.0

        def configure_optimizers(self) -> Any:
            return SGD([self.weight], lr=1.0)

    module = Partly()
    make_trainer(tmp_path, gradient_clip_val=3.0, max_steps=1).fit(module, rows(1))
    assert module.weight.item() == pytest.approx(-3.0)  # of norm 3, not 5
    assert module.idle.grad is not None
    assert module.idle.grad.item() == 4.0


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_parameters_of_no_optimizer_only_make_steps_that_do_nothing(precision: str, tmp_path: Path) -> None:
    class Elsewhere(Line):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.zeros(()))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.idle * batch).sum()

        def configure_optimizers(self) -> Any:
            return SGD([self.weight], lr=1.0)

    module = Elsewhere()
    make_trainer(tmp_path, precision=precision).fit(module, rows(2))
    assert module.weight.item() == 0.0
