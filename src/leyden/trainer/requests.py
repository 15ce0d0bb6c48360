"""What callbacks, modules and scripts may ask of a Trainer: saves, actions at a step boundary, talk among its processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor

from leyden import ranks
from leyden.agreement import Agreement
from leyden.checkpoint import state
from leyden.checkpoint.writer import Writer
from leyden.errors import LeydenError
from leyden.ranks import told_of_waiting
from leyden.strategy import find_place, gathered
from leyden.trainer.former import TrainerOfFormerDays

if TYPE_CHECKING:
    from leyden.trainer import Trainer

R = TypeVar("R")


class TrainerRequests(TrainerOfFormerDays):
    """The public verbs beside the four: abstract, and there so that those have a page of their own."""

    _ckpt_path: str | os.PathLike[str] | None
    _writer: Writer
    _requests: list[Callable[[], None]]

    def at_step_boundary(self, action: Callable[[], None]) -> None:
        """Call ``action`` once at the next safe place: between two steps, after the hooks that run now.

        Outside of training it is called at once. Several processes must ask alike; where one may ask alone, by a clock or a
        signal, see `shared_request`.
        """
        if self._run is not None and self._status.verb == "fit":
            self._run.requests.append(action)
        else:
            action()

    def shared_request(self, action: Callable[[], None]) -> Callable[[], None]:
        """Return what makes all processes call their ``action`` at the same step boundary, whichever of them asks.

        A callback calls this in its `setup` for `fit`, in every process.
        """
        self._requests.append(action)
        return partial(self._ask, len(self._requests) - 1)

    def _ask(self, index: int) -> None:
        if self._run is not None and self._run.agreement is not None and self._status.verb == "fit":
            self._run.agreement.ask(index)
        else:
            self.at_step_boundary(self._requests[index])

    def find_ranks(self) -> None:
        """Learn from the environment which process this is, in one that was made from another; for the launcher."""
        self.strategy.start_method = None
        self.strategy.settle(replace(self.layout, place=find_place()))

    def _find_checkpoint(self, ckpt_path: Any, verb: str, weights_only: bool = False) -> ranks.Found | None:
        found = ranks.find_checkpoint(
            self.strategy,
            self.lightning_module,
            ckpt_path if ckpt_path is not None else self._ckpt_path,
            self.checkpoint_callbacks,
            self._default_root_dir,
            verb,
            weights_only,
        )
        self._loaded_from = found[1] if found is not None else None
        return found

    def make_agreement(self) -> Agreement:
        """What the processes of a `fit` ask of each other; for the engine."""
        return Agreement(self.strategy, list(self._requests))

    def save_checkpoint(
        self,
        filepath: str | os.PathLike[str],
        weights_only: bool = False,
        wait: bool = True,
        then: Sequence[Callable[[], object]] = (),
    ) -> None:
        """Write the state of the run, atomically; folders are made. All processes must call this, and the first one writes.

        Args:
            filepath: where.
            weights_only: leave out optimizers, counters and everything else that only training needs.
            wait: return when the file is on the disk; else as soon as the state is copied, to be written in the background.
            then: called in order once the file is there, by the thread that wrote it.

        Raises:
            CheckpointError: naming the key of what cannot be stored.
        """
        module = self._module
        if module is None:
            raise LeydenError("save_checkpoint: this Trainer has not run a module yet.")
        trainer = cast("Trainer", self)
        with self.profiler.profile("save_checkpoint"), self.time_account.spent_on("checkpoints"):
            with told_of_waiting(self.strategy, "save_checkpoint"):
                captured = state.capture(
                    trainer, module, self._datamodule, self._active_callbacks, self._run, weights_only
                )
            if self.strategy.shards_state:
                self._save_shards(filepath, captured, then)
            elif self.is_global_zero and wait:
                self._writer.write(filepath, captured, then)
            elif self.is_global_zero:
                self._writer.submit(filepath, captured, then, self._raise_at_boundary)
            if wait or not self.strategy.in_step:  # else others would train on while the first one copies the weights
                self.strategy.barrier("save_checkpoint")

    def _save_shards(
        self, filepath: str | os.PathLike[str], captured: dict[str, Any], then: Sequence[Callable[[], object]]
    ) -> None:
        """Write a folder, to which each process adds what it has."""
        from leyden.checkpoint.sharded import save_sharded

        save_sharded(filepath, captured, self.strategy.host_group)
        for action in then if self.is_global_zero else ():
            action()

    def _raise_at_boundary(self) -> None:
        """Called by the thread in which a write has failed: let the loop raise it."""
        if self._run is not None:
            self._run.requests.append(self._writer.check)

    def _launch(self, verb: Callable[..., R], *args: Any) -> R:
        """Start the processes that are lacking, and run a verb in them."""
        from leyden.strategy.launch import launch  # torch's launcher is for those who have nobody else to start them

        return launch(cast("Trainer", self), verb, *args)

    # Talk among processes: all of them must call the same, in the same order

    def all_gather(self, data: Any, sync_grads: bool = False) -> Any:
        """Return the tensors of all processes, stacked in a new first dimension of ``world_size``.

        Args:
            data: a tensor, or dicts, lists and tuples of tensors; of one shape in all processes.
            sync_grads: whether gradients flow back to the process that a part came from.
        """
        return gathered(self.strategy, data, sync_grads)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object that process ``src`` passed in. It is pickled on the way."""
        return self.strategy.broadcast(obj, src)

    def reduce(self, tensor: Tensor, op: str = "mean") -> Tensor:
        """Return the "mean", "sum", "min" or "max" over all processes, element by element, in every process."""
        return self.strategy.reduce(tensor, op)

    def barrier(self, name: str | None = None) -> None:
        """Wait until every process is here."""
        self.strategy.barrier(name)
