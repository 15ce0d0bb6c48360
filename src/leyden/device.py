"""Accelerators: which kinds of device there are, whether they are here, and the one a run uses."""

from __future__ import annotations

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


ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator(
            "cuda", "cuda", _cuda_count, "torch.cuda.is_available() is False: no GPU, no driver, or a CPU build"
        ),
        Accelerator("mps", "mps", _mps_count, "torch.backends.mps.is_available() is False"),
        Accelerator("cpu", "cpu", lambda: 1, ""),
    )
}


@dataclass(frozen=True)
class DeviceChoice:
    """The device that was chosen and why, for `Trainer.explain`."""

    device: torch.device
    accelerator: str
    reason: str


def resolve_device(accelerator: object, devices: object) -> DeviceChoice:
    """Choose the device from the Trainer's ``accelerator`` and ``devices``.

    Args:
        accelerator: "auto", "cpu", "cuda", "mps", or "gpu" for whichever of the last two is here.
        devices: "auto", 1, "1", -1, an index in a list ([1]) or in a string with a comma ("1,").

    Raises:
        ConfigurationError: for an unknown or absent accelerator, for a device index that does not exist, and for
            several devices, which need one process each.
    """
    name = accelerator.lower() if isinstance(accelerator, str) else accelerator
    known = ["auto", "gpu", *ACCELERATORS]
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(str(accelerator), known)
        reject("accelerator", accelerator, f"{', '.join(map(repr, known))}", hint)
    present = [kind for kind in ACCELERATORS.values() if kind.count()]
    if name == "auto":
        kind, reason = present[0], f"accelerator='auto': the first of {', '.join(ACCELERATORS)} that is here"
    elif name == "gpu":
        gpus = [kind for kind in present if kind.name != "cpu"]
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
    index = _device_index(devices, kind)
    device = torch.device(kind.device_type) if kind.name == "cpu" else torch.device(kind.device_type, index)
    return DeviceChoice(device, kind.name, reason)


def _device_index(devices: object, kind: Accelerator) -> int:
    allowed = "'auto', 1, or one index as in [0] or '0,'"
    wanted = devices
    if isinstance(wanted, str) and wanted != "auto":
        try:
            parts = [int(part) for part in wanted.split(",") if part.strip()]
        except ValueError:
            reject("devices", devices, allowed)
        wanted = parts if "," in wanted else parts[0] if parts else None
    if wanted == "auto" or (type(wanted) is int and wanted == 1):
        return 0
    if wanted == -1:
        wanted = kind.count()
    if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted > 0:
        if wanted == 1:
            return 0
        _refuse_several(devices)
    if isinstance(wanted, (list, tuple)) and wanted and all(type(index) is int for index in wanted):
        if len(wanted) > 1:
            _refuse_several(devices)
        if not 0 <= wanted[0] < kind.count():
            reject("devices", devices, f"an index from 0 to {kind.count() - 1} for accelerator {kind.name!r}")
        return int(wanted[0])
    return reject("devices", devices, allowed)


def _refuse_several(devices: object) -> None:
    raise ConfigurationError(
        f"devices={devices!r} asks for several devices, which need one process each; this version trains on one. "
        "Use devices=1."
    )
