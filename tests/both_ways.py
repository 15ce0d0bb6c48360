"""The same training made twice, in eager and with ``compile=True``, and how far the two are apart."""

from __future__ import annotations

import logging
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.compiled.backend import Compiler
from quiet import Memory, make_trainer

CAN_TRACE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
needs_tracing = pytest.mark.skipif(not CAN_TRACE, reason="torch before 2.13 cannot trace a backward pass")
needs_cpp = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler was found for torch's compiler"
)

SEED = 7

logging.getLogger("torch.__trace").propagate = False  # thousands of lines, which pytest would keep


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `run_as_traced`."""
    run_as_traced(monkeypatch)


def run_as_traced(patch: pytest.MonkeyPatch) -> None:
    """Let graphs be run as they were traced, operation by operation: nothing is compiled to machine code."""
    from torch._dynamo.backends.debugging import aot_eager

    def backend(self: Compiler, graph: Any, inputs: list[Any]) -> Any:
        compiled = aot_eager(graph, inputs)
        self.graphs += 1
        return compiled

    patch.setattr(Compiler, "backend", backend)


class Batches:
    """A loader of the batches that it is given."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def batches(count: int = 5, size: int = 4, last: int = 2, seed: int = 0) -> DataLoader[Any]:
    """``count`` batches of 6 numbers and their sum; the last of another size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count - 1) * size + last, 6, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=size)


def same_size(count: int = 5) -> DataLoader[Any]:
    return batches(count, last=4)


class Net(L.LightningModule):
    """A small network; what is to be special about it is given, or overridden."""

    def __init__(
        self,
        optimizer: Callable[[Net], Any] = lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2),
        *layers: nn.Module,
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(*(layers or (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))))
        for name, parameter in self.net.named_parameters():
            if "bias" not in name and parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.5)
        self.optimizer = optimizer

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)


@dataclass
class Ran:
    """A fit that is over."""

    module: Any
    trainer: L.Trainer
    rows: list[tuple[int | None, dict[str, float]]]
    warned: list[str]
    callbacks: tuple[L.Callback, ...]

    @property
    def compiled(self) -> Any:
        assert self.trainer._run is not None
        return self.trainer._run.compiled

    @property
    def line(self) -> str:
        return ": ".join(self.compiled.line())

    @property
    def whole(self) -> bool:
        """Whether whole steps were compiled, to the end."""
        return self.compiled.what == "the whole step" and self.compiled.compilations > 0

    @property
    def optimizer_state(self) -> Any:
        assert self.trainer._run is not None
        return [handle.optimizer.state_dict() for handle in self.trainer._run.handles]

    def of(self, name: str) -> list[float]:
        return [row[name] for _, row in self.rows if name in row]


def fit(
    folder: Path,
    module: Any,
    loader: Any,
    *callbacks: L.Callback,
    compile: bool | str = True,
    ckpt_path: Any = None,
    **options: Any,
) -> Ran:
    memory = Memory()
    options = {"logger": memory, "log_every_n_steps": 1, "max_epochs": 4, **options}
    trainer = make_trainer(folder, *callbacks, compile=compile, **options)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    assert all(issubclass(each.category, UserWarning) for each in caught), [str(each.message) for each in caught]
    return Ran(module, trainer, memory.rows, [str(each.message) for each in caught], callbacks)


def both(
    folder: Path,
    make: Callable[[], Any],
    loader: Callable[[], Any] = batches,
    callbacks: Callable[[], Sequence[L.Callback]] = tuple,
    tolerance: float = 1e-4,
    **options: Any,
) -> tuple[Ran, Ran]:
    """Train in eager and compiled; assert that all that came out is the same within ``tolerance``."""
    torch.manual_seed(SEED)
    eager = fit(folder, make(), loader(), *callbacks(), compile=False, **options)
    after = _random_state()
    torch.manual_seed(SEED)
    ran = fit(folder, make(), loader(), *callbacks(), compile=True, **options)
    assert len(eager.rows) > 10  # else there is little to compare
    assert_same(ran, eager, tolerance)
    assert _random_state() == after, "other random numbers were drawn"
    return ran, eager


def assert_same(ran: Ran, eager: Ran, tolerance: float) -> None:
    """Weights, buffers, optimizer state, learning rates, logged values, counters and loss scale."""
    apart = dict(_differences("weights", ran.module.state_dict(), eager.module.state_dict()))
    apart.update(_differences("optimizer", ran.optimizer_state, eager.optimizer_state))
    apart.update(_differences("logged", ran.rows, eager.rows))
    assert ran.trainer._run is not None
    assert eager.trainer._run is not None
    apart.update(
        _differences("progress", ran.trainer._run.progress.state_dict(), eager.trainer._run.progress.state_dict()),
    )
    if eager.trainer._run.scaler is not None:
        scalers = [each.trainer._run.scaler.scaler.state_dict() for each in (ran, eager)]
        apart.update(_differences("scaler", *scalers))
    wrong = {name: value for name, value in apart.items() if not value <= tolerance}
    assert not wrong, f"{wrong}; {ran.line}"


def _differences(name: str, value: Any, wanted: Any) -> Iterator[tuple[str, float]]:
    """The relative difference of each number or tensor in two nested values."""
    if isinstance(wanted, Tensor) and isinstance(value, Tensor) and value.shape == wanted.shape:
        gap = (value.detach().double() - wanted.detach().double()).norm()
        yield name, float(gap / max(1e-2, float(wanted.detach().double().norm())))
    elif isinstance(wanted, dict) and isinstance(value, dict):
        yield f"{name} keys", float(list(value) != list(wanted))
        for key in wanted.keys() & value.keys():
            yield from _differences(f"{name}.{key}", value[key], wanted[key])
    elif isinstance(wanted, (list, tuple)) and isinstance(value, (list, tuple)):
        yield f"{name} length", float(len(value) != len(wanted))
        for index, (one, other) in enumerate(zip(value, wanted, strict=False)):
            yield from _differences(f"{name}[{index}]", one, other)
    elif isinstance(wanted, float) and isinstance(value, float):
        yield name, abs(value - wanted) / max(1.0, abs(wanted))
    else:
        yield name, float(value is not wanted and value != wanted)


def _random_state() -> list[Any]:
    return [random.getstate(), [*np.random.get_state()[1]], torch.get_rng_state().tolist()]


def codes(ran: Ran) -> list[str]:
    """The codes of leyden's warnings."""
    return re.findall(r"\[LEY-([\w-]+)\]", " ".join(ran.warned))
