"""What modules do in a step: random numbers, statistics, attributes, hooks; and networks that change on the way."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import leyden as L
from both_ways import Net, batches, both, codes, fit, needs_tracing, same_size, traced_only
from leyden.callbacks import EMAWeightAveraging

pytestmark = [needs_tracing, pytest.mark.usefixtures("traced_only")]
_ = traced_only


class Zoo(Net):
    """Much of what modules do, in one step."""

    def __init__(self) -> None:
        super().__init__(
            Net().optimizer,
            *(
                nn.Linear(6, 8, bias=False),
                nn.BatchNorm1d(8),
                nn.Dropout(0.3),
                nn.Tanh(),
                nn.Dropout(0.5),
                nn.Linear(8, 1),
            ),
        )
        self.unused = nn.Linear(3, 3)
        self.encoder = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight
        self.embedding = nn.Embedding(3, 6)
        self.cell = nn.GRUCell(6, 6)
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6, bias=False))
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True, bias=False)
        self.frozen = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)).requires_grad_(False)
        self.hidden: Tensor | None = None
        self.steps = 0
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def on_train_start(self) -> None:
        self.frozen[1].eval()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        self.steps += 1
        self.seen += len(x)
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        x = self.frozen(x - self.mean) + 0.1 * torch.rand_like(x) + self.embedding((x[:, 0] > 0).long())
        hidden = self.hidden if self.hidden is not None and len(self.hidden) == len(x) else torch.zeros(len(x), 6)
        x = self.cell(self.decoder(torch.tanh(self.encoder(x))), hidden)
        self.hidden = x.detach()
        x = x + self.normed(self.attention(x[None], x[None], x[None])[0][0])
        return nn.functional.mse_loss(self.net(x), y) + 0.1 * torch.randn(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]) + self.training)

    def val_dataloader(self) -> Any:
        return batches(2, seed=1)


def test_all_kinds_of_parts(tmp_path: Path) -> None:
    ran, eager = both(
        tmp_path,
        Zoo,
        same_size,
        tolerance=1e-3,
        max_epochs=5,
        val_check_interval=2,
        num_sanity_val_steps=1,
        gradient_clip_val=1.0,
    )
    assert ran.whole, ran.line
    assert not ran.warned
    zoo = ran.module
    assert zoo.steps == eager.module.steps == 25
    assert int(zoo.seen) == 5 * 20
    assert int(zoo.net[1].num_batches_tracked) == 25
    assert int(zoo.frozen[1].num_batches_tracked) == 0
    assert torch.equal(zoo.unused.weight, Zoo().unused.weight)
    assert torch.equal(zoo.frozen[0].weight, Zoo().frozen[0].weight)
    assert zoo.decoder.weight is zoo.encoder.weight
    torch.testing.assert_close(zoo.hidden, eager.module.hidden, rtol=1e-3, atol=1e-3)
    assert len(ran.of("val")) == 10


class Counts:
    def __init__(self) -> None:
        self.calls = 0
        self.total = torch.zeros(())


class Holds(Net):
    """Changes what its attributes hold, in all the ways that the check must undo."""

    def __init__(self) -> None:
        super().__init__()
        self.recent: collections.deque[Any] = collections.deque([None, None])
        self.nested = [[torch.zeros(())], {"a": torch.zeros(())}]
        self.counts = Counts()
        self.names: dict[str, int] = collections.defaultdict(int)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].mul_(2)
        loss = self.loss(batch)
        self.recent[0], self.recent[1] = loss.detach(), self.recent[0]
        self.nested[0][0].add_(1)
        self.nested[1]["a"].add_(2)
        self.counts.total += 3
        self.counts.calls = min(3, self.counts.calls + 1)
        self.names["loss"] = 4
        self.log("sum", self.nested[0][0] + self.nested[1]["a"] + self.counts.total)
        self.log("loss", loss)
        return loss


def test_what_attributes_hold_is_changed_once_per_step(tmp_path: Path) -> None:
    data = [(torch.randn(4, 6), torch.randn(4, 1)) for _ in range(3)]
    copied = [[tuple(each.clone() for each in batch) for batch in data] for _ in range(2)]
    loaders = iter(copied)
    ran, _ = both(tmp_path, Holds, lambda: Listed(next(loaders)), max_epochs=4)
    assert ran.whole, ran.line
    assert ran.of("sum") == [6.0 * step for step in range(1, 13)]
    assert ran.module.counts.calls == 3
    assert [float(each) for each in ran.module.recent] == ran.of("loss")[:-3:-1]
    assert dict(ran.module.names) == {"loss": 4}
    for batch, before in zip(copied[1], data, strict=True):
        torch.testing.assert_close(batch[0], before[0] * 2**4)


class Listed(list[Any]):
    """Batches in a list that is one loader, not several."""

    def __init__(self, batches: Any) -> None:
        super().__init__(batches)
        self.dataset = None


class Unfreezes(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.net[0].requires_grad_(trainer.current_epoch in (1, 3))


class AddsGroup(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            trainer.optimizers[0].add_param_group({"params": list(pl_module.net[0].parameters()), "lr": 0.03})


class LateHead(Net):
    """Its head gets its first gradient in the second epoch, or is used in every other batch."""

    def __init__(self, optimizer: Any = None, alternates: bool = False) -> None:
        super().__init__(optimizer or Net().optimizer)
        self.head = nn.Linear(1, 1)
        self.alternates = alternates

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = self.net(batch[0])
        if batch_idx % 2 if self.alternates else self.current_epoch >= 1:
            found = self.head(found)
        loss = nn.functional.mse_loss(found, batch[1])
        self.log("loss", loss)
        return loss


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": Net().optimizer,
    "NAdam": lambda net: optim.NAdam(net.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parts_are_frozen_and_set_free(name: str, tmp_path: Path) -> None:
    ran, _ = both(tmp_path, lambda: Net(OPTIMIZERS[name]), same_size, lambda: [Unfreezes()])
    assert ran.whole, ran.line


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("alternates", [False, True])
def test_first_gradients_that_come_late(name: str, alternates: bool, tmp_path: Path) -> None:
    ran, _ = both(tmp_path, lambda: LateHead(OPTIMIZERS[name], alternates), same_size)
    assert not torch.equal(ran.module.head.weight, LateHead().head.weight), "the head was not trained"
    if name == "NAdam" and alternates:
        assert "the loss does not depend on all parameters" in ran.warned[0]
    else:
        assert ran.whole, ran.line


def test_alternating_parts_within_windows(tmp_path: Path) -> None:
    ran, _ = both(
        tmp_path, lambda: LateHead(alternates=True), lambda: same_size(6), accumulate_grad_batches=3, max_epochs=6
    )
    assert ran.whole, ran.line


def test_a_group_that_is_added(tmp_path: Path) -> None:
    def half(net: Net) -> Any:
        return optim.AdamW(net.net[2].parameters(), lr=1e-2)

    ran, _ = both(tmp_path, lambda: Net(half), same_size, lambda: [AddsGroup()])
    assert ran.whole, ran.line
    assert not torch.equal(ran.module.net[0].weight, Net().net[0].weight)


class Meddles(L.Callback):
    """Does something to the network or its optimizer before the third epoch."""

    def __init__(self, what: Callable[[Any, Any], Any]) -> None:
        self.what = what

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            self.what(pl_module, trainer.optimizers[0])


def load_itself(net: Any, optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.05


def forget(net: Any, optimizer: Any) -> None:
    state = optimizer.state[net.net[2].weight]
    state["exp_avg"] = torch.zeros_like(state["exp_avg"])


def add_hook(net: Any, optimizer: Any) -> None:
    net.net[0].register_forward_hook(lambda module, inputs, output: output * 2)


def swap_activation(net: Any, optimizer: Any) -> None:
    net.net[1] = nn.ReLU()


def decay(net: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.0


PLAIN_SGD: Callable[[Any], Any] = lambda net: optim.SGD(net.parameters(), lr=1e-2)  # noqa: E731
MEDDLED: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]] = {
    "an optimizer that loads its state": (load_itself, Net().optimizer),
    "one that has none": (load_itself, PLAIN_SGD),
    "one parameter's state": (forget, Net().optimizer),
    "a hook on a module": (add_hook, Net().optimizer),
    "another module": (swap_activation, Net().optimizer),
    "no decay any more": (decay, Net().optimizer),
    "weights": (lambda net, optimizer: net.net[0].weight.data.mul_(0.5), Net().optimizer),
    "eval mode": (lambda net, optimizer: net.eval(), Net().optimizer),
}


@pytest.mark.parametrize("name", MEDDLED)
def test_what_callbacks_change_between_epochs_is_seen(name: str, tmp_path: Path) -> None:
    what, optimizer = MEDDLED[name]
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    ran, eager = both(tmp_path, lambda: Net(optimizer, *map(copy_of, layers)), same_size, lambda: [Meddles(what)])
    assert ran.whole, ran.line
    undisturbed = fit(tmp_path, Net(optimizer, *map(copy_of, layers)), same_size(), compile=False)
    assert undisturbed.rows != eager.rows  # else nothing was tested


def copy_of(layer: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(layer)


def hook_optimizer(net: Any, optimizer: Any) -> None:
    optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.param_groups[0].update(lr=0.05))


def test_a_hook_on_the_optimizer_that_comes_late(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Net, same_size, lambda: [Meddles(hook_optimizer)])
    assert codes(ran) == ["compile"]
    assert "the optimizer has hooks on its step" in ran.warned[0]
    assert ran.optimizer_state[0]["param_groups"][0]["lr"] == 0.05


class Reloads(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.optimizers[0].load_state_dict(trainer.optimizers[0].state_dict())


def test_a_state_that_is_another_one_all_the_time_is_given_up(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Net, same_size, lambda: [Reloads()])
    assert codes(ran) == ["compile"]
    assert "others again and again" in ran.warned[0]


SCALE: Any = torch.ones(1, 1)
HEAD: Any = nn.Linear(1, 1)


class UsesGlobals(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(HEAD(self.net(x)).mean(1, keepdim=True) * SCALE, y)
        self.log("loss", loss)
        return loss


class SetsGlobals(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        global SCALE, HEAD
        torch.manual_seed(trainer.current_epoch)
        SCALE = [torch.ones(1, 1), torch.full((1, 1), 0.5), torch.linspace(1, 2, 4)[:, None], 2.0][
            trainer.current_epoch
        ]
        HEAD = nn.Linear(1, 1 + trainer.current_epoch % 3).requires_grad_(False)


def test_global_variables_are_watched(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, UsesGlobals, same_size, lambda: [SetsGlobals()])
    assert ran.whole, ran.line


def test_averaged_weights_are_swapped_in_for_validation(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Zoo, same_size, lambda: [EMAWeightAveraging(decay=0.9)], tolerance=1e-3)
    assert codes(ran) == ["compile"]
    assert "the optimizer has hooks on its step" in ran.warned[0]  # that is where the averages are updated
