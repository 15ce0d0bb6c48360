"""The check of a graph against eager: what it puts back, and what it calls different."""

from __future__ import annotations

import collections
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import leyden as L
from leyden.compiled.check import Snapshot, differences, relative, state_of, tolerance


class Counts:
    def __init__(self) -> None:
        self.number, self.shadow, self.inner = 1, {"weight": torch.zeros(2)}, [1]


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.register_buffer("buffer", torch.arange(3.0))
        self.extra = nn.Parameter(torch.ones(2))
        self.number, self.text, self.nothing = 1, "a", None
        self.hidden = torch.zeros(2)
        self.items: list[Any] = [1, torch.zeros(2), [2]]
        self.pairs = {"a": 1, "b": {"c": torch.zeros(2)}}
        self.ordered = collections.OrderedDict(a=1, b=2)
        self.counter = collections.Counter("aab")
        self.default: dict[str, list[int]] = collections.defaultdict(list, a=[1])
        self.recent = collections.deque([1, 2], maxlen=2)
        self.names = {"a", "b"}
        self.array = np.zeros(3)
        self.counts = Counts()
        self.generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(1)
        self.cached = torch.zeros(1).expand(4)
        with torch.inference_mode():
            self.seen_in_validation = torch.zeros(2)


def run_of(net: nn.Module, optimizer: Any = None, context: Any = None) -> Any:
    optimizer = optimizer or torch.optim.AdamW([*net.layer.parameters()], lr=0.1)  # type: ignore[union-attr]
    return SimpleNamespace(module=net, optimizer=optimizer, device=torch.device("cpu"), step_context=context)


def stepped(net: Net) -> Any:
    run = run_of(net)
    net.layer(torch.randn(4, 2)).square().sum().backward()
    run.optimizer.step()
    return run


def everything(net: Net, run: Any) -> Any:
    """What the attributes hold, as plain values."""

    def plain(value: Any, depth: int = 0) -> Any:
        if isinstance(value, Tensor):
            return ("tensor", value.tolist())
        if isinstance(value, np.ndarray):
            return ("array", value.tolist())
        if isinstance(value, dict):
            return (type(value).__name__, [(key, plain(part, depth + 1)) for key, part in value.items()])
        if isinstance(value, (list, tuple, collections.deque)):
            return (type(value).__name__, [plain(part, depth + 1) for part in value])
        if isinstance(value, set):
            return sorted(value)
        if isinstance(value, Counts):
            return plain(vars(value))
        return value

    skipped = ("_modules", "_trainer", "_run", "_metrics", "generator", "numpy_generator", "_saved_hyperparameters")
    names = [name for name in vars(net) if name not in skipped]
    gradients = [each.grad.tolist() if each.grad is not None else None for each in net.parameters()]
    return (
        {name: plain(vars(net)[name]) for name in names},
        plain(dict(net.state_dict())),
        plain([[*values.items()] for values in run.optimizer.state.values()]),
        gradients,
        random.getstate(),
        plain(torch.get_rng_state()),
        plain(np.random.get_state()[1]),
        plain(net.generator.get_state()),
        str(net.numpy_generator.bit_generator.state),
    )


def change_everything(net: Net, run: Any, batch: Any) -> None:
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers(), *state_of(run.optimizer)]:
            tensor.add_(1)
        net.layer[0].weight.grad.mul_(3)
    net.layer[0].bias.grad = None
    net.extra.grad = torch.ones(2)
    net.buffer = net.buffer * 2
    net.hidden.add_(1)
    net.hidden = torch.ones(5)
    net.number, net.text, net.nothing = 2, "b", 3  # type: ignore[assignment]
    net.new = "new"
    net.items[1].add_(1)
    net.items[2].append(3)
    net.items.insert(0, None)
    net.pairs["b"]["c"] += 1  # type: ignore[index]
    del net.pairs["a"]
    net.ordered.move_to_end("a")
    net.ordered["c"] = 3
    net.counter.update("abc")
    net.default["a"].append(2)
    net.default["b"].append(2)
    net.recent.append(3)
    net.names |= {"c"}
    net.array += 1
    net.counts.number = 2
    net.counts.shadow["weight"].add_(1)
    net.counts.inner.append(2)
    net.counts.other = 1  # type: ignore[attr-defined]
    torch.rand(3, generator=net.generator)
    net.numpy_generator.random(2)
    random.random()
    np.random.rand(2)
    torch.rand(2)
    batch["x"].mul_(2)
    batch["y"].append(2)
    batch.pop("z")


