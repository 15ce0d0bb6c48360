"""Decorators, at the place where programs of 2020 import them from."""

from __future__ import annotations

from leyden.compat.decorators import data_loader
from leyden.errors import no_such_name

__all__ = ["data_loader"]


def __getattr__(name: str) -> object:
    absent = {
        "auto_move_data": "call self.transfer_batch_to_device(batch, self.device, 0) first, or trainer.predict(model, loader)"
    }
    return no_such_name(__name__, name, absent)
