"""A copy of a module without memory: fake tensors in place of its own, and the units that sharding would divide it into."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensorMode,
)  # torch has no public name for it; its own export and tools use it
from torch.nn.parameter import is_lazy

from leyden.errors import ConfigurationError, reject
from leyden.strategy.units import NORMALIZATIONS, by_size, choose_units


@dataclass
class FakeModel:
    """A module whose tensors have shapes, strides and dtypes but no memory.

    Attributes:
        module: the copy; tied weights are tied in it.
        mode: what its operations run in.
        device: where its tensors claim to be.
        counterparts: the copy's parameter for each of the original's, by ``id``.
        original: kept alive, so that no other object gets these ids.
    """

    module: nn.Module
    mode: FakeTensorMode
    device: torch.device
    counterparts: dict[int, nn.Parameter]
    original: nn.Module

    def parameters(self) -> list[nn.Parameter]:
        """Each parameter once, shared ones too."""
        return list(self.module.parameters())


def with_layers(module: nn.Module, dtype: torch.dtype | None) -> tuple[nn.Module, bool]:
    """The module, or if it makes its layers in ``configure_model``, a copy that has made them on the meta device.

    Returns:
        The module to plan for, and whether ``configure_model`` was called.
    """
    build = getattr(module, "configure_model", None)
    if build is None or next(module.parameters(), None) is not None:
        return module, False
    built = copy.deepcopy(module)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or before)
        with torch.device("meta"):
            built.configure_model()  # type: ignore[operator]
    finally:
        torch.set_default_dtype(before)
    return built, True


def check(module: nn.Module) -> None:
    """Refuse modules whose sizes cannot be known.

    Raises:
        ConfigurationError: parameters that wait for their shape, or that are already divided among ranks.
    """
    sharded = getattr(
        sys.modules.get("torch.distributed.tensor"), "DTensor", ()
    )  # importing it costs; it is there if used
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ConfigurationError(f"{name} has no shape yet: run the module once on a batch, then plan.")
        if isinstance(parameter, sharded):
            raise ConfigurationError(
                f"{name} is divided among ranks already. Plan for the module as it is before that."
            )


def fake_copy(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None, *, sharded: bool = False
) -> FakeModel:
    """Copy a module without its memory.

    Args:
        module: any module, on any device, the meta device included. It is not changed.
        device: where the copy's tensors claim to be.
        dtype: of the copy's floating-point tensors; None leaves them.
        sharded: whether they are what leyden's FSDP gathers: parameters in ``dtype`` but for those of normalization layers;
            buffers as they are.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    counterparts: dict[int, nn.Parameter] = {}
    norms = (part for part in module.modules() if isinstance(part, NORMALIZATIONS))
    kept = {id(parameter) for part in norms for parameter in part.parameters()} if sharded else set()
    for tensor in _tensors(module):
        if id(tensor) in memo:
            continue
        with mode, torch.no_grad():
            is_cast = tensor.is_floating_point() and id(tensor) not in kept
            is_cast = is_cast and (isinstance(tensor, nn.Parameter) or not sharded)
            kind = dtype if dtype is not None and is_cast else tensor.dtype
            if tensor.is_contiguous() or tensor.layout != torch.strided:
                fake = torch.empty(tensor.shape, dtype=kind, device=device)
            else:
                fake = torch.empty_like(tensor, dtype=kind, device=device)
            if isinstance(tensor, nn.Parameter):
                parameter = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                vars(parameter).update(vars(tensor))  # marks such as those that sort parameters into groups
                counterparts[id(tensor)] = fake = parameter
        memo[id(tensor)] = fake
    return FakeModel(copy.deepcopy(module, memo), mode, device, counterparts, module)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class Parts:
    """Names of parts of a module.

    Attributes:
        units: what FSDP gathers one at a time, inner ones first.
        blocks: what is checkpointed, and whose linear layers tensor parallelism divides.
    """

    units: list[str]
    blocks: list[str]


def parts_of(module: nn.Module, wanted: Sequence[type[nn.Module]] | None) -> Parts:
    """Find the units and the blocks of a module.

    Args:
        module: the whole.
        wanted: classes whose instances are both. None: units are what `FSDPStrategy` takes by itself, members of module lists
            with a million parameters or more; blocks the members of each outermost ``ModuleList``, ``ModuleDict`` or
            ``Sequential`` with several members that have parameters.

    Raises:
        ConfigurationError: if no part of the module is of the classes.
    """
    names = {part: name for name, part in module.named_modules()}
    if wanted is None:
        units, _ = choose_units(module, by_size(module))
        return Parts([names[unit] for unit in units], list(_members("", module)))
    kinds = tuple(wanted)
    units, why_not = choose_units(module, lambda part: isinstance(part, kinds))
    found = [names[unit] for unit in units]
    if not found:
        hint = f" {'; '.join(why_not)}." if why_not else ""
        allowed = f"classes of parts of {type(module).__name__} that have parameters"
        reject("units", [each.__name__ for each in kinds], allowed, hint)
    return Parts(found, [name for name in found if not any(name.startswith(f"{other}.") for other in found)])


def _members(prefix: str, module: nn.Module) -> Iterator[str]:
    sized = [
        (f"{prefix}{name}", child) for name, child in module.named_children() if any(True for _ in child.parameters())
    ]
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) and len(sized) > 1:
        yield from (name for name, _ in sized)
        return
    for name, child in sized:
        yield from _members(f"{name}.", child)
