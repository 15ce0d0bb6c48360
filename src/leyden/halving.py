"""`oom_policy="halve"`: batches that do not fit into the device's memory are trained on in parts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from leyden.buffers import BufferBackup
from leyden.data.split import sample_count, split_batch
from leyden.errors import warn
from leyden.optimizers import parameters_of
from leyden.run import Run
from leyden.seed import capture_random_state, restore_random_state
from leyden.series import MetricObject

Step = Callable[[Run, Any, int], Any]
"""Makes gradients of one batch: `loop.forward_backward`."""


class Halving:
    """`oom_policy="halve"`: trains on batches that do not fit in parts, and keeps to it.

    A batch is one attempt: if it runs out of memory, all that it left is undone (gradients, buffers, random state, logged
    values), and it is tried again in twice as many parts. The loss of a part is weighted by its share of the samples, so
    that for a loss that is a mean the gradients add up to those of the whole batch. `Progress.parts_per_batch` says how
    many parts there are, so a run that goes on from a checkpoint goes on with them.

    In a window of several batches, gradients of the earlier ones are set aside while a batch makes its own, and added then:
    the same sum, and nothing has to be computed again if the batch fails. That holds one more set of gradients at the end
    of a backward pass, when most activations are gone; batches of one sample, which cannot be split, do without.

    `on_before_backward` and `on_after_backward` are called for each part, all other hooks for the batch. Step values that are
    logged are those of the last part; epoch means are those of all. A part for which the step returns None adds no gradient.

    Not undone are attributes of the module that are no buffers, and what metric objects were updated with.

    Costs per batch a copy of the buffers and of the random state (about 100 µs on a CPU), and nothing on the device to wait for.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._buffers = BufferBackup(run.module)

    def train_on(self, step: Step, batch: Any, batch_idx: int) -> Any:
        """Make gradients of a batch, in parts if it has to be; return what callbacks get of it.

        Raises:
            torch.OutOfMemoryError: if a batch does not fit that cannot be split further.
        """
        run, progress = self._run, self._run.progress
        samples = sample_count(batch)
        self._buffers.save()
        random_state = capture_random_state(run.device)
        logged = run.metrics.mark()
        first, skipped = progress.micro_batch, (progress.skipped_batches, progress.skipped_in_window)
        earlier = self._set_aside() if first > 0 and (samples or 1) > 1 else []
        while True:
            try:
                output = self._in_parts(step, batch, batch_idx, samples)
                break
            except torch.OutOfMemoryError as error:
                self._refuse_if_indivisible(error, batch, samples)
            # After the except clause, which holds the traceback, whose frames hold the activations.
            self._free_memory()
            if progress.micro_batch > 0:  # else it failed before gradients were set to none
                self._forget_gradients(first)
                progress.micro_batch = max(first, 1)  # so that they are not set to none again, with its hooks
            self._buffers.put_back()
            restore_random_state(random_state, run.device)
            run.metrics.rewind(logged)
            progress.skipped_batches, progress.skipped_in_window = skipped
            assert samples is not None
            self._halve(samples)
        progress.micro_batch = first + 1
        skips = progress.skipped_in_window - skipped[1]
        all_skipped = int(skips > 0 and run.loss is None)
        progress.skipped_batches, progress.skipped_in_window = skipped[0] + all_skipped, skipped[1] + all_skipped
        _add_back(earlier)
        return output

    def _in_parts(self, step: Step, batch: Any, batch_idx: int, samples: int | None) -> Any:
        run = self._run
        parts = split_batch(batch, run.progress.parts_per_batch)
        if len(parts) == 1:
            return step(run, batch, batch_idx)
        assert samples is not None
        outputs, losses = [], []
        for part, size in parts:
            run.metrics.begin_batch(part, batch_idx)
            run.share = size / samples
            try:
                outputs.append((step(run, part, batch_idx), size))
            except Exception as error:
                error.add_note(
                    f"This was in part {len(outputs) + 1} of {len(parts)} of the batch, {size} of its {samples} samples, which "
                    "oom_policy='halve' has split."
                )
                raise
            losses.append(run.loss)
        run.share = 1.0
        run.metrics.begin_batch(batch, batch_idx)
        run.loss = next((loss for loss in losses if loss is not None), None)
        return _joined(outputs)

    def _set_aside(self) -> list[tuple[Tensor, Tensor]]:
        assert self._run.optimizer is not None
        found = [(each, each.grad) for each in parameters_of(self._run.optimizer) if each.grad is not None]
        for parameter, _ in found:
            parameter.grad = None
        return found

    def _forget_gradients(self, first: int) -> None:
        assert self._run.optimizer is not None
        if first == 0:
            self._run.zero_grad()  # the user's own may set them to zero
        else:
            self._run.optimizer.zero_grad()

    def _free_memory(self) -> None:
        gc.collect()  # the graph may be in a cycle
        if self._run.device.type == "cuda":
            torch.cuda.empty_cache()

    def _refuse_if_indivisible(self, error: BaseException, batch: Any, samples: int | None) -> None:
        if samples is None:
            error.add_note(
                f"oom_policy='halve' cannot split a batch of type {type(batch).__name__}: what its samples are is not clear. "
                "Return tensors whose dim 0 is the batch from the collate_fn, or take smaller batches."
            )
        elif self._run.progress.parts_per_batch >= samples:
            error.add_note(
                "oom_policy='halve' cannot help: the batch is down to single samples, and one of them does not fit. Make the "
                "samples or the model smaller, or use precision='bf16-mixed'."
            )
        else:
            return
        raise error

    def _halve(self, samples: int) -> None:
        progress, module = self._run.progress, self._run.module
        parts = progress.parts_per_batch = min(2 * progress.parts_per_batch, samples)
        modules = list(module.modules())
        remarks = "; BatchNorm statistics are those of the parts" if any(map(_is_norm, modules)) else ""
        if any(isinstance(each, MetricObject) for each in modules):
            remarks += "; metric objects may count the samples of the attempt twice"
        size = f"{samples // parts}" if samples % parts == 0 else f"{samples // parts} or {samples // parts + 1}"
        warn(
            "out-of-memory",
            f"A batch of {samples} did not fit into the memory of {self._run.device} in {progress.where()}; now it is trained on "
            f"in {parts} parts of {size}, and so are all later ones. The gradient is still that of the whole batch, if the loss "
            f"is a mean over its samples{remarks}.",
        )


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NormBase)


