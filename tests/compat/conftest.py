"""Every test here begins with no former spelling told of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from leyden.compat.once import forget


@pytest.fixture(autouse=True)
def _tell_anew() -> Iterator[None]:
    forget()
    yield
    forget()
