"""`move_data_to_device`, at the place where programs of 2020 and 2021 import it from."""

from __future__ import annotations

from leyden.data.transfer import move_to_device as move_data_to_device

__all__ = ["move_data_to_device"]
