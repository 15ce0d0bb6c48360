"""Several loaders read as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten

from leyden.errors import reject

MODES = ("min_size", "max_size_cycle", "max_size", "sequential")


class CombinedLoader:
    """Read a collection of loaders together, each batch being a collection of the same structure.

    Args:
        iterables: loaders in a list, tuple, dict, or nested.
        mode: "min_size" ends with the shortest; "max_size_cycle" starts shorter ones again until the longest ends;
            "max_size" gives None for loaders that have ended; "sequential" reads one after the other.

    Iterating gives ``(batch, batch_idx, dataloader_idx)``; ``dataloader_idx`` is 0 except in sequential mode.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in MODES:
            reject("mode", mode, ", ".join(map(repr, MODES)))
        self.iterables = iterables
        self.mode = mode
        self.flattened, self._structure = tree_flatten(iterables, is_leaf=_is_loader)

    def __len__(self) -> int:
        lengths = [len(loader) for loader in self.flattened]
        if self.mode == "sequential":
            return sum(lengths)
        return (min if self.mode == "min_size" else max)(lengths, default=0)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        if self.mode == "sequential":
            for dataloader_idx, loader in enumerate(self.flattened):
                for batch_idx, batch in enumerate(loader):
                    yield batch, batch_idx, dataloader_idx
            return
        for batch_idx, batch in enumerate(self.batches()):
            yield batch, batch_idx, 0

    def with_loaders(self, loaders: Sequence[Any]) -> CombinedLoader:
        """Return the same structure and mode with other loaders, given in the order of ``flattened``."""
        return CombinedLoader(tree_unflatten(loaders, self._structure), self.mode)

    def batches(self) -> Iterator[Any]:
        """Iterate over the batches alone, without their indices."""
        if self.mode == "sequential":
            for loader in self.flattened:
                yield from loader
            return
        for parts in self.rounds(lambda index: iter(self.flattened[index]), [False] * len(self.flattened)):
            yield self.structured(parts)

    def structured(self, parts: Sequence[Any]) -> Any:
        """Put one part for each loader, in the order of ``flattened``, into the structure that was given."""
        return tree_unflatten(parts, self._structure)

    def rounds(self, open_part: Callable[[int], Iterator[Any]], ended: list[bool]) -> Iterator[list[Any]]:
        """Read the loaders in turns, in the modes other than "sequential".

        Args:
            open_part: begins to read the loader of this index, also when it is started again.
            ended: which loaders have ended at least once; kept up to date, so that a caller can take it up later.

        Yields:
            One item for each loader; None for one that has ended, in the mode "max_size".
        """
        iterators = [open_part(index) for index in range(len(self.flattened))]
        while iterators:
            parts = []
            for index, iterator in enumerate(iterators):
                part = _END if ended[index] and self.mode == "max_size" else next(iterator, _END)
                if part is _END:
                    if self.mode == "min_size":
                        return
                    ended[index] = True
                    if all(ended):
                        return
                    part = None
                    if self.mode == "max_size_cycle":
                        iterators[index] = open_part(index)
                        part = next(iterators[index], _END)
                        if part is _END:
                            return  # an empty loader cannot be cycled
                parts.append(part)
            yield parts


_END = object()


def _is_loader(value: Any) -> bool:
    return not isinstance(value, (dict, list, tuple))
