"""Every test here begins with no former spelling told of; Lightning can be imported, and told to be quiet."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from leyden.compat.once import forget
from lightning_files import without_remarks


@pytest.fixture(autouse=True)
def _tell_anew() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def quiet_lightning() -> Iterator[None]:
    """Lightning warns and advises of many things that are not the point here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.ERROR)
        yield
    for each, level in zip(loggers, levels, strict=True):
        each.setLevel(level)


@pytest.fixture(scope="module")
def lightning() -> Any:
    with without_remarks():
        import lightning.pytorch

        return lightning.pytorch
