"""What FSDP2 holds besides a rank's shards, followed unit by unit through a step of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from leyden.planner.ledger import Ledger

_UNSHARDED, _GATHERED, _OPEN, _REDUCED = range(4)


class Unit:
    """Parameters that are gathered and whose gradients are reduced together.

    Attributes:
        parameters: bytes of all of them.
        trainable: bytes of the gradients when they are reduced.
        waiting: how many gradients are still to come in this step.
    """

    def __init__(self, parameters: list[nn.Parameter], reduce_size: int) -> None:
        self.members = parameters
        self.parameters = sum(parameter.nbytes for parameter in parameters)
        self.trainable = reduce_size * sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        self.waiting = sum(parameter.requires_grad for parameter in parameters)
        self.is_unsharded = self.is_gathered = self.is_reduced = False
        self.open = 0


class ShardedUnits:
    """Does the sums of `torch.distributed.fsdp.fully_shard` while a whole model takes a step.

    In the forward pass a unit's parameters are gathered into one flat buffer and copied out of it; the buffer lives until the
    next unit has been gathered. In the backward pass the flat buffer of the unit that comes next is gathered ahead; gradients are
    copied into another flat buffer to be reduced, which lives until the next unit is reduced. The root (what is in no unit)
    stays gathered from the forward pass to the end of the backward pass.

    Args:
        ledger: which notes the figures.
        module: the whole.
        units: names of its parts, inner ones first.
        reduce_size: bytes of an element of a gradient when it is reduced.
    """

    def __init__(self, ledger: Ledger, module: nn.Module, units: list[str], reduce_size: int) -> None:
        self._ledger = ledger
        self.units: list[Unit] = []
        taken: set[int] = set()
        for name in units:
            part = module.get_submodule(name)
            members = [parameter for parameter in part.parameters() if id(parameter) not in taken]
            taken.update(map(id, members))
            unit = Unit(members, reduce_size)
            self.units.append(unit)
            part.register_forward_pre_hook(lambda *_, unit=unit: self._begin_forward(unit))
            part.register_forward_hook(lambda _, __, output, unit=unit: self._end_forward(unit, output))
        self.root = Unit([parameter for parameter in module.parameters() if id(parameter) not in taken], reduce_size)
        self.owner = {id(each): unit for unit in (self.root, *self.units) for each in unit.members}
        self._last: Unit | None = None  # whose flat buffer lives on in the forward pass
        self._order: list[Unit] = []

    def begin(self) -> None:
        """Gather the root: the step begins."""
        self._begin_forward(self.root)

    def end_forward(self, loss: Tensor) -> None:
        """Let go of the last flat buffer: the backward pass begins at the loss."""
        self._order.append(self.root)
        if self._last is not None:
            self._gathered(self._last, False)
            self._last = None
        self._when_backward_arrives(self.root, [loss])

    def accumulated(self, parameter: Tensor, grown: int) -> None:
        """A gradient is whole; with the last one of its unit, the unit's are reduced."""
        unit = self.owner[id(parameter)]
        unit.open += grown
        self._ledger.sharding[_OPEN] += grown
        unit.waiting -= 1
        if unit.waiting == 0 and unit is not self.root:
            self._reduce(unit)

    def end(self) -> None:
        """Reduce the root and the units that did not get all of their gradients: the backward pass is over."""
        for unit in (*self.units, self.root):
            if not unit.is_reduced:
                self._reduce(unit)

    def _begin_forward(self, unit: Unit) -> None:
        if unit.is_unsharded:
            return
        self._gathered(unit, True)
        self._ledger.record()
        if self._last is not None:
            self._gathered(self._last, False)
        self._last = unit
        self._unsharded(unit, True)
        self._ledger.record()

    def _end_forward(self, unit: Unit, output: Any) -> None:
        if unit in self._order:
            return  # a unit that is called twice is gathered twice, which changes no maximum
        self._order.append(unit)
        self._unsharded(unit, False)
        self._when_backward_arrives(unit, [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])

    def _when_backward_arrives(self, unit: Unit, outputs: list[Tensor]) -> None:
        arrived: Callable[[Tensor], None] = lambda _: self._begin_backward(unit)  # noqa: E731
        for output in outputs:
            if output.requires_grad:
                output.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _begin_backward(self, unit: Unit) -> None:
        for other in self.units:
            if other is not unit and other.is_unsharded and not other.trainable:
                self._unsharded(other, False)
        if not unit.is_unsharded and not unit.is_reduced:
            self._gathered(unit, True)
            self._unsharded(unit, True)
            self._ledger.record()
        self._gathered(unit, False)
        index = self._order.index(unit)
        if index > 0 and not self._order[index - 1].is_unsharded and not self._order[index - 1].is_reduced:
            self._gathered(self._order[index - 1], True)
            self._ledger.record()

    def _reduce(self, unit: Unit) -> None:
        self._gathered(unit, False)
        self._unsharded(unit, False)
        unit.is_reduced = True
        sharding = self._ledger.sharding
        if unit.open:
            sharding[_REDUCED] = unit.trainable  # the buffer of the unit before goes first
            self._ledger.record()
            sharding[_OPEN] -= unit.open
            unit.open = 0

    def _gathered(self, unit: Unit, now: bool) -> None:
        self._ledger.sharding[_GATHERED] += (now - unit.is_gathered) * unit.parameters
        unit.is_gathered = now

    def _unsharded(self, unit: Unit, now: bool) -> None:
        self._ledger.sharding[_UNSHARDED] += (now - unit.is_unsharded) * unit.parameters
        unit.is_unsharded = now
