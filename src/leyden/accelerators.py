"""Kinds of device, to be asked whether they are here and how many there are: ``CUDAAccelerator.is_available()``.

A `Trainer` takes their names (``accelerator="cuda"``); `leyden.device` chooses among them.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

import torch

from leyden.device import ACCELERATORS, resolve_device
from leyden.errors import reject

__all__ = [
    "Accelerator",
    "CPUAccelerator",
    "CUDAAccelerator",
    "MPSAccelerator",
    "XLAAccelerator",
    "find_usable_cuda_devices",
]


class Accelerator(ABC):
    """A kind of device; the subclasses are the kinds that there are.

    Attributes:
        key: the Trainer's name of it.
    """

    key: ClassVar[str]

    @classmethod
    def name(cls) -> str:
        """The Trainer's name of this kind."""
        return cls.key

    @classmethod
    def is_available(cls) -> bool:
        """Whether this machine has such a device that torch can use."""
        return ACCELERATORS[cls.key].count() > 0

    @classmethod
    def auto_device_count(cls) -> int:
        """How many devices ``devices="auto"`` takes."""
        return ACCELERATORS[cls.key].count()

    @classmethod
    def get_parallel_devices(cls, devices: Any) -> list[torch.device]:
        """The torch devices that the Trainer's ``devices`` means, one for each process.

        Raises:
            ConfigurationError: for devices that are not here.
        """
        return list(resolve_device(cls.key, devices).devices)

    @classmethod
    def get_device_stats(cls, device: torch.device | str | int) -> dict[str, Any]:
        """Figures of a device as torch keeps them: its memory on CUDA and MPS; nothing elsewhere."""
        return {}


class CPUAccelerator(Accelerator):
    """The processor; ``devices=n`` are n processes on it."""

    key = "cpu"


class CUDAAccelerator(Accelerator):
    """NVIDIA's GPUs, and AMD's in a ROCm build of torch."""

    key = "cuda"

    @classmethod
    def get_device_stats(cls, device: torch.device | str | int) -> dict[str, Any]:
        """See `torch.cuda.memory_stats`."""
        return torch.cuda.memory_stats(device)


class MPSAccelerator(Accelerator):
    """The GPU of an Apple chip."""

    key = "mps"

    @classmethod
    def get_device_stats(cls, device: torch.device | str | int) -> dict[str, Any]:
        """The memory, in bytes, that tensors have and that the driver has."""
        return {
            "current_allocated_memory": torch.mps.current_allocated_memory(),
            "driver_allocated_memory": torch.mps.driver_allocated_memory(),
        }


class XLAAccelerator(Accelerator):
    """TPUs, through torch_xla."""

    key = "tpu"


_KINDS: dict[str, type[Accelerator]] = {
    kind.key: kind for kind in (CPUAccelerator, CUDAAccelerator, MPSAccelerator, XLAAccelerator)
}


def accelerator_of(name: str) -> Accelerator:
    """The kind of device that the Trainer calls ``name``."""
    return _KINDS[name]()


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """The indices of GPUs on which a tensor can be made: those that are not in another process's exclusive use.

    Args:
        num_devices: how many are wanted; -1 for all.

    Raises:
        ConfigurationError: if there are fewer.
    """
    usable = []
    for index in range(ACCELERATORS["cuda"].count()) if num_devices else ():
        try:
            torch.zeros(1, device=torch.device("cuda", index))
        except RuntimeError:  # in use, or out of memory
            continue
        usable.append(index)
        if len(usable) == num_devices:
            return usable
    if num_devices > len(usable):
        reject(
            "num_devices", num_devices, f"a number up to {len(usable)}, which are here and free, or -1 for all of them"
        )
    return usable
