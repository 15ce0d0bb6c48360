"""What an optimizer keeps: a real optimizer steps once on fake parameters, of the size that a rank has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from leyden.errors import ConfigurationError, did_you_mean, reject
from leyden.optimizers import normalize_optimizers
from leyden.planner.copies import FakeModel
from leyden.planner.ledger import Kind, Ledger

Shape = Callable[[nn.Parameter], tuple[int, ...]]


@dataclass(frozen=True)
class State:
    """Bytes of one rank's optimizers.

    Attributes:
        kept: between steps.
        passing: more, for as long as a step lasts.
    """

    kept: int
    passing: int


class Optimizers:
    """The optimizers of a plan, made anew for parameters of other sizes.

    Args:
        wanted: the name of a class in ``torch.optim``, in any case; a class, or a function of the parameters, that gives an
            optimizer; an optimizer over the module's parameters, or several; None for the module's
            ``configure_optimizers``, or AdamW if it has none.
        model: the fake model.

    Raises:
        ConfigurationError: for anything else.
    """

    def __init__(self, wanted: Any, model: FakeModel) -> None:
        self._model = model
        self._make: Callable[[list[nn.Parameter]], Any] | None = None
        self._made: list[Optimizer] = []
        self.default = False
        if wanted is None and _overrides(model.module, "configure_optimizers"):
            with model.mode:
                self._made = normalize_optimizers(model.module.configure_optimizers()).optimizers  # type: ignore[operator]
        elif wanted is None:
            self._make, self.default = torch.optim.AdamW, True
        elif isinstance(wanted, str):
            self._make = _named(wanted)
        elif isinstance(wanted, Optimizer):
            self._made = [wanted]
        elif isinstance(wanted, Sequence) and wanted and all(isinstance(each, Optimizer) for each in wanted):
            self._made = list(wanted)
        elif callable(wanted):
            self._make = wanted
        else:
            allowed = "a name such as 'adamw', a class, a function of the parameters, an optimizer, several, or None"
            reject("optimizer", wanted, allowed)
        self._check()
        self.names = [type(each).__name__ for each in self._made]

    def state(self, shape: Shape, dtype: Callable[[nn.Parameter], torch.dtype]) -> State:
        """Step once, on parameters of these shapes and dtypes.

        Raises:
            Exception: whatever an optimizer raises that cannot step without numbers, or without a closure.
        """
        mode, device = self._model.mode, self._model.device
        with mode, torch.no_grad():
            parts: dict[int, nn.Parameter] = {}
            for parameter in self._model.parameters():
                part = nn.Parameter(
                    torch.empty(shape(parameter), dtype=dtype(parameter), device=device), parameter.requires_grad
                )
                part.grad = torch.empty_like(part) if parameter.requires_grad else None
                parts[id(parameter)] = part
            for original, parameter in self._model.counterparts.items():
                parts.setdefault(original, parts[id(parameter)])
            optimizers = self._for(parts)
            self.names = [type(each).__name__ for each in optimizers]
            with Ledger() as ledger:
                for part in parts.values():
                    ledger.enter(part, Kind.WEIGHT)
                    if part.grad is not None:
                        ledger.enter(part.grad, Kind.WEIGHT)
                for optimizer in optimizers:
                    optimizer.step()
            kept = sum(storage.nbytes() for storage in _storages(optimizers))
            # A fused kernel makes nothing on the way; what it makes in its first step is the state.
            highest = max((moment.other for moment in ledger.moments), default=0)
            return State(kept, max(0, highest - kept))

    def _for(self, parts: dict[int, nn.Parameter]) -> list[Optimizer]:
        if self._make is None:
            return [_restated(optimizer, parts) for optimizer in self._made]
        trainable = {id(part): part for part in parts.values() if part.requires_grad}
        if not trainable:
            return []
        made = self._make(list(trainable.values()))
        if not isinstance(made, Optimizer):
            reject("optimizer", self._make, f"something that gives an optimizer; this gave {type(made).__name__}")
        return [made]

    def _check(self) -> None:
        known = {*self._model.counterparts, *map(id, self._model.parameters())}
        for optimizer in self._made:
            if any(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"]):
                raise ConfigurationError(
                    f"The {type(optimizer).__name__} has parameters that {type(self._model.original).__name__} has not. Pass an "
                    "optimizer over this module's parameters, or a class or a name."
                )


def _overrides(module: nn.Module, name: str) -> bool:
    own = getattr(type(module), name, None)
    return own is not None and not own.__module__.startswith("leyden.")


def _named(name: str) -> Callable[[list[nn.Parameter]], Optimizer]:
    classes = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    if name.lower() not in classes:
        allowed = f"{', '.join(sorted(classes))}, or an optimizer class or object"
        reject("optimizer", name, allowed, did_you_mean(name.lower(), classes))
    return classes[name.lower()]


def _restated(optimizer: Optimizer, parts: dict[int, nn.Parameter]) -> Optimizer:
    """A twin over other parameters, without state."""
    twin = object.__new__(type(optimizer))
    # a scheduler puts a `step` of its own there, which is bound to the original
    vars(twin).update({key: value for key, value in vars(optimizer).items() if key != "step"})
    twin.state = defaultdict(dict)
    twin.param_groups = [
        {**group, "params": [parts[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    return twin


def _storages(optimizers: Iterable[Optimizer]) -> list[Any]:
    tensors = [
        leaf
        for optimizer in optimizers
        for state in optimizer.state.values()
        for leaf in tree_leaves(state)
        if isinstance(leaf, Tensor)
    ]
    return list({id(storage): storage for tensor in tensors for storage in [tensor.untyped_storage()]}.values())
