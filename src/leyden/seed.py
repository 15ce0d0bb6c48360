"""Seeding and isolating the random state of python, numpy and torch."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from leyden.errors import reject

SEED_VARIABLE = "PL_GLOBAL_SEED"
"""The environment variable that is read and set, under the name that scripts know."""


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed python's `random`, numpy (if installed) and torch on all devices.

    Args:
        seed: 0 to 2**32 - 1. None takes it from the environment variable ``PL_GLOBAL_SEED``, else 0.
        workers: accepted for compatibility: torch seeds python, numpy and torch in every loader worker from
            the main process's state, each worker differently.
        verbose: whether to print the seed.

    Returns:
        The seed that was set.

    Raises:
        ConfigurationError: if the seed is not an integer in that range.
    """
    given = os.environ.get(SEED_VARIABLE, "0") if seed is None else seed
    try:
        value = int(given)
    except (TypeError, ValueError):
        value = -1
    if isinstance(given, (bool, float)) or not 0 <= value < 2**32:
        reject("seed", given, "an integer from 0 to 4294967295")
    os.environ[SEED_VARIABLE] = str(value)
    random.seed(value)
    if importlib.util.find_spec("numpy") is not None:
        import numpy as np

        np.random.seed(value)
    torch.manual_seed(value)
    if verbose:
        print(f"Seed set to {value}")
    return value


def capture_random_state(device: torch.device | None = None) -> dict[str, Any]:
    """Return the state of every generator that training draws from, as plain data and tensors."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if importlib.util.find_spec("numpy") is not None:
        import numpy as np

        name, keys, position, has_gauss, cached = np.random.get_state()
        state["numpy"] = [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)]
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device is not None and device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Take back what `capture_random_state` returned; generators of absent devices are left alone."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state and importlib.util.find_spec("numpy") is not None:
        import numpy as np

        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if "mps" in state and device is not None and device.type == "mps":
        torch.mps.set_rng_state(state["mps"].cpu())


@contextmanager
def isolated_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Leave every generator after this context as it was before."""
    state = capture_random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)
