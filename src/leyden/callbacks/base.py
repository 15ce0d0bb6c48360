"""`Callback`, at the place where programs of 2020 to 2022 import it from."""

from __future__ import annotations

from leyden.callbacks.callback import Callback

__all__ = ["Callback"]
