"""Which modules are sharded as units, and bringing a module's tensors to their device, also from the meta device.

A unit's parameters are gathered together before its forward pass, so that the memory of one unit, and not of the whole module,
is needed at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from leyden.errors import ConfigurationError, reject
from leyden.shards import is_sharded
from leyden.strategy.sharding import send_from_first

Choice = Callable[[nn.Module], bool]

AUTO_MIN_PARAMETERS = 1_000_000
"""Elements that an entry of a list of modules must have to be a unit by ``wrap_policy="auto"``: below, gathering several at
once is faster."""
NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,  # of BatchNorm and InstanceNorm; torch has no public name for it
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def choice_of(name: str, given: Any, special: tuple[Any, ...] = ()) -> Any:
    """Bring an argument that chooses modules into one form: a function of a module, or one of ``special``.

    Args:
        name: of the argument, for messages.
        given: a function, or classes in a set, list or tuple.
        special: values that mean something else.

    Raises:
        ConfigurationError: for anything else.
    """
    if any(given is each or (isinstance(each, str) and given == each) for each in special):
        return given
    kinds = tuple(given) if isinstance(given, (set, frozenset, list, tuple)) else None
    if kinds is not None and kinds and all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in kinds):
        return lambda module: isinstance(module, kinds)
    if kinds is None and callable(given) and not isinstance(given, type):
        return given
    others = "".join(f", {each!r}" for each in special)
    return reject(name, given, f"a set of module classes, a function of a module that returns True or False{others}")


def by_size(root: nn.Module) -> Choice:
    """Choose the entries of module lists, dicts and `Sequential` with `AUTO_MIN_PARAMETERS` elements or more: the layers."""
    chosen = {
        id(entry)
        for holder in root.modules()
        if isinstance(holder, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        for entry in holder.children()
        if sum(parameter.numel() for parameter in entry.parameters()) >= AUTO_MIN_PARAMETERS
    }
    return lambda module: id(module) in chosen


def choose_units(root: nn.Module, choice: Choice) -> tuple[list[nn.Module], list[str]]:
    """Return the units below ``root``, inner ones first, and why others that were chosen are none.

    A module is none if it has no parameters, if it has no forward pass (a list of modules), or if it shares a parameter with
    a module outside of it, as input and output embeddings do: they must be gathered together.
    """
    names = {module: name for name, module in root.named_modules()}
    owners: dict[int, set[nn.Module]] = {}
    for module in names:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    units, why_not = [], []
    for module in post_order(root):
        if module is root or not choice(module):
            continue
        inside = set(module.modules())
        shared = {
            names[owner] for p in module.parameters() for owner in owners[id(p)] if not owners[id(p)] <= inside
        } - {names[each] for each in inside}
        if not any(True for _ in module.parameters()):
            continue
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            why_not.append(
                f"{names[module]} is a {type(module).__name__}, which has no forward pass; choose its entries"
            )
        elif shared:
            why_not.append(f"{names[module]} shares a parameter with {', '.join(sorted(shared))}")
        else:
            units.append(module)
    return units, why_not


def post_order(root: nn.Module) -> Iterator[nn.Module]:
    """Every module once, children before their parent: the order in which constructors end."""
    seen: set[int] = set()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if id(module) in seen:
            return
        seen.add(id(module))
        for child in module.children():
            yield from walk(child)
        yield module

    return walk(root)


class Settling:
    """Brings the tensors of modules, one module after the other, to a device, with the values of rank 0 on every rank.

    On the meta device tensors have no values. A module there is given memory, and its ``reset_parameters`` is called, in the
    order in which constructors end: then random numbers are drawn in the order in which they would be elsewhere. How often
    a tensor was written to is compared, so that nothing that `configure_model` has set is lost without a word.

    Args:
        root: whose parts.
        device: where to.
        sends: whether the values of rank 0 are sent, which is a collective for each tensor.
    """

    def __init__(self, root: nn.Module, device: torch.device, sends: bool = True) -> None:
        self._root = root
        self._device = device
        self._sends = sends
        # by the id of a tensor on the meta device, which is kept so that the id stays its own; several modules may own it
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._waiting: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}
        self._settled: dict[int, Tensor] = {}
        for name, parameter in root.named_parameters():
            if is_lazy(parameter):
                raise ConfigurationError(
                    f"{name} has no shape yet (a lazy module), so it cannot be divided among ranks. Give its module its sizes, "
                    "or run it once before fit."
                )

    def settle(self, module: nn.Module) -> None:
        """Bring the tensors that ``module`` itself owns to the device; those on the meta device are made there."""
        if any(each.is_meta for each in _own(module).values()):
            self._make(module)
        elif (reset := _reset_of(module)) is not None and self._sets_its_parts(module):
            with torch.no_grad():
                reset()
        for each in _own(module).values():
            if is_sharded(each) or id(each) in self._settled:
                continue
            self._settled[id(each)] = each
            if each.device != self._device and each.device.type != self._device.type:
                each.data = each.data.to(self._device)

    def finish(self, unit: nn.Module) -> None:
        """Give what was settled the values of rank 0; to be called before ``unit`` is sharded.

        Raises:
            ConfigurationError: if values were lost on the meta device.
        """
        for what, name in self._unset(unit):
            raise ConfigurationError(
                f"configure_model has set {name} of {what}, but modules are on the meta device there, where values are lost. "
                "Set it in a reset_parameters method of the module, or make the module in __init__."
            )
        self._waiting = {each: kept for each, kept in self._waiting.items() if each not in set(unit.modules())}
        waiting = [self._settled.pop(id(each)) for part in unit.modules() for each in _own(part).values()
                   if id(each) in self._settled]  # fmt: skip
        if self._sends:
            send_from_first(waiting)

    def _sets_its_parts(self, module: nn.Module) -> bool:
        """Whether a module without tensors of its own has set those of its parts when it was made."""
        if not self._waiting:
            return False
        # torch's own copies its layers before, and a copy has not been written to
        return isinstance(module, nn.Transformer) or bool(self._unset(module))

    def _unset(self, unit: nn.Module) -> list[tuple[str, str]]:
        """Tensors below that were written to more often on the meta device than since they have memory."""
        return [
            (self._name(part), name)
            for part in unit.modules()
            for name, (meta, made) in self._waiting.get(part, {}).items()
            if meta._version > made._version
        ]

    def _make(self, module: nn.Module) -> None:
        """Give a module on the meta device memory and values, as its ``reset_parameters`` says.

        Raises:
            ConfigurationError: if it has no such method, or this leaves tensors without values.
        """
        before = {name: each for name, each in _own(module).items() if each.is_meta}
        what, reset = self._name(module), _reset_of(module)
        if reset is None:
            raise ConfigurationError(
                f"{what} was made on the meta device, which configure_model is called on, and has no reset_parameters method "
                f"that could give {', '.join(before)} values. Add one that sets all of them, or make it in __init__."
            )
        for name, each in before.items():
            _put(module, name, _empty(each, self._device))
        with torch.no_grad():
            reset()
        own = _own(module)
        for name, each in before.items():
            if own[name]._version == 0:
                raise ConfigurationError(
                    f"{what} was made on the meta device, and its reset_parameters does not set {name}. Let it set all "
                    "parameters and buffers, or make the module in __init__."
                )
            if id(each) in self._made:  # another module owns it as well, and comes first
                own[name] = self._made[id(each)][1]
            elif is_sharded(each):
                own[name] = _cut(own[name], each)
            else:
                self._waiting.setdefault(module, {})[name] = (each, own[name])
            self._made[id(each)] = (each, own[name])
            _put(module, name, own[name])

    def _name(self, module: nn.Module) -> str:
        name = next((name for name, each in self._root.named_modules() if each is module), "")
        return f"{name} ({type(module).__name__})" if name else type(module).__name__


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    """What sets a module's parameters; torch's attention and transformer have it with an underscore."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return reset if callable(reset) else None


def _own(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: each for name, each in own.items() if each is not None}


def _empty(meta: Tensor, device: torch.device) -> Tensor:
    memory = torch.empty(meta.shape, dtype=meta.dtype, device=device)
    return nn.Parameter(memory, requires_grad=meta.requires_grad) if isinstance(meta, nn.Parameter) else memory


def _cut(whole: Tensor, meta: Tensor) -> Tensor:
    """The part of a whole tensor that a DTensor on the meta device stands for."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(meta, DTensor)
    part = distribute_tensor(whole.detach(), meta.device_mesh, meta.placements, src_data_rank=None)
    return nn.Parameter(part, requires_grad=meta.requires_grad) if isinstance(meta, nn.Parameter) else part


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = tensor  # type: ignore[assignment]
    else:
        module._buffers[name] = tensor
