"""What comes back from a verb that ran in new processes: rank 0's weights, counters, values, callbacks and result.

The parent goes on with them as if the verb had run here: `trainer.test` after `trainer.fit`, the best checkpoint's path, the
module's weights, the random numbers that are drawn next. Optimizers stay behind, and so does what hooks have put into plain
attributes; `fit(ckpt_path=…)` brings optimizers where they are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from leyden.errors import warn
from leyden.seed import capture_random_state, restore_random_state
from leyden.strategy.carry import packed, unpacked

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer


def outcome(trainer: Trainer, result: Any) -> dict[str, Any] | None:
    """In a rank: what the parent is to have of it; None but on rank 0.

    Tensors are bytes in it: as tensors, a queue would send each as an open file, of which a process may have some hundreds.
    """
    state = {name: _whole(value) for name, value in trainer.strategy.module_state(trainer.lightning_module).items()}
    if not trainer.is_global_zero:
        return None
    found = {
        "result": result,
        "state_dict": state,
        "progress": trainer._outlet.progress.state_dict(),
        "metrics": trainer._outlet.metrics.state_dict(),
        "callbacks": [callback.state_dict() for callback in trainer._active_callbacks],
        "random_state": capture_random_state(),
        "state": [str(trainer.state.fn), str(trainer.state.status)],
    }
    brought: dict[str, Any] = packed(found, as_bytes=True)
    return brought


def take_over(trainer: Trainer, brought: dict[str, Any], named: Mapping[str, Any]) -> Any:
    """In the parent: go on from what rank 0 has left; return the verb's result.

    Args:
        trainer: the parent's.
        brought: what `outcome` returned on rank 0.
        named: the arguments of the verb.
    """
    found = unpacked(brought, torch.device("cpu"))
    module: LightningModule = named.get("model") or trainer.lightning_module
    datamodule = named.get("datamodule")
    for name, value in named.items():
        if name != "model" and hasattr(
            value, "prepare_data"
        ):  # a datamodule in the place of loaders, as people write it
            datamodule = value
    trainer._module, trainer._datamodule = module, datamodule or trainer._datamodule
    trainer._resolve(module, trainer._datamodule)
    _load(module, found["state_dict"], trainer)
    trainer._outlet.progress.load_state_dict(found["progress"])
    trainer._outlet.metrics.load_state_dict(found["metrics"])
    for callback, state in zip(trainer._active_callbacks, found["callbacks"], strict=True):
        if state:
            callback.load_state_dict(state)
    restore_random_state(found["random_state"])
    trainer._undress()
    trainer.state.take_over(*found["state"])
    return found["result"]


def _whole(value: Any) -> Any:
    """A tensor of which each rank holds a part, put together: a collective."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _load(module: LightningModule, state: dict[str, Any], trainer: Trainer) -> None:
    if set(state) != set(module.state_dict()):
        module.configure_model()  # the layers that were made in the ranks only
    trainer._settings.precision.convert_module(module)
    there, here = set(state), set(module.state_dict())
    if there != here:
        names = ", ".join(sorted(there ^ here)[:5])
        warn(
            "weights-left-in-ranks",
            f"The module has other weights in the ranks than here ({names}), so only those that are on both sides came back. "
            "Make layers in __init__ or configure_model, or load the checkpoint.",
        )
    nn.Module.load_state_dict(module, state, strict=False)