def test_everything_is_put_back() -> None:
    net, batch = Net(), {"x": torch.ones(2), "y": [1], "z": 3}
    run = stepped(net)
    before, buffer, hidden, weight = everything(net, run), net.buffer, net.hidden, net.layer[0].weight
    others = torch.zeros(2)
    snapshot = Snapshot(run, [others], batch)
    change_everything(net, run, batch)
    others.add_(1)
    changed = everything(net, run)
    assert all(
        one != other for one, other in zip(before, changed, strict=True)
    )  # nothing is tested that was not changed
    after = Snapshot(run, [others], batch)
    snapshot.put_back()
    assert everything(net, run) == before
    assert not hasattr(net, "new")
    assert net.buffer is buffer
    assert net.hidden is hidden
    assert net.layer[0].weight is weight
    assert net.layer[0].bias.grad is not None
    assert net.extra.grad is None
    assert batch["x"].tolist() == [1.0, 1.0]
    assert (batch["y"], batch["z"]) == ([1], 3)
    assert others.tolist() == [0.0, 0.0]
    assert net.default["new"] == []  # still one with a default
    assert net.recent.maxlen == 2
    del net.default["new"]
    after.put_back()
    assert everything(net, run) == changed
    assert batch["x"].tolist() == [2.0, 2.0]


def test_a_snapshot_leaves_alone_what_a_step_does_not_own() -> None:
    net = Net()
    net.dataset = torch.utils.data.TensorDataset(torch.zeros(2))
    net.long = [[0] for _ in range(2000)]
    net.loop: list[Any] = []  # type: ignore[misc]
    net.loop.append(net.loop)
    run = stepped(net)
    snapshot = Snapshot(run)
    assert not any(tensor is net.dataset.tensors[0] for tensor in snapshot.held)
    net.dataset.tensors[0].add_(1)
    net.long[0].append(1)
    net.long.append([1])
    snapshot.put_back()
    assert net.dataset.tensors[0].tolist() == [1.0, 1.0]
    assert len(net.long) == 2000
    assert net.long[0] == [0, 1]  # too long to be looked into


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        self.register_buffer("buffer", torch.tensor([3.0, 4.0]))
        self.held: Any = torch.tensor([3.0, 4.0])


def compared(change: Any, allowed: float = 1e-3, optimizer: Any = None) -> dict[str, float]:
    """A step that moves the weights by (0.3, 0.4), made twice, with ``change`` after the second."""
    net = Small()
    with torch.no_grad():
        net.layer.weight.copy_(torch.tensor([[1.0, 1.0]]))
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=1.0)
    run = run_of(net, optimizer)
    weight = net.layer.weight
    optimizer.state[weight] = {"step": torch.tensor(1.0), "momentum_buffer": torch.tensor([[3.0, 4.0]])}
    before = Snapshot(run)
    with torch.no_grad():
        weight += torch.tensor([[0.3, 0.4]])
        change(net, optimizer.state[weight])
    got = Snapshot(run)
    before.put_back()
    with torch.no_grad():
        weight += torch.tensor([[0.3, 0.4]])
    return differences(before, got, Snapshot(run, copied=False), run, allowed)


