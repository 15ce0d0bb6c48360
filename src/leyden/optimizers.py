"""Every accepted form of `configure_optimizers` made one; clipping, closures, and optimizers stepped by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from leyden.errors import ConfigurationError, did_you_mean
from leyden.precision import LossScaler, has_gradients
from leyden.shards import clip_norm, clip_value, is_sharded

CLIP_ALGORITHMS = ("norm", "value")


@dataclass
class SchedulerConfig:
    """One learning-rate scheduler and when it steps.

    Attributes:
        scheduler: anything with ``step()``.
        interval: "epoch" or "step"; a step is an optimizer step.
        frequency: step the scheduler every this many intervals, counted over the whole of training.
        monitor: the logged key that `ReduceLROnPlateau` watches.
        strict: whether a missing monitored key is an error; else the scheduler waits.
        name: what `LearningRateMonitor` calls it.
        reduce_on_plateau: whether ``step`` takes the monitored value.
    """

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    reduce_on_plateau: bool = False


@dataclass
class Optimizers:
    """What `configure_optimizers` returned, in one form."""

    optimizers: list[Optimizer] = field(default_factory=list)
    schedulers: list[SchedulerConfig] = field(default_factory=list)


_FORMS = (
    "an optimizer; a list or tuple of optimizers; ([optimizers], [schedulers]); a dict with 'optimizer' and optionally "
    "'lr_scheduler' and 'monitor'; a list of such dicts; None"
)


def normalize_optimizers(returned: Any) -> Optimizers:
    """Bring what `configure_optimizers` returned into one form.

    Raises:
        ConfigurationError: if it is none of the accepted forms; the message lists them.
    """
    found = Optimizers()
    if returned is None:
        return found
    if isinstance(returned, Optimizer):
        found.optimizers.append(returned)
    elif isinstance(returned, Mapping):
        _add_dict(found, returned)
    elif isinstance(returned, (list, tuple)) and returned and all(isinstance(item, Optimizer) for item in returned):
        found.optimizers.extend(returned)
    elif isinstance(returned, (list, tuple)) and returned and all(isinstance(item, Mapping) for item in returned):
        for item in returned:
            _add_dict(found, item)
    elif isinstance(returned, (list, tuple)) and len(returned) == 2 and _is_two_lists(returned):
        found.optimizers.extend(returned[0])
        for scheduler in returned[1] or ():
            found.schedulers.append(_scheduler_config(scheduler, None))
    else:
        raise ConfigurationError(f"configure_optimizers returned {_describe(returned)}. Allowed: {_FORMS}.")
    for config in found.schedulers:
        optimizer = getattr(config.scheduler, "optimizer", None)
        if optimizer is not None and not any(optimizer is known for known in found.optimizers):
            raise ConfigurationError(
                f"configure_optimizers returned a {type(config.scheduler).__name__} of an optimizer that it did not return. "
                "Return that optimizer too."
            )
    return found


def _is_two_lists(returned: Sequence[Any]) -> bool:
    first, second = returned
    return (
        isinstance(first, (list, tuple))
        and bool(first)
        and all(isinstance(item, Optimizer) for item in first)
        and (second is None or isinstance(second, (list, tuple)))
    )


def _describe(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        inside = ", ".join(type(item).__name__ for item in value)
        return f"a {type(value).__name__} of ({inside})"
    return f"{type(value).__name__} {value!r}"


def _add_dict(found: Optimizers, form: Mapping[str, Any]) -> None:
    known = ("optimizer", "lr_scheduler", "monitor", "frequency")
    for key in form:
        if key not in known:
            raise ConfigurationError(
                f"configure_optimizers returned a dict with the key {key!r}. Allowed: {', '.join(known)}."
                f"{did_you_mean(key, known)}"
            )
    if not isinstance(form.get("optimizer"), Optimizer):
        raise ConfigurationError(
            f"configure_optimizers returned a dict whose 'optimizer' is {_describe(form.get('optimizer'))}; it must be a "
            "torch.optim.Optimizer."
        )
    found.optimizers.append(form["optimizer"])
    if form.get("lr_scheduler") is not None:
        found.schedulers.append(_scheduler_config(form["lr_scheduler"], form.get("monitor")))


def _scheduler_config(given: Any, monitor: str | None) -> SchedulerConfig:
    if isinstance(given, Mapping):
        known = tuple(SchedulerConfig.__dataclass_fields__)
        for key in given:
            if key not in known:
                raise ConfigurationError(
                    f"A scheduler's config has the key {key!r}. Allowed: {', '.join(known)}.{did_you_mean(key, known)}"
                )
        if "scheduler" not in given:
            raise ConfigurationError(f"A scheduler's config needs the key 'scheduler'; it has {', '.join(given)}.")
        config = SchedulerConfig(**{"monitor": monitor, **given})
    else:
        config = SchedulerConfig(given, monitor=monitor)
    scheduler = config.scheduler
    if isinstance(scheduler, ReduceLROnPlateau):
        config.reduce_on_plateau = True
    if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)) and not callable(getattr(scheduler, "step", None)):
        raise ConfigurationError(
            f"configure_optimizers returned {_describe(scheduler)} as a scheduler; it has no step()."
        )
    if config.interval not in ("epoch", "step"):
        raise ConfigurationError(f"A scheduler's interval={config.interval!r} is not valid. Allowed: 'epoch', 'step'.")
    if type(config.frequency) is not int or config.frequency < 1:
        raise ConfigurationError(f"A scheduler's frequency={config.frequency!r} is not valid. Allowed: an integer ≥ 1.")
    if config.reduce_on_plateau and config.monitor is None:
        raise ConfigurationError(
            "ReduceLROnPlateau needs to know what to watch: return "
            "{'optimizer': …, 'lr_scheduler': {'scheduler': …, 'monitor': 'val_loss'}}."
        )
    return config


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step`` has a closure without default, as LBFGS has: it evaluates the loss again."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters that the optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def zero_grad_of(optimizer: Optimizer) -> Callable[[], Any]:
    """What sets the optimizer's gradients to none: its own way if it has one, else without torch's profiler label (8 µs)."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        return optimizer.zero_grad

    def zero_grad() -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    return zero_grad


