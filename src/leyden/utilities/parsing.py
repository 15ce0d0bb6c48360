"""`AttributeDict`: hyperparameters, also by attribute."""

from __future__ import annotations

from leyden.hparams import AttributeDict

__all__ = ["AttributeDict"]
