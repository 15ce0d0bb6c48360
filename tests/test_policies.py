"""The parts of the policies for steps that go wrong: what counts as finite, what is backed up, what it costs."""

from __future__ import annotations

import copy
import math
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import leyden
from leyden.buffers import BufferBackup
from leyden.halving import _add_back, _joined
from leyden.policies import all_finite
from quiet import make_trainer

torch.set_num_threads(1)
PACKAGE = str(Path(leyden.__file__).parent)

FINITE = [
    torch.tensor([1e38, -1e38]),  # the sum of squares overflows
    torch.tensor([65504.0], dtype=torch.float16),
    torch.ones(3, dtype=torch.bfloat16),
    torch.ones(2, dtype=torch.float64) * 1e300,
    torch.ones(2, dtype=torch.complex64),
    torch.zeros(0),
    torch.tensor(2.0),
    torch.sparse_coo_tensor([[1, 1]], [1.0, 2.0], (4,), check_invariants=True),
]


def test_large_numbers_and_odd_tensors_are_finite() -> None:
    assert all_finite([])
    assert all_finite([torch.zeros(0)])
    for tensor in FINITE:
        assert all_finite([tensor]), tensor
    assert all_finite([tensor for tensor in FINITE if tensor.dtype != torch.float64])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", range(len(FINITE)))
def test_one_bad_element_anywhere_is_found(bad: float, index: int) -> None:
    if FINITE[index].numel() == 0:
        return
    tensors = [tensor.clone() for tensor in FINITE if tensor.dtype != torch.float64]
    broken = FINITE[index].clone()
    if broken.is_sparse:
        broken = torch.sparse_coo_tensor([[1, 2]], [1.0, bad], (4,), check_invariants=True)
    else:
        broken.view(-1)[-1] = bad
    assert not all_finite([*tensors, broken])
    assert not all_finite([broken, *tensors])


def test_doubles_beyond_single_precision_are_finite_beside_others() -> None:
    assert all_finite([torch.ones(2), torch.ones(2, dtype=torch.float64) * 1e300])


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.tensor([True, False]), persistent=False)
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("absent", None)
        self.register_buffer("same", self.mask)
        self.register_buffer("strange", torch.zeros(3, 4).t())


def test_buffers_come_back_whatever_was_done_to_them() -> None:
    module = Holder()
    backup = BufferBackup(module)
    for round_ in range(3):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        tensors = {name: id(buffer) for name, buffer in module.named_buffers()}
        backup.save()
        module.norm(torch.randn(4, 2) + round_)
        module.mask.logical_not_()
        module.center = module.center + 1  # in the place of the old one
        module.absent = torch.ones(2)
        module.strange += 1
        backup.put_back()
        backup.put_back()
        assert module.absent is None
        after = dict(module.named_buffers())
        assert after.keys() == before.keys()
        for name, buffer in after.items():
            assert torch.equal(buffer, before[name]), name
            assert id(buffer) == tensors[name], name
        module.norm(torch.randn(4, 2))
        module.center = torch.full((round_ + 1,), 7.0)  # another shape from now on


def test_a_module_without_buffers_has_nothing_to_back_up() -> None:
    backup = BufferBackup(nn.Linear(1, 1))
    backup.save()
    backup.put_back()


def test_gradients_that_were_set_aside_are_added_as_backward_would() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2), nn.Linear(2, 1))
    net[2].bias.requires_grad_(False)
    other = copy.deepcopy(net)
    batches = [torch.tensor([1, 2, 2]), torch.tensor([2, 4])]
    for batch in batches:
        other(batch).sum().backward()
    net(batches[0]).sum().backward()
    earlier = [(parameter, parameter.grad) for parameter in net.parameters() if parameter.grad is not None]
    for parameter, _ in earlier:
        parameter.grad = None
    net(batches[1]).sum().backward()
    net[1].bias.grad, given = None, net[1].bias.grad  # one that this batch did not reach
    _add_back(earlier)
    net[1].bias.grad = net[1].bias.grad + given
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        else:
            assert torch.equal(ours.grad.to_dense(), theirs.grad.to_dense())


def test_outputs_of_parts_are_put_together() -> None:
    parts = [
        ({"loss": torch.tensor(1.0), "x": torch.zeros(3, 2), "n": 3, "table": torch.zeros(9)}, 3),
        ({"loss": torch.tensor(5.0), "x": torch.ones(1, 2), "n": 1, "table": torch.ones(9)}, 1),
    ]
    joined = _joined(parts)
    assert joined["loss"].item() == 2.0
    assert joined["x"].shape == (4, 2)
    assert joined["n"] == 1
    assert torch.equal(joined["table"], torch.ones(9))
    assert _joined([(None, 3), (None, 1)]) is None
    assert _joined([parts[0], (None, 1)])["loss"].item() == 1.0


class Reads(TorchDispatchMode):
    """Counts how often a number is brought to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Model(leyden.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.frames: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.frames.append(sum(frame.filename.startswith(PACKAGE) for frame in traceback.extract_stack()))
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("options", "reads", "frames"),
    [
        ({}, 0, 3),
        ({"nan_policy": "raise"}, 1, 3),
        ({"nan_policy": "skip"}, 1, 3),
        ({"oom_policy": "halve"}, 0, 5),
        ({"nan_policy": "skip", "oom_policy": "halve"}, 1, 5),
    ],
)
def test_what_a_policy_costs(options: dict[str, str], reads: int, frames: int, accumulate: int, tmp_path: Path) -> None:
    model = Model()
    trainer = make_trainer(tmp_path, accumulate_grad_batches=accumulate, **options)
    with Reads() as counted:
        trainer.fit(model, DataLoader(torch.randn(48, 2), batch_size=4))  # type: ignore[arg-type]
    steps = trainer.global_step
    assert steps == 12 // accumulate
    assert counted.count == reads * steps
    assert set(model.frames) == {frames}


def test_explain_names_the_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, nan_policy="skip", oom_policy="halve").explain(Model())
    shown = capsys.readouterr().out
    assert "nan_policy='skip'" in shown
    assert "oom_policy='halve'" in shown
    assert "are losses and gradients finite? If not, skip the step" in shown
    make_trainer(tmp_path).explain(Model())
    shown = capsys.readouterr().out
    assert "_policy" not in shown
    assert "finite" not in shown
