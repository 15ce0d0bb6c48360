"""The training step of 2020 where it is called several times for one batch: for each optimizer, and for each part of a sequence.

It is run by the loop as one step that steps its optimizers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from leyden.compat.calls import arguments_of, names_of
from leyden.loop import rescale_gradients
from leyden.optimizers import LightningOptimizer, needs_closure
from leyden.precision import has_gradients
from leyden.run import loss_of

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.run import Run

_NOTHING = object()
_SINCE_0_8 = ("optimizer_closure", "on_tpu", "using_native_amp", "using_lbfgs")


class Turns:
    """Lets the optimizers of a run take turns on each batch.

    In its turn an optimizer has its own loss: `training_step` is called with its index, only its parameters require
    gradients, and it steps at once, so that the next one sees what it has done. With ``accumulate_grad_batches`` it steps on the
    last batch of the window. Sequences are cut along dimension 1 into parts of ``bptt_steps``, with the hidden state that the
    part before has returned; each part is a turn of each optimizer.

    Args:
        module: the user's.
        training_step: its step: ``(batch, batch_idx, optimizer_idx, hiddens)``, of which it takes what it needs.
        optimizer_step: the module's own of former days, or None.
        zero_grad: the module's own `optimizer_zero_grad`, or None.
        frequencies: how many steps in a row belong to each optimizer; empty if each has its turn in every one.
        bptt_steps: the length of a part; None leaves batches whole.
        split: cuts a batch into parts.
    """

    def __init__(
        self,
        module: LightningModule,
        training_step: Callable[..., Any],
        optimizer_step: Callable[..., Any] | None,
        zero_grad: Callable[..., Any] | None,
        frequencies: Sequence[int],
        bptt_steps: int | None,
        split: Callable[[Any, int], Sequence[Any]],
    ) -> None:
        self._module, self._training_step = module, training_step
        self._own_step, self._own_zero_grad = optimizer_step, zero_grad
        self._frequencies, self._bptt_steps, self._split = frequencies, bptt_steps, split
        # From 0.8 on gradients of a batch that an override skipped were gone; in 0.7 they piled up.
        self._zeroes_first = optimizer_step is not None and not {*names_of(optimizer_step)}.isdisjoint(_SINCE_0_8)
        self.optimizer: Optimizer | None = None
        self.index = 0
        self._hiddens: Any = None
        self._begun = self._skipped_one = False
        self._skipped: dict[int, int] = {}

    def step(self, batch: Any, batch_idx: int) -> Any:
        """Train on one batch; return what the last turn returned."""
        run, progress = self._module._running(), self._module._running().progress
        if not self._begun:  # what an earlier training left
            self._begun = True
            for handle in run.handles:
                handle.optimizer.zero_grad()
        first, last = progress.micro_batch == 0, progress.micro_batch + 1 >= run.window
        self._hiddens, output = None, None
        parts = [batch] if self._bptt_steps is None else self._split(batch, self._bptt_steps)
        for number, part in enumerate(parts):
            begins = first or (last and number > 0)
            for index in self._whose_turn(progress.global_step, len(run.handles)):
                output = self._turn(run, index, part, batch_idx, begins, last)
        progress.micro_batch = 0 if last else progress.micro_batch + 1
        progress.skipped_batches += self._skipped_one
        self._skipped_one = False
        return output

    def _whose_turn(self, step: int, count: int) -> Iterator[int]:
        if not self._frequencies:
            yield from range(count)
            return
        place = step % sum(self._frequencies)
        for index, frequency in enumerate(self._frequencies):
            if place < frequency:
                yield index
                return
            place -= frequency

    def _turn(self, run: Run, index: int, part: Any, batch_idx: int, begins: bool, last: bool) -> Any:
        handle, output, hiddens = run.handles[index], None, self._hiddens
        self.index, self.optimizer = index, handle.optimizer

        def compute() -> Tensor | None:
            nonlocal output
            output = self._training_step(part, batch_idx, index, hiddens)
            loss = loss_of(output)
            if loss is None:
                run.refuse_lone_skip()
                self._skipped[index] = self._skipped.get(index, 0) + 1
                self._skipped_one = True
            else:
                run.manual_backward(loss / run.window if run.window > 1 else loss)
            return None if loss is None else loss.detach()

        if begins:
            self._skipped[index] = 0
        with handle.toggle_model():
            if begins and self._zeroes_first:
                self._zero_grad(run, handle, batch_idx)
            loss = compute()
            if isinstance(output, dict) and "hiddens" in output:
                self._hiddens = _detached(output["hiddens"])
            trained = run.window - self._skipped.get(index, 0)
            if last and trained and has_gradients(handle.optimizer):
                if trained < run.window:
                    rescale_gradients(handle.optimizer, run.window / trained)
                self._step(run, handle, batch_idx, self._again(run, handle, batch_idx, compute, loss))
        return output

    def _again(
        self, run: Run, handle: LightningOptimizer, batch_idx: int, compute: Callable[[], Any], loss: Tensor | None
    ) -> Callable[[], Any]:
        """A closure that has been evaluated already: its first call returns the loss, later ones compute it anew."""
        known: Any = loss

        def closure() -> Any:
            nonlocal known
            if known is _NOTHING:
                self._zero_grad(run, handle, batch_idx)
                return compute()
            result, known = known, _NOTHING
            return result

        return closure

    def _step(self, run: Run, handle: LightningOptimizer, batch_idx: int, closure: Callable[[], Any]) -> None:
        before, run.stepped = run.stepped, False
        if self._own_step is not None:
            handle.unscale()  # what the override may look at
            known = {
                "epoch": run.progress.epoch,
                "batch_idx": batch_idx,
                "optimizer": handle,
                "optimizer_idx": self.index,
                "optimizer_closure": closure,
                "on_tpu": False,
                "using_native_amp": run.scaler is not None,
                "using_lbfgs": needs_closure(handle.optimizer),
            }
            self._own_step(*arguments_of(self._own_step, known))
        else:
            handle.step(*([closure] if needs_closure(handle.optimizer) else []))
        if run.stepped:  # what an override may have done itself
            self._zero_grad(run, handle, batch_idx)
        run.stepped = run.stepped or before

    def _zero_grad(self, run: Run, handle: LightningOptimizer, batch_idx: int) -> None:
        for hook in run.hooks.on_before_zero_grad:
            hook(handle.optimizer)
        if self._own_zero_grad is not None:
            known = {
                "epoch": run.progress.epoch,
                "batch_idx": batch_idx,
                "optimizer": handle,
                "optimizer_idx": self.index,
            }
            self._own_zero_grad(*arguments_of(self._own_zero_grad, known))
        else:
            handle.zero_grad()


def split_batch(batch: Any, steps: int) -> list[Any]:
    """Cut a batch of sequences into parts of ``steps``, along dimension 1; the last may be shorter.

    Args:
        batch: a tensor, or tensors and lists in dicts, lists and tuples, of one length in dimension 1. A list of lists is cut
            in each.
        steps: the length of a part.

    Raises:
        ValueError: if lengths differ, or there is no sequence.
    """
    lengths = set(_lengths(batch))
    if len(lengths) != 1:
        raise ValueError(
            f"truncated_bptt_steps={steps} cuts sequences along dimension 1, and this batch has "
            f"{'none' if not lengths else f'such of lengths {sorted(lengths)}'}. Override tbptt_split_batch(batch, split_size)."
        )
    return [_cut(batch, begin, begin + steps) for begin in range(0, lengths.pop(), steps)]


def _lengths(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.dim() > 1:
            yield batch.shape[1]
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from _lengths(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _lengths(value)


def _cut(batch: Any, begin: int, end: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[:, begin:end] if batch.dim() > 1 else batch
    if isinstance(batch, dict):
        return {name: _cut(value, begin, end) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_cut(value, begin, end) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_cut(value, begin, end) for value in batch)
    return batch


def _detached(hiddens: Any) -> Any:
    if isinstance(hiddens, Tensor):
        return hiddens.detach()
    if isinstance(hiddens, dict):
        return {name: _detached(value) for name, value in hiddens.items()}
    if isinstance(hiddens, (list, tuple)):
        return type(hiddens)(_detached(value) for value in hiddens)
    return hiddens
