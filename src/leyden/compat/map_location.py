"""What ``map_location`` of `torch.load` may be beside a device, as the one device that a module is loaded to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from leyden.errors import ConfigurationError, reject


def device_of(map_location: Any) -> torch.device:
    """The device that all tensors go to. A checkpoint does not say where they were: each is read on the CPU first.

    Args:
        map_location: None, the CPU; a dict from device to device, which must name one to go to; a function of a storage and of
            where it was, which is asked with an empty storage on the CPU, so that ``lambda storage, loc: storage`` is the CPU.

    Raises:
        ConfigurationError: for anything else, and for a dict that names several devices to go to.
    """
    found: Any = map_location
    if callable(map_location):
        found = map_location(torch.empty(0).untyped_storage(), "cpu")
        found = getattr(found, "device", found)
    elif isinstance(map_location, Mapping):
        names = sorted({str(each) for each in map_location.values()})
        if len(names) > 1:
            raise ConfigurationError(
                f"map_location={map_location!r} names several devices: {', '.join(names)}. A module is loaded to one: name it, "
                f"as in map_location={names[0]!r}."
            )
        found = names[0] if names else None
    try:
        return torch.device("cpu" if found is None else found)
    except (RuntimeError, TypeError):
        allowed = "a device, such as 'cpu' or 'cuda:0', a dict to one, a function that returns the storage, or None"
        return reject("map_location", map_location, allowed)