def gradients_of(optimizer: Optimizer) -> list[Tensor | None]:
    """The gradients of all its parameters, for a checkpoint."""
    return [parameter.grad for parameter in parameters_of(optimizer)]


def load_gradients(optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> None:
    """Take back what `gradients_of` returned."""
    for parameter, gradient in zip(parameters_of(optimizer), gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def clip_gradients(optimizer: Optimizer, clip_val: float, algorithm: str = "norm") -> None:
    """Clip the gradients of the optimizer's parameters in place.

    Args:
        optimizer: whose parameters.
        clip_val: the largest norm of all gradients together, or the largest absolute value of each element.
        algorithm: "norm" or "value".
    """
    gradients = [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]
    if any(map(is_sharded, gradients)):
        (clip_value if algorithm == "value" else clip_norm)(gradients, clip_val)
    elif algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters_of(optimizer), clip_val)
    else:
        torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), clip_val)


class Toggle:
    """Which parameters an optimizer's turn has frozen, so that they can be set back exactly."""

    def __init__(self, optimizer: Optimizer, others: Sequence[Optimizer]) -> None:
        own = {id(parameter) for parameter in parameters_of(optimizer)}
        self._frozen = [
            parameter
            for other in others
            for parameter in parameters_of(other)
            if id(parameter) not in own and parameter.requires_grad
        ]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def undo(self) -> None:
        """Let the frozen parameters require gradients again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)


class LightningOptimizer:
    """An optimizer as `LightningModule.optimizers()` hands it out: `step` scales, calls hooks and is counted.

    Every other attribute is the wrapped optimizer's own.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        others: Sequence[Optimizer],
        scaler: LossScaler | None,
        before_step: Sequence[Callable[[Optimizer], Any]],
        after_step: Callable[[bool], None],
        backward: Callable[..., None],
        reduce: Callable[[Optimizer], None] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._others = others
        self._scaler = scaler
        self._before_step = before_step
        self._after_step = after_step
        self._backward = backward
        self._reduce = reduce  # averages gradients over ranks; what is averaged already stays as it is
        self._needs_closure = needs_closure(optimizer)
        self._accumulated = 0

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer; under fp16 autocast only if no gradient overflowed.

        Args:
            closure: evaluates the loss with gradients; needed by optimizers such as LBFGS. If it leaves no gradients,
                there is no step.
            **kwargs: passed to the optimizer's own ``step``.

        Returns:
            What the optimizer's ``step`` returned; None under loss scaling.
        """
        if closure is not None and self._scaler is None:
            return self._step_by_closure(closure, **kwargs)
        if closure is not None:
            if self._needs_closure:
                raise ConfigurationError(
                    f"{type(self.optimizer).__name__} evaluates its closure several times, which torch's loss scaling "
                    "does not allow. Use precision='bf16-mixed' or '32-true'."
                )
            closure()
            if not has_gradients(self.optimizer):
                return None
        self.unscale()
        for hook in self._before_step:
            hook(self.optimizer)
        return self._apply(**kwargs)

    def _step_by_closure(self, closure: Callable[[], Any], **kwargs: Any) -> Any:
        found = False

        def evaluate() -> Any:
            nonlocal found
            loss = closure()
            if has_gradients(self.optimizer):
                found = True
                self.unscale()
                for hook in self._before_step:
                    hook(self.optimizer)
            return loss

        result = self.optimizer.step(evaluate, **kwargs)
        if found:
            self._after_step(True)
        return result

    def _apply(self, **kwargs: Any) -> Any:
        result, moved = None, True
        if self._scaler is None:
            result = self.optimizer.step(**kwargs)
        else:
            moved = self._scaler.step(self.optimizer, **kwargs)
        self._after_step(moved)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to none, or to zero."""
        self.optimizer.zero_grad(set_to_none)
        if self._scaler is not None:
            self._scaler.forget(self.optimizer)

    def unscale(self) -> None:
        """Bring the gradients to their real size: averaged over ranks and, under fp16 autocast, unscaled once per step."""
        if self._reduce is not None:
            self._reduce(self.optimizer)
        if self._scaler is not None:
            self._scaler.unscale(self.optimizer)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Let only this optimizer's parameters require gradients inside the context.

        Args:
            sync_grad: accepted for strategies of several processes; one process has nothing to synchronise.
        """
        toggle = Toggle(self.optimizer, self._others)
        try:
            yield
        finally:
            toggle.undo()

    def minimize(
        self,
        loss: Tensor,
        *,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        accumulate_grad_batches: int = 1,
    ) -> bool:
        """Do the whole of one update: set gradients to none, backward, and once per window unscale, clip and step.

        Args:
            loss: 0-d tensor with a graph.
            gradient_clip_val: see `clip_gradients`; None does not clip.
            gradient_clip_algorithm: "norm" or "value".
            accumulate_grad_batches: calls per optimizer step; the loss is divided by it.

        Returns:
            Whether the optimizer stepped.

        Raises:
            ConfigurationError: for an optimizer that evaluates the loss several times, as LBFGS does.
        """
        if self._needs_closure:
            raise ConfigurationError(
                f"minimize(loss) has one loss, but {type(self.optimizer).__name__} evaluates it several times. Write a closure "
                "that calls zero_grad and manual_backward and returns the loss, and call optimizer.step(closure)."
            )
        if self._accumulated == 0:
            self.zero_grad()
        # Only into its own parameters: a generator's loss would also fill the discriminator's gradients, in mid-window.
        own = [parameter for parameter in parameters_of(self.optimizer) if parameter.requires_grad]
        part = loss if accumulate_grad_batches == 1 else loss / accumulate_grad_batches
        if any(map(is_sharded, own)):
            self._backward_apart(part)
        else:
            self._backward(part, **({"inputs": own} if self._others else {}))
        self._accumulated += 1
        if self._accumulated < accumulate_grad_batches:
            return False
        self._accumulated = 0
        self.unscale()
        for hook in self._before_step:
            hook(self.optimizer)
        if gradient_clip_val is not None:
            clip_gradients(self.optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._apply()
        return True

    def _backward_apart(self, loss: Tensor) -> None:
        """Leave the gradients of others as they are where autograd cannot: the graph has gathered parameters, not ours."""
        others = {parameter for other in self._others for parameter in parameters_of(other)}
        kept = [(parameter, parameter.grad) for parameter in others.difference(parameters_of(self.optimizer))]
        for parameter, _ in kept:
            parameter.grad = None
        self._backward(loss)
        for parameter, gradient in kept:
            parameter.grad = gradient

    def window_state(self) -> dict[str, Any] | None:
        """The gradients of a window that `minimize` has begun and not ended, for a checkpoint; None between two."""
        if self._accumulated == 0:
            return None
        return {"accumulated": self._accumulated, "gradients": gradients_of(self.optimizer)}

    def load_window_state(self, state: dict[str, Any]) -> None:
        """Go on with the window that `window_state` returned."""
        self._accumulated = int(state["accumulated"])
        load_gradients(self.optimizer, state["gradients"])

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # in a copy that is being made
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"LightningOptimizer({self.optimizer!r})"
