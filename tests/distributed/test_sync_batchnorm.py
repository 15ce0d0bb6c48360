"""BatchNorm over all ranks: what one process computes that has the samples of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # before ranks are forked, so that each need not
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.settings import Settings
from leyden.strategy import DDPStrategy, FSDPStrategy
from leyden.strategy.sync_batchnorm import HostSyncBatchNorm, synchronise_batchnorm
from quiet import Memory, make_trainer
from ranks import run_ranks, run_trainers

CPU = torch.device("cpu")
KINDS: list[tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = [
    (nn.BatchNorm1d, (7, 3), {}),
    (nn.BatchNorm1d, (7, 3, 2), {"momentum": None}),
    (nn.BatchNorm2d, (7, 3, 2, 2), {"eps": 0.1}),
    (nn.BatchNorm3d, (7, 3, 2, 2, 2), {"affine": False}),
    (nn.BatchNorm2d, (7, 3, 2, 2), {"track_running_stats": False}),
]


def layer_of(kind: type[nn.Module], options: dict[str, Any]) -> Any:
    layer: Any = kind(3, **options).double()
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.5, 2.0]))
            layer.bias.copy_(torch.tensor([0.1, 0.0, -1.0]))
    return layer


def values(shape: tuple[int, ...]) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 0.1 * drawn + 1e5  # the difference of mean square and squared mean would be lost


def lists(tensors: Any) -> list[Any]:
    return [None if each is None else each.detach().double().tolist() for each in tensors]


def outcome(layer: Any, x: Tensor) -> list[Any]:
    """Two training passes and one in eval mode: outputs, gradients, statistics."""
    found: list[Any] = []
    for _ in range(2):
        x = x.detach().requires_grad_(True)
        y = layer(x)
        (y * y.detach().cos()).sum().backward()
        found += [y, x.grad]
    layer.eval()
    found.append(layer(x))
    found += [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    found += [parameter.grad for parameter in layer.parameters()]
    return lists(found)


def on_ranks(rank: int, cuts: list[int]) -> list[Any]:
    results = []
    for kind, shape, options in KINDS:
        holder = nn.Sequential(layer_of(kind, options))
        synchronise_batchnorm(holder, Settings(sync_batchnorm=True), len(cuts), CPU)
        assert type(holder[0]) is HostSyncBatchNorm
        results.append(outcome(holder[0], values(shape).split(cuts)[rank]))
    return results


@pytest.mark.parametrize("cuts", [[3, 4], [5, 1, 1]])
def test_equals_one_process_with_all_samples(cuts: list[int]) -> None:
    ranks = run_ranks(on_ranks, len(cuts), cuts)
    for number, (kind, shape, options) in enumerate(KINDS):
        one, many = outcome(layer_of(kind, options), values(shape)), [each[number] for each in ranks]
        for place, there in enumerate(one):
            parts = [each[place] for each in many]
            if there is None or place == 7:
                assert all(part == there for part in parts)
                continue
            expected = torch.tensor(there, dtype=torch.float64)
            if place == 4 and options.get("track_running_stats") is False:
                continue  # in eval mode each rank has the statistics of its own batch, as torch's layer has
            if place < 5:
                here = torch.cat([torch.tensor(part, dtype=torch.float64) for part in parts])
            elif place < 7:
                assert all(part == parts[0] for part in parts)
                here = torch.tensor(parts[0], dtype=torch.float64)
            else:
                here = torch.stack([torch.tensor(part, dtype=torch.float64) for part in parts]).sum(0)
            torch.testing.assert_close(here, expected, rtol=1e-6, atol=1e-6)


def test_state_dict_and_parameters_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ModuleDict({"inner": nn.BatchNorm1d(3)}))
    keys, weight = list(net.state_dict()), net[1].weight
    settings = Settings(sync_batchnorm=True)
    synchronise_batchnorm(net, settings, 2, CPU)
    first = net[1]
    synchronise_batchnorm(net, settings, 2, CPU)  # for the next verb
    assert net[1] is first
    assert list(net.state_dict()) == keys
    assert net[1].weight is weight
    assert ("sync_batchnorm=True", "2 BatchNorm layers count the samples of 2 ranks") in settings.reasons


def test_one_process_has_nothing_to_do(tmp_path: Path) -> None:
    module = Normed()
    trainer = make_trainer(tmp_path, sync_batchnorm=True)
    trainer.fit(module, DataLoader(data(), 12))
    assert type(module.net[1]) is nn.BatchNorm1d
    assert "nothing to do: one process" in trainer.explain(module)


def data() -> TensorDataset:
    x = torch.randn(43, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


class Normed(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(rank: int, ranks: int, name: str) -> tuple[list[float], dict[str, list[Any]]]:
    L.seed_everything(2, verbose=False)
    strategy: Any = {"ddp": DDPStrategy, "fsdp": lambda: FSDPStrategy(wrap_policy={nn.Linear}), "one": lambda: "auto"}[
        name
    ]()
    module, memory = Normed(), Memory()
    trainer = make_trainer(
        Path(), logger=memory, strategy=strategy, sync_batchnorm=True, max_epochs=2, log_every_n_steps=1
    )
    trainer.fit(module, DataLoader(data(), 12 // ranks, shuffle=True))
    state = {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).double().flatten().tolist()
        for name, each in module.state_dict().items()
    }
    return memory.of("loss"), state


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_training_equals_one_process(strategy: str) -> None:
    losses, state = fitted(0, 1, "one")
    for rank, (theirs, weights) in enumerate(run_trainers(fitted, 3, 3, strategy)):
        if rank == 0:
            assert theirs == pytest.approx(losses, rel=1e-4)
        assert weights.keys() == state.keys()
        for name, value in state.items():
            assert weights[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