@torch.no_grad()
def _add_back(earlier: list[tuple[Tensor, Tensor]]) -> None:
    """Add the gradients that were set aside to the new ones, as backward would have."""
    both = []
    for parameter, gradient in earlier:
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient.is_sparse:
            parameter.grad = gradient + parameter.grad
        else:
            both.append((parameter, gradient, parameter.grad))
    if both:
        torch._foreach_add_([gradient for _, gradient, _ in both], [new for _, _, new in both])
    for parameter, gradient, _ in both:
        parameter.grad = gradient


def _joined(outputs: Sequence[tuple[Any, int]]) -> Any:
    """What callbacks get of a batch that was trained on in parts, from what they would get of each part and its size."""
    given = [(output, size) for output, size in outputs if output is not None]
    if not given or not all(isinstance(output, dict) for output, _ in given):
        return given[-1][0] if given else None
    return {key: _joined_value([(output.get(key), size) for output, size in given]) for key in given[0][0]}


def _joined_value(values: Sequence[tuple[Any, int]]) -> Any:
    """Numbers as their weighted mean, tensors of samples as one, everything else as the last part gave it."""
    if all(isinstance(value, Tensor) for value, _ in values):
        if all(value.dim() == 0 and value.is_floating_point() for value, _ in values):
            total = sum(size for _, size in values)
            return torch.stack([value * (size / total) for value, size in values]).sum()
        if all(value.dim() and value.shape[0] == size for value, size in values):
            return torch.cat([value for value, _ in values])
    return values[-1][0]
