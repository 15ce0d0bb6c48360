"""Tensor parallel and 2-D: ranks that compute parts of one sample train like one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # before ranks are forked, so that each need not
import torch.distributed.tensor.parallel
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.errors import ConfigurationError, RankError
from leyden.shards import is_sharded
from leyden.strategy import ModelParallelStrategy
from leyden.strategy.base import Layout
from quiet import Memory, make_trainer
from ranks import run_trainers

GLOBAL_BATCH = 12


def data(samples: int) -> TensorDataset:
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


class Net(L.LightningModule):
    """An MLP that is divided, and layers and a parameter that are not."""

    def __init__(self, meta: bool, two_d: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.meta, self.two_d, self.dropout = meta, two_d, dropout
        self.scale = nn.Parameter(torch.ones(1))
        self.net: Any = None
        self.drawn: list[float] = []
        if not meta:
            self.build()

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Dropout(self.dropout), nn.Linear(8, 1)
        )

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if self.net is None:
            with torch.device("meta" if mesh is not None else "cpu"):
                self.build()
        if mesh is None or is_sharded(self.net[0].weight):
            return
        parallelize_module(self.net, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if self.two_d:
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(self.net(batch[0]) * self.scale, batch[1])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = self.loss(batch)
        self.drawn.append(float(torch.rand(1)))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", self.loss(batch))
        self.log("samples", float(len(batch[0])), reduce_fx="sum")

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.02)


def fitted(rank: int, sizes: tuple[int, int] | None, cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Any]:
    results = []
    for options, arguments in cases:
        L.seed_everything(3 + 10 * rank, verbose=False)  # ranks begin with the weights and numbers of rank 0
        memory, module = Memory(), Net(**options)
        strategy: Any = "auto"
        if sizes is not None:
            strategy = ModelParallelStrategy(data_parallel_size=sizes[0], tensor_parallel_size=sizes[1])
        trainer = make_trainer(
            Path(),
            logger=memory,
            strategy=strategy,
            max_epochs=2,
            log_every_n_steps=1,
            num_sanity_val_steps=1,
            **arguments,
        )
        size = GLOBAL_BATCH // (sizes[0] if sizes is not None else 1)
        trainer.fit(module, DataLoader(data(43), size, shuffle=True), DataLoader(data(31), size))
        tested = trainer.validate(module, DataLoader(data(13), size))
        results.append(
            {
                "loss": memory.of("loss"),
                "val_loss": memory.of("val_loss"),
                "samples": tested[0]["samples"],
                "weights": {
                    name: (each.full_tensor() if is_sharded(each) else each).detach().double().flatten().tolist()
                    for name, each in module.state_dict().items()
                },
                "held": sum((each.to_local() if is_sharded(each) else each).numel() for each in module.parameters()),
                "drawn": module.drawn,
                "data_rank": (trainer.strategy.data_rank, trainer.strategy.data_world_size),
            }
        )
    return results


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"meta": False, "two_d": False}, {}),
    ({"meta": True, "two_d": True}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
    ({"meta": False, "two_d": True}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    ({"meta": True, "two_d": False}, {"nan_policy": "raise"}),
]


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2), (2, 1), (1, 3)])
def test_equals_one_process(sizes: tuple[int, int]) -> None:
    data_ranks, tensor_ranks = sizes
    cases = CASES if data_ranks > 1 else [case for case in CASES if not case[0]["two_d"]]
    many, ones = run_trainers(fitted, data_ranks * tensor_ranks, sizes, cases), fitted(0, None, cases)
    for number, one in enumerate(ones):
        results = [each[number] for each in many]
        for name in ("loss", "val_loss"):
            assert results[0][name] == pytest.approx(one[name], rel=1e-5, abs=1e-6)
        for rank, result in enumerate(results):
            assert result["data_rank"] == (rank // tensor_ranks, data_ranks)
            assert result["samples"] == one["samples"] == 13  # counted once, whoever computed them
            for name, values in one["weights"].items():
                assert result["weights"][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
            # random numbers are those of the group's first rank, and of the whole run's first one of one process
            assert result["drawn"] == results[rank // tensor_ranks * tensor_ranks]["drawn"]
        assert results[0]["drawn"] == one["drawn"]
        if data_ranks > 1:
            assert results[0]["drawn"] != results[-1]["drawn"]
            assert max(result["held"] for result in results) < 0.75 * sum(map(len, one["weights"].values()))


def test_sizes_are_found() -> None:
    def sizes(ranks: int, **options: Any) -> tuple[int, int]:
        strategy = ModelParallelStrategy(**options)
        strategy.settle(Layout((torch.device("cpu"),) * ranks))
        return strategy.data_world_size, strategy.world_size // strategy.data_world_size

    assert sizes(4) == (1, 4)
    assert sizes(4, data_parallel_size=2) == (2, 2)
    assert sizes(4, tensor_parallel_size=1) == (4, 1)
    with pytest.raises(ConfigurationError, match="data_parallel_size=2 x tensor_parallel_size=3 is 6 ranks"):
        sizes(4, data_parallel_size=2, tensor_parallel_size=3)
    with pytest.raises(ConfigurationError, match="tensor_parallel_size=0"):
        ModelParallelStrategy(tensor_parallel_size=0)


class Undivided(Net):
    def configure_model(self) -> None:
        pass


def refused(rank: int) -> list[str]:
    messages = []
    for module, options in ((Undivided(False, False), {}), (Net(False, False), {"precision": "16-mixed"})):
        trainer = make_trainer(Path(), strategy=ModelParallelStrategy(), limit_val_batches=0, **options)  # type: ignore[arg-type]
        with pytest.raises((ConfigurationError, RankError)) as caught:
            trainer.fit(module, DataLoader(data(12), 6))
        messages.append(str(caught.value))
        break
    return messages


def test_a_module_that_nobody_divided_is_refused() -> None:
    assert "no parameter of Undivided is divided" in run_trainers(refused, 2)[0][0]


def resumed(rank: int, sizes: tuple[int, int] | None, folder: Path, epochs: int, ckpt_path: Any) -> Any:
    L.seed_everything(3, verbose=False)
    memory, module = Memory(), Net(False, False)
    strategy: Any = "auto"
    if sizes is not None:
        strategy = ModelParallelStrategy(data_parallel_size=sizes[0], tensor_parallel_size=sizes[1])
    trainer = make_trainer(folder, logger=memory, strategy=strategy, max_epochs=epochs, log_every_n_steps=1)
    size = GLOBAL_BATCH // (sizes[0] if sizes is not None else 1)
    trainer.fit(module, DataLoader(data(43), size, shuffle=True), DataLoader(data(31), size), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return memory.of("loss")


@pytest.mark.parametrize("sizes", [(2, 2), (1, 2), None])
def test_resume_on_other_meshes(sizes: tuple[int, int] | None, tmp_path: Path) -> None:
    def run(sizes: tuple[int, int] | None, *arguments: Any) -> Any:
        if sizes is None:
            return resumed(0, None, *arguments)
        return run_trainers(resumed, sizes[0] * sizes[1], sizes, *arguments)[0]

    losses = run(None, tmp_path / "whole", 4, None)
    run(sizes, tmp_path, 2, None)
    for others in ((2, 2), (1, 2), None):
        assert run(others, tmp_path / "rest", 4, tmp_path / "2.ckpt") == pytest.approx(losses[8:], rel=1e-4), others
