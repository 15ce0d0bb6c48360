"""Accelerators: which kinds of device there are, whether they are here, and the one a run uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from leyden.errors import ConfigurationError, did_you_mean, reject


@dataclass(frozen=True)
class Accelerator:
    """A kind of device.

    Attributes:
        name: the Trainer's spelling.
        device_type: torch's spelling.
        count: how many of them this machine has; 0 means that it is not available.
        why_not: what to tell a user who asked for it where there is none.
    """

    name: str
    device_type: str
    count: Callable[[], int]
    why_not: str


def _cuda_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _mps_count() -> int:
    return int(torch.backends.mps.is_available())


def _tpu_count() -> int:
    from leyden.xla import count  # torch_xla is looked for where somebody asks for it

    return count()


ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator(
            "cuda", "cuda", _cuda_count, "torch.cuda.is_available() is False: no GPU, no driver, or a CPU build"
        ),
        Accelerator("mps", "mps", _mps_count, "torch.backends.mps.is_available() is False"),
        Accelerator("tpu", "xla", _tpu_count, "torch_xla is not installed (pip install 'torch_xla[tpu]')"),
        Accelerator("cpu", "cpu", lambda: 1, ""),
    )
}


@dataclass(frozen=True)
class DeviceChoice:
    """The devices of this machine that were chosen, one for each rank on it, and why, for `Trainer.explain`.

    Attributes:
        given: how many were asked for; None if that was left open.
    """

    devices: tuple[torch.device, ...]
    accelerator: str
    reason: str
    given: int | None = None

    @property
    def device(self) -> torch.device:
        """The first of them."""
        return self.devices[0]


def resolve_device(accelerator: object, devices: object, ranks: int | None = None) -> DeviceChoice:
    """Choose the devices from the Trainer's ``accelerator`` and ``devices``.

    Args:
        accelerator: "auto", "cpu", "cuda", "mps", "tpu", or "gpu" for cuda or mps, whichever is here.
        devices: "auto" for all GPUs, but one process on the CPU; a number, "2" or 2, on the CPU of processes; -1 for all;
            indices in a list ([0, 1]) or in a string with a comma ("1,").
        ranks: how many ranks of this machine somebody has started already; None if nobody has.

    Raises:
        ConfigurationError: for an unknown or absent accelerator, and for devices that do not exist.
    """
    name = accelerator.lower() if isinstance(accelerator, str) else accelerator
    known = ["auto", "gpu", *ACCELERATORS]
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(str(accelerator), known)
        reject("accelerator", accelerator, f"{', '.join(map(repr, known))}", hint)
    if name == "auto":
        kind, reason = _present()[0], f"accelerator='auto': the first of {', '.join(ACCELERATORS)} that is here"
    elif name == "gpu":
        gpus = [kind for kind in _present() if kind.name not in ("tpu", "cpu")]
        if not gpus:
            raise ConfigurationError(
                f"accelerator='gpu' was asked for, but there is none: {ACCELERATORS['cuda'].why_not}. "
                "Use accelerator='auto' to run on what is here."
            )
        kind, reason = gpus[0], "accelerator='gpu': the one that is here"
    else:
        kind, reason = ACCELERATORS[name], f"accelerator={name!r}: asked for"
        if not kind.count():
            raise ConfigurationError(
                f"accelerator={name!r} was asked for, but there is none here: {kind.why_not}. "
                "Use accelerator='auto' to run on what is here."
            )
    indices, given = _indices(devices, kind, ranks)
    chosen = tuple(
        torch.device(kind.device_type) if kind.name == "cpu" else torch.device(kind.device_type, index)
        for index in indices
    )
    return DeviceChoice(chosen, kind.name, reason, given)


def _present() -> list[Accelerator]:
    """The kinds of device that are here. A TPU counts where the environment names it: importing torch_xla takes seconds."""
    asked = [kind for kind in ACCELERATORS.values() if kind.name != "tpu" or os.environ.get("PJRT_DEVICE") == "TPU"]
    return [kind for kind in asked if kind.count()]


def _indices(devices: object, kind: Accelerator, ranks: int | None) -> tuple[list[int], int | None]:
    """The indices of the devices, and how many were asked for."""
    allowed = "'auto', a number of devices, -1 for all, or indices as in [0, 1] or '0,1'"
    wanted, count = devices, kind.count()
    if isinstance(wanted, str) and wanted != "auto":
        try:
            parts = [int(part) for part in wanted.split(",") if part.strip()]
        except ValueError:
            reject("devices", devices, allowed)
        wanted = parts if "," in wanted else parts[0] if parts else None
    if wanted == "auto":
        some = ranks if ranks is not None else count
        return list(range(some if kind.name == "cpu" else min(some, count))), None
    if type(wanted) is int and wanted == -1:
        return list(range(count)), count
    if type(wanted) is int and wanted > 0:
        if wanted > count and kind.name != "cpu":
            why = f"this machine has so many of accelerator {kind.name!r}"
            if kind.name == "tpu":
                why = "one process drives one TPU core"
            reject("devices", devices, f"1 to {count}, because {why}")
        return list(range(wanted)), wanted
    if isinstance(wanted, (list, tuple)) and wanted and all(type(index) is int for index in wanted):
        if len(set(wanted)) < len(wanted) or not all(0 <= index < count for index in wanted):
            reject("devices", devices, f"indices from 0 to {count - 1}, each once, for accelerator {kind.name!r}")
        return list(wanted), len(wanted)
    return reject("devices", devices, allowed)
