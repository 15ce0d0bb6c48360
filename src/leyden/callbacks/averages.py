"""Averages of a module's tensors by name: kept, put into the module and taken out of it, written and read back.

No second module is made: a module holds its trainer, and what is frozen needs no average.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from leyden.buffers import copy_values
from leyden.errors import warn
from leyden.shards import cut_like, local_part

Average = Callable[[Sequence[Tensor], Sequence[Tensor], int], Any]
"""Changes a list of averages in place, given as many values and how many were averaged so far."""


class Place(NamedTuple):
    """Where a module keeps a tensor: asked again each time, because people assign new tensors to buffers."""

    registry: dict[str, Any]
    key: str
    tensor: Tensor
    is_buffer: bool


class Group(NamedTuple):
    """Averages that are updated by one call.

    Attributes:
        start: updates before their first.
        averages: the tensors.
        indices: which of the bound tensors they are averages of.
    """

    start: int
    averages: list[Tensor]
    indices: list[int]


class Averages:
    """The averages of a module's tensors, by name, and the raw values while they are out of the module.

    Args:
        average: changes a list of averages in place, given the values and their number so far.
        device: where averages are kept; None: where the tensors are.
        use_buffers: whether buffers are averaged.

    Attributes:
        updates: how often `update` was called.
        values: the averages by name.
        raw: the module's own values while it holds the averages, by name; else None.
    """

    def __init__(self, average: Average, device: torch.device | None, use_buffers: bool) -> None:
        self.updates = 0
        self.values: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] | None = None
        self._average, self._device, self._use_buffers = average, device, use_buffers
        self._finished = False  # the module holds the averages for good, and `values` is empty
        self._starts: dict[str, int] = {}  # updates before a name's first, of those that came later
        self._apart: dict[str, int] = {}  # what is not averaged: frozen or infinite; updates before it was first seen
        self._places: dict[str, Place] = {}  # of what is averaged, or will be
        self._seen: list[Tensor] = []
        self._groups: list[Group] | None = None
        self._swapped: list[Place] = []

    def bind(self, module: nn.Module) -> None:
        """Look the module through: what is averaged, what is new, what has gone."""
        with _recordable():
            found, complete = _look_through(module, self._use_buffers)
            self._drop([name for name in self.values if name not in found], "are no longer in the module")
            self._apart = {name: start for name, start in self._apart.items() if name in found}
            for name, place in found.items():
                self._place(name, place)
            self._places = {name: place for name, place in found.items() if name not in self._apart}
            self._seen = [place.tensor for place in self._places.values()]
            self._groups = self._grouped() if complete else None

    def _place(self, name: str, place: Place) -> None:
        """Decide about one tensor, and bring its average to its device and dtype."""
        tensor, is_frozen = place.tensor, not place.is_buffer and not place.tensor.requires_grad
        if name in self.values and self.values[name].shape != tensor.shape:
            self._drop([name], "changed their shape")
            if place.is_buffer:  # most likely scratch memory, which changes again and again
                self._apart[name] = self.updates
        if name in self.values:
            self.values[name] = self._like(tensor, self.values[name])
        elif name not in self._apart:
            if is_frozen or (place.is_buffer and not bool(tensor.isfinite().all())):
                self._apart[name] = self.updates
        elif not place.is_buffer and not is_frozen:
            start = self._apart.pop(name)
            if start < self.updates:  # until now it was constant, and a constant is its own average
                self.values[name] = self._like(tensor, tensor)
                self._starts[name] = start

    def _drop(self, names: Sequence[str], why: str) -> None:
        for name in names:
            del self.values[name]
            self._starts.pop(name, None)
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            warn("averages", f"The averages of {shown} are dropped: they {why}.")

    def _like(self, tensor: Tensor, source: Tensor) -> Tensor:
        """A copy of ``source`` laid out as ``tensor``, on the averages' device; ``source`` itself if it is that already."""
        device, source = self._device or tensor.device, cut_like(source, tensor)
        is_there = device in (source.device, torch.device(source.device.type))  # "cuda" says no index
        fits = source.dtype == tensor.dtype and source.stride() == tensor.stride()
        if is_there and fits and source is not tensor:
            return source
        copy = torch.empty_like(tensor.detach(), device=device)
        copy_values([copy], [source.detach()])
        return copy

    def _grouped(self) -> list[Group]:
        groups: dict[tuple[torch.device, torch.dtype, int], Group] = {}
        for index, name in enumerate(self._places):
            if name in self.values:
                average, start = self.values[name], self._starts.get(name, 0)
                group = groups.setdefault((average.device, average.dtype, start), Group(start, [], []))
                group.averages.append(average)
                group.indices.append(index)
        return list(groups.values())

    def update(self, module: nn.Module) -> None:
        """Average what the module has now."""
        tensors = self._present(module)
        assert self._groups is not None
        with _recordable():
            for start, averages, indices in self._groups:
                values = [tensors[index] for index in indices]
                if self._device is not None:
                    values = [value.to(averages[0].device) for value in values]
                self._average([*map(local_part, averages)], [*map(local_part, values)], self.updates - start)
            if len(self.values) < len(self._places):
                for name, tensor in zip(self._places, tensors, strict=True):
                    if name not in self.values:
                        self.values[name] = self._like(tensor, tensor)
                        if self.updates:
                            self._starts[name] = self.updates
                self._groups = self._grouped()
        self.updates += 1

    def _present(self, module: nn.Module) -> list[Tensor]:
        """The tensors that are averaged, as the module has them now."""
        if self._groups is not None:
            tensors = [place.registry.get(place.key) for place in self._places.values()]
            if all(map(is_, tensors, self._seen)):
                return self._seen
            if all(_alike(new, old) for new, old in zip(tensors, self._seen, strict=True)):
                self._seen = [tensor for tensor in tensors if tensor is not None]
                return self._seen
        self.bind(module)
        if self._groups is None:  # some parameters have no shape yet; what is known is averaged
            self._groups = self._grouped()
        return self._seen

    # Swapping

    def swap_in(self, module: nn.Module) -> None:
        """Put the averages into the module and keep its own values; nothing if there are none, or they are in it."""
        if self.raw is not None or not self.values:
            return
        self.bind(module)
        with _recordable():
            self._swapped = [self._places[name] for name in self.values]
            averages = list(self.values.values())
            self.raw = {
                name: place.tensor.detach().to(average.device, copy=True)
                for (name, average), place in zip(self.values.items(), self._swapped, strict=True)
            }
            copy_values([place.tensor for place in self._swapped], averages)

    def swap_out(self) -> None:
        """Give the module its own values back, if it does not have them. May be called again after an interruption."""
        if self.raw is None or self._finished:
            return
        with _recordable():
            copy_values([place.tensor for place in self._swapped], list(self.raw.values()))
            for registry, key, tensor, _ in self._swapped:
                registry[key] = tensor
        self.raw, self._swapped = None, []

    def finish(self, module: nn.Module) -> None:
        """Leave the averages in the module for good; its own values stay here, for a checkpoint to go on from."""
        self.swap_in(module)
        if self.raw is not None:
            self._finished = True
            self.values, self._swapped = {}, []

    def let_go(self) -> None:
        """Hold none of the module's tensors any longer; `bind` looks for them again."""
        self._places, self._seen, self._groups = {}, [], None

    # State

    def state_dict(self, module: nn.Module | None) -> dict[str, Any]:
        """Everything but the raw values; after `finish` the averages are ``module``'s."""
        values: Mapping[str, Tensor] = self.values
        if self._finished and module is not None:
            found, _ = _look_through(module, True)
            values = {name: found[name].tensor.detach() for name in self.raw or () if name in found}
        return {
            "updates": self.updates,
            "starts": dict(self._starts),
            "apart": dict(self._apart),
            "averages": dict(values),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; the averages move to their device when the module is looked through."""
        self.updates = int(state["updates"])
        self._starts, self._apart = dict(state["starts"]), dict(state["apart"])
        self.values = {name: value.detach().clone() for name, value in state["averages"].items()}
        self._groups = None


def exchanged(module: nn.Module, state: Mapping[str, Any], values: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """A state dict with ``values`` in the places of the module's tensors of their names; ``state`` if there are none.

    The entries are known by the memory that they show, so that tied parameters and keys that a hook renamed are
    found too.
    """
    if not values:
        return state
    found, _ = _look_through(module, True)
    shown = {_view(place.tensor): name for name, place in found.items() if name in values and place.tensor.numel()}
    result: OrderedDict[str, Any] = OrderedDict()
    for key, entry in state.items():
        name = key if key in values else shown.get(_view(entry)) if isinstance(entry, Tensor) else None
        result[key] = entry if name is None else values[name].detach()
    if hasattr(state, "_metadata"):  # the modules' format versions, which load_state_dict reads
        result._metadata = state._metadata  # type: ignore[attr-defined]
    return result


def _look_through(module: nn.Module, use_buffers: bool) -> tuple[dict[str, Place], bool]:
    """Every parameter and buffer that can be averaged once, by its first name; whether all of them have a shape already."""
    found: dict[str, Place] = {}
    complete, known = True, set()
    for prefix, owner in module.named_modules():
        for registry, is_buffer in ((owner._parameters, False), (owner._buffers, True)):
            for key, tensor in registry.items() if use_buffers or not is_buffer else ():
                if tensor is None or id(tensor) in known:
                    continue
                if is_lazy(tensor):
                    complete = False
                elif tensor.is_complex() or (tensor.is_floating_point() and tensor.itemsize > 1):  # 8 bits cannot lerp
                    known.add(id(tensor))
                    found[f"{prefix}.{key}" if prefix else key] = Place(registry, key, tensor, is_buffer)
    return found, complete


def _alike(new: Tensor | None, old: Tensor) -> bool:
    return new is not None and (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)


def _view(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    tensor = local_part(tensor)
    memory = tensor.data_ptr() or id(tensor.untyped_storage())  # on "xla" all addresses are 0
    return tensor.device, memory, tensor.dtype, tensor.shape, tensor.stride()


@contextmanager
def _recordable() -> Iterator[None]:
    """No gradients, but also no inference mode, in which validation runs: its tensors cannot be trained on later."""
    with torch.inference_mode(False), torch.no_grad():
        yield
