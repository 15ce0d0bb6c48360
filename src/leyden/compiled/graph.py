"""The body of a training step as one function of the batch, for torch's compiler to make a graph of."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from leyden.compiled.updates import CaptureError, Update
from leyden.hooks import Hook
from leyden.module import LightningModule
from leyden.run import detached, loss_of


class Recorder:
    """Stands where `LightningModule.log` leaves values, inside of a ``with``: they become outputs of the graph.

    Args:
        module: whose calls of `log` are noted; nothing is where it does not log.

    Attributes:
        calls: those of the last ``with``.
    """

    def __init__(self, module: LightningModule) -> None:
        self._attributes = vars(module)
        self._metrics: Any = None
        self.calls: list[tuple[Any, ...]] = []

    def __enter__(self) -> None:
        self._metrics, self.calls = self._attributes["_metrics"], []
        if self._metrics is not None:
            self._attributes["_metrics"] = self

    def __exit__(self, *_: object) -> None:
        self._attributes["_metrics"] = self._metrics

    def pass_on(self) -> None:
        """Log what was noted."""
        for call in self.calls:
            self._metrics.log(*call)

    def log(self, name: str, value: Any, *flags: Any) -> None:
        """Note one call of `Metrics.log`."""
        # a copy: what is logged may go on being changed in place
        self.calls.append((name, value.detach().clone() if isinstance(value, Tensor) else value, *flags))


class Result(NamedTuple):
    """What comes out of a graph.

    Attributes:
        loss: as `Run.loss`: detached, divided by the batches of the window; None if the step returned None.
        output: what callbacks get, if somebody wants it.
        overflowed: 0-d bool tensor, under loss scaling: whether the step was left out.
        left_alone: the indices of the parameters without gradient.
    """

    loss: Tensor | None
    output: Any
    overflowed: Tensor | None
    left_alone: list[int]


class Clip(NamedTuple):
    """How gradients are clipped; see `leyden.optimizers.clip_gradients`."""

    value: float
    algorithm: str


class LossScale:
    """A `torch.amp.GradScaler` as tensors that the graph reads and updates."""

    def __init__(self, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        scaler.scale(torch.zeros((), device=device))  # the scaler makes its tensors with the first loss
        assert scaler._scale is not None
        assert scaler._growth_tracker is not None
        self.scale = scaler._scale
        self.tracker = scaler._growth_tracker
        self.growth, self.backoff = scaler.get_growth_factor(), scaler.get_backoff_factor()
        self.interval = scaler.get_growth_interval()

    def update(self, overflowed: Tensor) -> None:
        """Let the scale grow or shrink, as torch's scaler does. Traced."""
        grows = self.tracker + 1 == self.interval
        grown = self.scale * self.growth
        steady = torch.where(grows & grown.isfinite(), grown, self.scale)
        scale = torch.where(overflowed, self.scale * self.backoff, steady)
        tracker = torch.where(overflowed | grows, 0, self.tracker + 1)
        self.scale.copy_(scale)
        self.tracker.copy_(tracker)


class StepBody:
    """Everything that the graph refers to; `__call__` is what is traced.

    Args:
        training_step: the user's.
        arity: how many of ``(batch, batch_idx)`` it takes.
        context: autocast or nothing, for the forward pass.
        update: the optimizer's step.
        clip: how gradients are clipped, or None.
        scale: of the loss, or None.
        wants_output: whether somebody listens to what the step returns.
        gradients: where the gradients of a window of several batches add up; empty if there is none.
    """

    def __init__(
        self,
        training_step: Hook,
        arity: int,
        context: AbstractContextManager[Any],
        update: Update,
        clip: Clip | None,
        scale: LossScale | None,
        wants_output: bool,
        gradients: Sequence[Tensor],
    ) -> None:
        self.training_step = training_step
        self.arity = arity
        self.context = context
        self.update = update
        self.clip = clip
        self.scale = scale
        self.wants_output = wants_output
        self.gradients = gradients
        self.has_gradient = [False] * len(gradients)

    def tensors(self) -> list[Tensor]:
        """What the step changes besides the module and the optimizer."""
        return [*self.gradients, *([] if self.scale is None else [self.scale.scale, self.scale.tracker])]

    def show_gradients(self) -> None:
        """Let the parameters have the gradients of the present window, which a checkpoint may want."""
        for parameter, held, has in zip(self.update.parameters, self.gradients, self.has_gradient, strict=True):
            parameter.grad = held if has else None

    def take_gradients(self) -> None:
        """Take over the gradients that the parameters have."""
        for parameter, held in zip(self.update.parameters, self.gradients, strict=True):
            if parameter.grad is not None and parameter.grad is not held:
                held.copy_(parameter.grad)

    def __call__(self, batch: Any, batch_idx: int, window: int, first: bool, last: bool) -> Result:
        """Train on a batch.

        Args:
            batch: on the device.
            batch_idx: see ``arity``.
            window: batches of the window.
            first: whether this is the window's first batch.
            last: whether the optimizer steps.

        Raises:
            CaptureError: if this cannot be part of a graph.
        """
        with self.context:
            output = self.training_step(*(batch, batch_idx)[: self.arity])
        loss = loss_of(output)
        kept = detached(output) if self.wants_output else None
        if loss is None:
            if window > 1:
                raise CaptureError("training_step skips batches, with accumulate_grad_batches")
            return Result(None, None, None, [])
        if window > 1:
            loss = loss / window
        self.update.refuse_if_changed()
        scaled = loss if self.scale is None else loss * self.scale.scale
        gradients: list[Tensor | None] = list(torch.autograd.grad(scaled, self.update.parameters, allow_unused=True))
        with torch.no_grad():
            if window > 1:
                gradients = self._added(gradients, first)
            if not last:
                return Result(loss.detach(), kept, None, [])
            overflowed = None
            if self.scale is not None:
                gradients, overflowed = self._unscaled(gradients)
            if self.clip is not None:
                gradients = self._clipped(gradients)
            left_alone = self.update.write(gradients, overflowed)
            if self.scale is not None and overflowed is not None:
                self.scale.update(overflowed)
        return Result(loss.detach(), kept, overflowed, left_alone)

    def _added(self, gradients: Sequence[Tensor | None], first: bool) -> list[Tensor | None]:
        """Add to what the window's earlier batches gave; None where none of them gave anything."""
        for index, gradient in enumerate(gradients):
            held, fresh = self.gradients[index], first or not self.has_gradient[index]
            if gradient is not None:
                held.copy_(gradient if fresh else held + gradient)
            self.has_gradient[index] = gradient is not None or not fresh
        return [held if has else None for held, has in zip(self.gradients, self.has_gradient, strict=True)]

    def _unscaled(self, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Tensor]:
        assert self.scale is not None
        inverse = self.scale.scale.double().reciprocal().float()  # as torch's scaler does
        found = [gradient for gradient in gradients if gradient is not None]
        overflowed = ~torch.stack([gradient.isfinite().all() for gradient in found]).all()
        return [None if gradient is None else gradient * inverse for gradient in gradients], overflowed

    def _clipped(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        assert self.clip is not None
        bound, found = self.clip.value, [gradient for gradient in gradients if gradient is not None]
        if self.clip.algorithm == "value":
            return [None if gradient is None else gradient.clamp(-bound, bound) for gradient in gradients]
        # the same numbers as torch.nn.utils.clip_grad_norm_
        factor = (bound / (get_total_norm(found) + 1e-6)).clamp(max=1.0)
        return [None if gradient is None else gradient * factor for gradient in gradients]
