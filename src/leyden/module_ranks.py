"""How a LightningModule talks to its copies in the other processes of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from leyden.module_hooks import ModuleHooks
from leyden.strategy import gathered

if TYPE_CHECKING:
    from leyden.trainer import Trainer


class ModuleRanks(ModuleHooks):
    """The part of `LightningModule` that talks: abstract, and there only so that the steps have a page of their own.

    All processes must call the same, in the same order. With one process, nothing is sent.
    """

    if TYPE_CHECKING:  # TorchScript would want to compile this type
        _trainer: Trainer | None

        @property
        def trainer(self) -> Trainer: ...  # noqa: D102 in LightningModule

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once, from the first process only."""
        if self._trainer is None or self._trainer.is_global_zero:
            print(*args, **kwargs)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return the tensors of all processes, stacked in a new first dimension of ``world_size``.

        Args:
            data: a tensor, or dicts, lists and tuples of tensors; of one shape in all processes.
            group: accepted for compatibility.
            sync_grads: whether gradients flow back to the process that a part came from, as contrastive losses want it.
        """
        return gathered(self.trainer.strategy, data, sync_grads)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object that process ``src`` passed in. It is pickled on the way."""
        return self.trainer.strategy.broadcast(obj, src)

    def reduce(self, tensor: Tensor, op: str = "mean") -> Tensor:
        """Return the "mean", "sum", "min" or "max" over all processes, element by element, in every process."""
        return self.trainer.strategy.reduce(tensor, op)

    def barrier(self, name: str | None = None) -> None:
        """Wait until every process is here."""
        self.trainer.strategy.barrier(name)
