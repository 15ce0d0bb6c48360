"""leyden: deep-learning training for PyTorch. You write the research code, the engine does the rest."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leyden.callbacks.callback import Callback as Callback
    from leyden.checkpoint.format import load_checkpoint as load_checkpoint
    from leyden.datamodule import LightningDataModule as LightningDataModule
    from leyden.module import LightningModule as LightningModule
    from leyden.planner import plan_memory as plan_memory
    from leyden.seed import seed_everything as seed_everything
    from leyden.trainer import Trainer as Trainer

__version__ = "0.1.0"

_PLACES = {
    "Callback": "leyden.callbacks.callback",
    "LightningDataModule": "leyden.datamodule",
    "LightningModule": "leyden.module",
    "Trainer": "leyden.trainer",
    "load_checkpoint": "leyden.checkpoint.format",
    "plan_memory": "leyden.planner",
    "seed_everything": "leyden.seed",
}
_SUBMODULES = (
    "accelerators",
    "callbacks",
    "core",
    "data",
    "demos",
    "loggers",
    "plugins",
    "profilers",
    "strategies",
    "trainer",
    "utilities",
)
_FORMER = {"data_loader": "leyden.compat.decorators"}  # not in dir(): for programs that have it, not for new ones
_FORMER_RESULT = "log with self.log(name, value), and return the loss"
_ABSENT = {
    "TrainResult": _FORMER_RESULT,
    "EvalResult": _FORMER_RESULT,
    "metrics": "they are a package of their own: import torchmetrics",
}
_LATER = dict.fromkeys(("cli", "tuner", "Fabric"), "it is not there yet")

__all__ = [
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "__version__",
    "load_checkpoint",
    "plan_memory",
    "seed_everything",
]


def __getattr__(name: str) -> Any:
    # Names are imported when they are first used, so that `import leyden` costs nothing beyond torch.
    if name in _PLACES or name in _FORMER:
        value = getattr(importlib.import_module(_PLACES.get(name) or _FORMER[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"leyden.{name}")
    elif name in _ABSENT:
        importlib.import_module("leyden.errors").no_such_name(__name__, name, _ABSENT)
    else:
        why = f": {_LATER[name]}" if name in _LATER else ""
        raise AttributeError(f"module 'leyden' has no attribute {name!r}{why}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES, *_SUBMODULES})
