"""Bring batches to a CUDA device one ahead of training: the next one is copied while the present one is trained on.

A copy that is to run beside the device's work needs host memory that is pinned and a stream of its own. The stream that trains
waits for the copy, the host does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from leyden.data.reader import Reader, Ticket
from leyden.data.transfer import DeviceMove, converted

Start = Callable[[Any], Callable[[], Any]]
"""Begins to copy a batch, and returns what gives the copy; that is called when the batch's turn has come."""


def copies_for(move: Any, reader: Reader, index: int) -> Start | None:
    """Return what copies batches ahead of training; None where a batch is to be moved when its turn comes.

    That is so on every device but CUDA; where a hook of the user's takes part, for it may look at what has been trained; and
    where reading a batch early might give another one (`Reader.reads_ahead`).

    Args:
        move: what brings a batch to the device, or a function that has it as ``__wrapped__``; what that one has as ``around``,
            if anything, wraps the beginning of each copy, to count its time.
        reader: of the loader.
        index: the number of the loader among several.
    """
    plain = getattr(move, "__wrapped__", move)
    if not isinstance(plain, DeviceMove) or plain.device.type != "cuda" or not reader.reads_ahead:
        return None
    copies = CudaCopies(plain.device, plain.dtype)
    begin = getattr(move, "around", lambda function: function)(copies.start)
    return lambda batch: begin(batch) if can_be_copied(batch) else lambda: move(batch, index)


def one_ahead(reading: Iterator[tuple[Any, Ticket]], start: Start) -> Iterator[tuple[Any, Ticket]]:
    """Give the same batches with their tickets; when one is given, the next has been read and is being copied.

    An error in reading a batch is raised when it is that batch's turn.
    """
    present = _begun(reading, start)
    while present is not None:
        following, failure = None, None
        try:
            following = _begun(reading, start)
        except Exception as error:  # noqa: BLE001  it is raised below
            failure = error
        copied, ticket = present
        yield copied(), ticket
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # else it and this frame would hold each other, and the batch with them
        present = following


def _begun(reading: Iterator[tuple[Any, Ticket]], start: Start) -> tuple[Callable[[], Any], Ticket] | None:
    for batch, ticket in reading:
        return start(batch), ticket
    return None


def can_be_copied(batch: Any) -> bool:
    """Whether all tensors in the batch can be found and pinned: plain ones, in host memory, in lists, tuples and dicts."""
    if isinstance(batch, Tensor):
        # of other strides, elements may share memory, into which torch would not write a pinned copy
        return (
            type(batch) is Tensor
            and batch.device.type == "cpu"
            and batch.layout is torch.strided
            and (batch.is_contiguous() or batch.is_contiguous(memory_format=torch.channels_last))
            and not batch.requires_grad
        )
    if type(batch) is dict:
        return all(map(can_be_copied, batch.values()))
    if isinstance(batch, list | tuple) and not hasattr(batch, "to"):  # a PackedSequence has it
        return all(map(can_be_copied, batch))
    return isinstance(batch, str | bytes | int | float | complex | None)


class CudaCopies:
    """Copies to a CUDA device, one after the other, on a stream of their own.

    Args:
        device: where to.
        dtype: what floating tensors are cast to there; None leaves them.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self._device = device
        self._dtype = dtype
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, batch: Any) -> Callable[[], Any]:
        """Begin to copy; what is returned lets the present stream wait for the copy, and gives it. The host waits for neither."""
        copied: list[Tensor] = []

        def copy(tensor: Tensor) -> Tensor:
            pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
            dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
            copied.append(pinned.to(self._device, non_blocking=True).to(dtype))
            return copied[-1]

        with torch.cuda.stream(self._stream):
            moved = converted(batch, self._device, self._dtype, copy)
            done = self._stream.record_event()

        def finish() -> Any:
            present = torch.cuda.current_stream(self._device)
            present.wait_event(done)
            for tensor in copied:
                tensor.record_stream(present)  # else its memory could be used for the next copy when Python drops it
            return moved

        return finish
