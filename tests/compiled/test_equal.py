"""A compiled run is an eager one, within rounding: optimizers, schedulers, clipping, accumulation, precisions.

The graphs are run operation by operation here; `test_machine_code` has what needs a C++ compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from both_ways import Net, both, codes, fit, needs_tracing, same_size, traced_only
from leyden.callbacks import GradientAccumulationScheduler

pytestmark = [needs_tracing, pytest.mark.usefixtures("traced_only")]
_ = traced_only


def groups(net: Net, kind: type[optim.Optimizer] = optim.AdamW, **options: Any) -> optim.Optimizer:
    first = {"params": net.net[0].parameters(), "lr": 1e-2, "weight_decay": 0.1}
    return kind([first, {"params": net.net[2].parameters(), "lr": 3e-2, "weight_decay": 0.0}], **options)


WRITTEN_DOWN: dict[str, Callable[[Net], Any]] = {
    "AdamW": lambda net: optim.AdamW(net.parameters(), lr=1e-2),
    "AdamW, groups": groups,
    "AdamW, unfused": lambda net: optim.AdamW(net.parameters(), lr=1e-2, foreach=False, amsgrad=True),
    "Adam, amsgrad, decay": lambda net: optim.Adam(net.parameters(), lr=1e-2, amsgrad=True, weight_decay=0.1),
    "Adam, maximize": lambda net: optim.Adam(net.parameters(), lr=1e-3, maximize=True, betas=(0.8, 0.9), eps=1e-3),
    "SGD": lambda net: optim.SGD(net.parameters(), lr=1e-2),
    "SGD, nesterov, decay": lambda net: optim.SGD(
        net.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "SGD, dampening, groups": lambda net: groups(net, optim.SGD, momentum=0.9, dampening=0.3),
    "SGD, momentum in one group": lambda net: optim.SGD(
        [{"params": net.net[0].parameters(), "momentum": 0.9}, {"params": net.net[2].parameters()}], lr=1e-2
    ),
    "SGD, maximize": lambda net: optim.SGD(net.parameters(), lr=1e-4, maximize=True),
}
TRACED: dict[str, Callable[[Net], Any]] = {
    "RMSprop": lambda net: optim.RMSprop(net.parameters(), lr=1e-2, momentum=0.5, centered=True),
    "NAdam": lambda net: groups(net, optim.NAdam),
    "Adagrad": lambda net: optim.Adagrad(net.parameters(), lr=1e-2, lr_decay=0.1),
    "Adamax": lambda net: optim.Adamax(net.parameters(), lr=1e-2),
    "Adadelta": lambda net: optim.Adadelta(net.parameters(), lr=0.1),
    "ASGD": lambda net: optim.ASGD(net.parameters(), lr=1e-2),
    "Rprop": lambda net: optim.Rprop(net.parameters(), lr=1e-3),
}
ONE_WAY_OR_ANOTHER: dict[str, Callable[[Net], Any]] = {
    "RAdam": lambda net: optim.RAdam(net.parameters(), lr=1e-2),  # in a graph its numbers are worked out in fp32
    "Adafactor": lambda net: optim.Adafactor(net.parameters(), lr=1e-2),
    "subclass": lambda net: type("Mine", (optim.AdamW,), {})(net.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("name", [*WRITTEN_DOWN, *TRACED])
def test_optimizers(name: str, tmp_path: Path) -> None:
    ran, _ = both(tmp_path, lambda: Net({**WRITTEN_DOWN, **TRACED}[name]), same_size)
    assert ran.whole, ran.line
    assert ran.compiled.compilations == 1
    assert not ran.warned
    assert ran.trainer.global_step == 20


@pytest.mark.parametrize("name", ONE_WAY_OR_ANOTHER)
def test_optimizers_that_may_be_refused(name: str, tmp_path: Path) -> None:
    ran, _ = both(tmp_path, lambda: Net(ONE_WAY_OR_ANOTHER[name]), same_size, tolerance=2e-3)
    assert ran.whole or codes(ran) == ["compile"]


def with_scheduler(
    make: Callable[[optim.Optimizer], Any],
    optimizer: Callable[[Net], optim.Optimizer] = WRITTEN_DOWN["AdamW"],
    **config: Any,
) -> Callable[[Net], Any]:
    def configure(net: Net) -> Any:
        found = optimizer(net)
        return {"optimizer": found, "lr_scheduler": {"scheduler": make(found), **config}}

    return configure


SCHEDULED: dict[str, Callable[[Net], Any]] = {
    "cosine per step": with_scheduler(lambda each: optim.lr_scheduler.CosineAnnealingLR(each, 20), interval="step"),
    "one cycle, betas": with_scheduler(
        lambda each: optim.lr_scheduler.OneCycleLR(each, max_lr=[0.02, 0.03], total_steps=25), groups, interval="step"
    ),
    "one cycle, momentum": with_scheduler(
        lambda each: optim.lr_scheduler.OneCycleLR(each, max_lr=0.02, total_steps=25),
        lambda net: optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        interval="step",
    ),
    "per epoch": with_scheduler(lambda each: optim.lr_scheduler.StepLR(each, 1, 0.5)),
    "plateau": with_scheduler(
        lambda each: optim.lr_scheduler.ReduceLROnPlateau(each, patience=0, threshold=0.9), monitor="loss_epoch"
    ),
    "rate in a tensor": with_scheduler(
        lambda each: optim.lr_scheduler.CosineAnnealingLR(each, 20),
        lambda net: optim.AdamW(net.parameters(), lr=torch.tensor(1e-2)),
        interval="step",
    ),
    "rate of a traced one": with_scheduler(
        lambda each: optim.lr_scheduler.CosineAnnealingLR(each, 20),
        lambda net: optim.RMSprop(net.parameters(), lr=1e-2),
        interval="step",
    ),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedulers_compile_nothing_anew(name: str, tmp_path: Path) -> None:
    ran, eager = both(tmp_path, lambda: Net(SCHEDULED[name]), same_size)
    assert ran.whole, ran.line
    assert ran.compiled.compilations == 1
    assert eager.optimizer_state[0]["param_groups"][0]["lr"] != 1e-2  # it did something


def test_one_cycle_of_a_traced_optimizer_is_compiled_until_there_are_too_many(tmp_path: Path) -> None:
    make = with_scheduler(
        lambda each: optim.lr_scheduler.OneCycleLR(each, max_lr=0.02, total_steps=25),
        lambda net: optim.RMSprop(net.parameters(), lr=0.1, momentum=0.9),
        interval="step",
    )
    ran, _ = both(tmp_path, lambda: Net(make), same_size)
    assert sorted(codes(ran)) == ["compile", "recompilations"]
    assert "'momentum'" in ran.compiled.reason


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_the_trainers_own_part(options: dict[str, Any], tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Net, tolerance=3e-2 if "precision" in options else 1e-4, max_epochs=6, **options)
    assert ran.whole, ran.line
    assert not ran.warned


def test_clipping_to_nothing_is_no_clipping_of_all(tmp_path: Path) -> None:
    ran, eager = both(tmp_path, Net, same_size, gradient_clip_val=0)
    without = fit(tmp_path, Net(), same_size(), compile=False)
    assert eager.rows == without.rows
    assert ran.whole


def test_windows_that_change_get_graphs_of_their_own(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Net, callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 3, 2: 2})], max_epochs=5)
    assert ran.whole, ran.line
    # windows of 1: batches of 4 and of 2; of 3, and of the 2 that are left: 3 + 2 places; of 2, and of the 1 that is left: 2 new
    assert ran.compiled.compilations == 2 + (3 + 2) + 2
    assert not ran.warned  # these are not made again and again


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_precisions_that_are_refused(precision: str, tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Net, same_size, tolerance=1e-8 if precision == "64-true" else 5e-2, precision=precision)
    assert not ran.whole
    assert codes(ran) == ["compile"]
    assert f"precision='{precision}' changes torch's default dtype" in ran.warned[0]


class Overflows(Net):
    """Its gradients overflow in batches 0 and 3 of the second and third epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert isinstance(loss, Tensor)
        bad = (batch_idx == 0 or batch_idx == 3) and 0 < self.current_epoch < 3
        return loss * torch.tensor(float("inf")) if bad else loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_overflows_is_left_out(accumulate: int, tmp_path: Path) -> None:
    make = SCHEDULED["cosine per step"]
    ran, eager = both(
        tmp_path,
        lambda: Overflows(make),
        same_size,
        tolerance=3e-2,
        precision="16-mixed",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
    )
    assert ran.whole, ran.line
    scaler = ran.trainer._run.scaler.scaler  # type: ignore[union-attr]
    steps = ran.trainer.global_step
    assert steps == eager.trainer.global_step == (20 if accumulate == 1 else 12)
    [made] = {int(values["step"]) for values in ran.optimizer_state[0]["state"].values()}
    assert made <= steps - 4  # fp16 overflows by itself at first
    assert scaler.get_scale() == 2.0 ** (16 - (steps - made))
    assert ran.trainer.lr_scheduler_configs[0].scheduler.last_epoch == made


def test_a_scale_grows_as_torchs_does(tmp_path: Path) -> None:
    from leyden.compiled.graph import LossScale

    mine, theirs = (torch.amp.GradScaler("cpu", growth_interval=3, init_scale=8.0) for _ in range(2))
    graph = LossScale(mine, torch.device("cpu"))
    theirs.scale(torch.zeros(()))
    parameter = nn.Parameter(torch.ones(1))
    optimizer = optim.SGD([parameter], lr=0.0)
    for bad in [False] * 4 + [True] + [False] * 5 + [True, True] + [False] * 4:
        parameter.grad = torch.full((1,), float("inf") if bad else 1.0)
        theirs.step(optimizer)
        theirs.update()
        graph.update(torch.tensor(bad))
        assert (mine.get_scale(), int(graph.tracker)) == (theirs.get_scale(), theirs._get_growth_tracker())
