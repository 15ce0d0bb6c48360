"""The copy of a run's tensors that a checkpoint is written from while training goes on.

Its memory is kept from one checkpoint to the next, because a page of fresh memory costs ten times as much as the copy into
it. Large tensors are copied piece by piece, by as many threads as torch may use: a thread that another program keeps off
its core then delays one piece, and not, as at the end of torch's parallel loops, everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

_CPU = torch.device("cpu")
_SLAB_BYTES = 64 << 20  # a power of two, to which the allocator of pinned memory rounds up
_ALIGNMENT_BYTES = 64
_FORGOTTEN_AFTER = 4  # checkpoints without a tensor of this name: weights alone and whole states may alternate
_SMALL_ELEMENTS = 1 << 15  # below it torch copies in one thread
_PIECE_BYTES = 4 << 20
_BYTES_PER_THREAD = 16 << 20  # two milliseconds: a thread costs some tenths of one
_MAX_THREADS = 8  # about what it takes to keep a socket's memory busy


class Buffers:
    """Host memory for the tensors of one checkpoint, by name; pinned for those that come from a CUDA device."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._kinds: dict[str, tuple[torch.Size, torch.dtype, bool]] = {}
        self._missed: dict[str, int] = {}  # how often in a row a name was not needed

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return contiguous copies on the CPU; they are overwritten by the next call."""
        missing: list[str] = []
        groups: dict[torch.device, list[str]] = {}
        for name, tensor in tensors.items():
            if self._kinds.get(name) != (tensor.shape, tensor.dtype, tensor.is_cuda):
                missing.append(name)
            groups.setdefault(_CPU if tensor.is_cpu else tensor.device, []).append(name)
        # buffers made in inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            if missing:
                self._make({name: tensors[name] for name in missing})
            copies = {name: self._kept[name] for name in tensors}
            for device, names in groups.items():
                _copy(device, [copies[name] for name in names], [tensors[name] for name in names])
            for device in groups:
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
        self._forget(tensors)
        return copies

    def _make(self, missing: Mapping[str, Tensor]) -> None:
        """Make buffers, many small ones in one slab: pinned memory is slow to get and comes in powers of two."""
        for name in missing:
            self._kept.pop(name, None)  # freed before its successor is made
            self._kinds.pop(name, None)
        for pinned in (False, True):
            slab: list[tuple[str, Tensor, int]] = []  # with the offset in bytes
            end = 0
            for name, tensor in missing.items():
                if tensor.is_cuda is not pinned:
                    continue
                size = -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
                if slab and end + size > _SLAB_BYTES:
                    self._cut(slab, end, pinned)
                    slab, end = [], 0
                slab.append((name, tensor, end))
                end += size
            if slab:
                self._cut(slab, end, pinned)

    def _cut(self, slab: Sequence[tuple[str, Tensor, int]], size: int, pinned: bool) -> None:
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for name, tensor, start in slab:
            self._kept[name] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self._kinds[name] = (tensor.shape, tensor.dtype, pinned)

    def _forget(self, used: Mapping[str, Tensor]) -> None:
        self._missed = {name: self._missed.get(name, 0) + 1 for name in self._kept.keys() - used.keys()}
        for name, times in self._missed.items():
            if times >= _FORGOTTEN_AFTER:
                del self._kept[name], self._kinds[name]


def _copy(device: torch.device, targets: list[Tensor], sources: list[Tensor]) -> None:
    large = []
    if device == _CPU:
        # is_contiguous says nothing of bits that are yet to be applied
        large = [
            i
            for i, source in enumerate(sources)
            if source.numel() >= _SMALL_ELEMENTS
            and source.is_contiguous()
            and not (source.is_conj() or source.is_neg())
        ]
        _copy_bytes([(targets[i].data_ptr(), sources[i].data_ptr(), sources[i].nbytes) for i in large])
    if device.type == "xla":  # has no copy of several at once to the host
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    elif len(large) < len(sources):
        rest = sorted(set(range(len(sources))).difference(large)) if large else range(len(sources))
        # one call for all: a thousand small tensors take a third of the time
        torch._foreach_copy_([targets[i] for i in rest], [sources[i] for i in rest], device.type == "cuda")


def _copy_bytes(places: Iterable[tuple[int, int, int]]) -> None:
    """Copy memory, given as target address, source address and bytes, in several threads if there is much of it."""
    pieces = [
        (target + start, source + start, min(_PIECE_BYTES, size - start))
        for target, source, size in places
        for start in range(0, size, _PIECE_BYTES)
    ]
    queue = iter(pieces)

    def work() -> None:
        for target, source, size in queue:  # taking the next one is atomic
            ctypes.memmove(target, source, size)  # runs without the interpreter's lock

    helpers = min(torch.get_num_threads(), _MAX_THREADS, sum(size for _, _, size in pieces) // _BYTES_PER_THREAD) - 1
    threads = [threading.Thread(target=work, name="leyden-snapshot") for _ in range(helpers)]
    started = []
    try:
        with contextlib.suppress(RuntimeError):  # no thread to be had: fewer do it
            for thread in threads:
                thread.start()
                started.append(thread)
        work()
    finally:
        for thread in started:
            thread.join()