def test_differences() -> None:
    same = {"update": 0.0, "optimizer state": 0.0, "buffers": 0.0, "attributes": 0.0}
    assert compared(lambda net, state: None) == same

    def by(name: str, value: float) -> dict[str, Any]:
        return {**same, name: pytest.approx(value, rel=1e-4)}

    assert compared(lambda net, state: net.layer.weight.add_(torch.tensor([[0.05, 0.0]]))) == by("update", 0.05 / 0.5)
    assert compared(lambda net, state: net.buffer.add_(torch.tensor([0.0, 1.0]))) == by("buffers", 1 / 5)
    assert compared(lambda net, state: net.held.add_(torch.tensor([0.0, 1.0]))) == by("attributes", 1 / 5)
    assert compared(lambda net, state: state["step"].add_(1.0)) == by("optimizer state", 1 / math.sqrt(26))
    assert compared(lambda net, state: setattr(net, "held", torch.tensor([3.0, 5.0]))) == by("attributes", 1 / 5)
    assert compared(lambda net, state: setattr(net, "held", None))["attributes"] == math.inf
    assert compared(lambda net, state: setattr(net, "held", torch.ones(3)))["attributes"] == math.inf
    assert math.isnan(compared(lambda net, state: net.layer.weight.mul_(math.nan))["update"])
    assert compared(lambda net, state: net.buffer.mul_(math.inf))["buffers"] == math.inf
    assert compared(lambda net, state: torch.rand(1)) == {**same, "random numbers": math.inf}
    assert compared(lambda net, state: random.random()) == {**same, "random numbers": math.inf}


def test_an_update_by_noise_does_not_count() -> None:
    # the optimizer's mean gradient of the first element is a thousandth of the other's
    def spoiled(allowed: float) -> float:
        other = Small()
        with torch.no_grad():
            other.layer.weight.fill_(1.0)
        optimizer = torch.optim.Adam(other.parameters())
        run = run_of(other, optimizer)
        optimizer.state[other.layer.weight] = {"step": torch.tensor(1.0), "exp_avg": torch.tensor([[0.004, 4.0]])}
        before = Snapshot(run)
        with torch.no_grad():
            other.layer.weight += torch.tensor([[0.6, 0.4]])
        got = Snapshot(run)
        before.put_back()
        with torch.no_grad():
            other.layer.weight += torch.tensor([[0.3, 0.4]])
        return differences(before, got, Snapshot(run, copied=False), run, allowed)["update"]

    assert spoiled(1e-4) == pytest.approx(0.3 / 0.5)
    assert spoiled(1e-2) == 0.0


@pytest.mark.parametrize(
    ("value", "wanted", "ratio"),
    [
        (torch.tensor(2.0), torch.tensor(2.0), 0.0),
        (torch.tensor(0.5), torch.tensor(0.25), 0.25 / math.sqrt(1 + 0.0625)),
        (torch.tensor(110.0), torch.tensor(100.0), 10 / math.sqrt(1 + 1e4)),
        (torch.tensor(math.nan), torch.tensor(math.nan), 0.0),
        (torch.tensor(math.inf), torch.tensor(math.inf), 0.0),
        (torch.tensor(math.inf), torch.tensor(1.0), math.inf),
        (3, 3, 0.0),
        (3.0, 3, 0.0),
        (True, torch.tensor(True), 0.0),
        (4, 3, 1 / math.sqrt(1 + 9)),
        (torch.ones(2), torch.ones(3), math.inf),
        ("a", "b", 0.0),
        ("a", 1, math.inf),
    ],
)
def test_how_far_numbers_are_apart(value: Any, wanted: Any, ratio: float) -> None:
    assert relative(value, wanted) == pytest.approx(ratio)


def test_nan_is_not_near_a_number() -> None:
    assert not relative(torch.tensor(math.nan), torch.tensor(1.0)) <= 1


def test_tolerances_go_by_what_is_computed_in() -> None:
    assert tolerance(run_of(Small())) == 1e-3
    assert tolerance(run_of(Small().double())) == 1e-6
    assert tolerance(run_of(Small(), context=torch.autocast("cpu", torch.bfloat16))) == 5e-2
