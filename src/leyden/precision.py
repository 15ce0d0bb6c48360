"""Number formats: which dtype parameters have, which dtype the forward pass computes in, and loss scaling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from leyden.errors import StepError, did_you_mean, reject


@dataclass(frozen=True)
class Precision:
    """How numbers are held and computed.

    Attributes:
        name: the canonical spelling, e.g. ``"bf16-mixed"``.
        parameter_dtype: what the module's floating-point parameters and buffers are cast to; None leaves them.
        compute_dtype: what autocast computes in; None means no autocast.
        scales_loss: whether gradients need a `torch.amp.GradScaler`, because fp16 underflows.
    """

    name: str
    parameter_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    scales_loss: bool = False

    def convert_module(self, module: torch.nn.Module) -> None:
        """Cast the module's floating-point parameters and buffers, for the ``-true`` precisions."""
        if self.parameter_dtype is not None:
            module.to(self.parameter_dtype)

    def step_context(self, device_type: str) -> AbstractContextManager[Any]:
        """Return the context that every user step runs in; it may be entered again and again."""
        if self.compute_dtype is not None:
            return torch.autocast(device_type, dtype=self.compute_dtype)
        if self.parameter_dtype is not None:
            return _DefaultDtype(self.parameter_dtype)
        return contextlib.nullcontext()

    def backward_context(self, device_type: str) -> AbstractContextManager[Any]:
        """Return the context for a backward pass inside a step: torch asks for none of autocast there."""
        if self.compute_dtype is not None:
            return torch.autocast(device_type, enabled=False)
        return contextlib.nullcontext()

    def grad_scaler(self, device_type: str) -> torch.amp.GradScaler | None:
        """Return a fresh loss scaler for fp16 autocast, else None."""
        return torch.amp.GradScaler(device_type) if self.scales_loss else None


class _DefaultDtype:
    """Make tensors that a step creates come in the module's dtype; re-enterable, unlike a generator context."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._outer: list[torch.dtype] = []

    def __enter__(self) -> None:
        self._outer.append(torch.get_default_dtype())
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._outer.pop())


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("32-true"),
        Precision("64-true", parameter_dtype=torch.float64),
        Precision("16-true", parameter_dtype=torch.float16),
        Precision("bf16-true", parameter_dtype=torch.bfloat16),
        Precision("16-mixed", compute_dtype=torch.float16, scales_loss=True),
        Precision("bf16-mixed", compute_dtype=torch.bfloat16),
    )
}
_ALIASES = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


class PrecisionName(str):
    """A precision's name, which equals its short forms too: ``"16-mixed" == 16``, as programs of former days compare.

    Its hash is that of the name: in a set or a dict only the name is found.
    """

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, int) and not isinstance(other, bool):
            other = str(other)
        return isinstance(other, str) and str.__eq__(self, _ALIASES.get(str(other), str(other)))

    def __ne__(self, other: object) -> bool:
        return not self == other


def resolve_precision(precision: object) -> Precision:
    """Turn the Trainer's ``precision`` argument into a `Precision`.

    Args:
        precision: a name such as ``"bf16-mixed"``, the short forms 16, 32, 64 and "bf16", or a `Precision`.

    Raises:
        ConfigurationError: for anything else; the message lists what is known.
    """
    if isinstance(precision, Precision):
        return precision
    name = _ALIASES.get(str(precision), str(precision))
    if isinstance(precision, bool) or name not in PRECISIONS:
        known = ", ".join(repr(key) for key in PRECISIONS)
        reject("precision", precision, f"{known}, or 64, 32, 16, 'bf16' for short", did_you_mean(name, PRECISIONS))
    return PRECISIONS[name]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Create modules in ``dtype`` inside this context, so that no second copy in fp32 is made first."""
    if dtype is None:
        yield
        return
    with _DefaultDtype(dtype):
        yield


class LossScaler:
    """A `torch.amp.GradScaler` that may be used by several optimizers, in any order, and never scales twice.

    The scale changes only when the next loss is scaled after some optimizer has stepped, so that gradients are
    always unscaled by what they were scaled with.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self._unscaled: dict[int, torch.optim.Optimizer] = {}
        self._stepped: set[int] = set()
        self._stale: dict[int, torch.optim.Optimizer] = {}  # unscaled in an earlier batch, and not stepped

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss times the present scale."""
        if self._stepped:
            self.update()
        if self._stale:
            self._stale = {key: each for key, each in self._stale.items() if has_gradients(each)}
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, unless that was done already or there are none.

        Raises:
            StepError: if they were unscaled in an earlier batch, so that they are a sum of scaled and unscaled ones.
        """
        if id(optimizer) in self._stale:
            raise StepError(
                f"The gradients of {type(optimizer).__name__} were unscaled (clipped) in an earlier batch, and scaled ones were "
                "added since. Clip only in the batch that steps the optimizer, or call optimizer.zero_grad() before backward."
            )
        if id(optimizer) not in self._unscaled and has_gradients(optimizer):
            self.scaler.unscale_(optimizer)
            self._unscaled[id(optimizer)] = optimizer

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Note that the optimizer's gradients were set to none or zero."""
        self._stale.pop(id(optimizer), None)

    def step(self, optimizer: torch.optim.Optimizer, **kwargs: Any) -> bool:
        """Step the optimizer, unless its gradients overflowed or there are none; return whether it stepped."""
        self.unscale(optimizer)
        if id(optimizer) not in self._unscaled:
            return False
        taken: list[bool] = []
        # The scaler does not tell; asking for the scale would wait for the device.
        watch = optimizer.register_step_post_hook(lambda *_: taken.append(True))
        self.scaler.step(optimizer, **kwargs)
        watch.remove()
        self._stepped.add(id(optimizer))
        return bool(taken)

    def update(self) -> None:
        """Let the scale grow or shrink by what the steps since the last update found."""
        if self._stepped:
            self.scaler.update()
            self._stepped.clear()
            self._unscaled.clear()

    def end_batch(self) -> None:
        """Update, and begin anew for every optimizer: unscaling is for the gradients of one batch."""
        if not self._unscaled:
            return
        self._stale.update({key: each for key, each in self._unscaled.items() if key not in self._stepped})
        self.scaler.update()
        self._stepped.clear()
        self._unscaled.clear()


def has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether any of the optimizer's parameters has a gradient."""
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
