"""Seeding and isolating the random state of python, numpy and torch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from leyden import xla
from leyden.errors import reject

SEED_VARIABLE = "PL_GLOBAL_SEED"
"""The environment variable that is read and set, under the name that scripts know."""


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed python's `random`, numpy (if installed) and torch on all devices.

    Args:
        seed: 0 to 2**32 - 1. None takes it from the environment variable ``PL_GLOBAL_SEED``, else 0.
        workers: accepted for compatibility: python, numpy and torch are seeded in every loader worker in any case, for
            map-style datasets anew for each batch.
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
    xla.seed(value)
    if verbose:
        print(f"Seed set to {value}")
    return value


def capture_random_state(device: torch.device | None = None) -> dict[str, Any]:
    """Return the state of every generator that training draws from, as plain data and tensors."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, torch.tensor(words, dtype=torch.int64).to(torch.uint32), gauss],
        "torch": torch.default_generator.get_state(),
    }
    if (numpy := _numpy()) is not None:
        found = numpy.random.get_state(legacy=False)
        if found["bit_generator"] == "MT19937":  # as a tensor, like the rest; others are a few integers
            found["state"]["key"] = torch.from_numpy(found["state"]["key"].copy())
        state["numpy"] = found
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device is not None and device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    elif device is not None and device.type == "xla":
        state["xla"] = xla.random_state()
    return state


def restore_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Take back what `capture_random_state` returned; generators that are not in it, or not here, are left alone."""
    if "python" in state:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
    if "torch" in state:
        torch.default_generator.set_state(state["torch"].cpu())
    if "numpy" in state and importlib.util.find_spec("numpy") is not None:
        import numpy

        given = state["numpy"]
        inner = {
            name: part.numpy() if isinstance(part, torch.Tensor) else part for name, part in given["state"].items()
        }
        numpy.random.set_state({**given, "state": inner})
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if "mps" in state and device is not None and device.type == "mps":
        torch.mps.set_rng_state(state["mps"].cpu())
    if "xla" in state and device is not None and device.type == "xla":
        xla.set_random_state(state["xla"])


@contextmanager
def isolated_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Leave every generator after this context as it was before."""
    state = capture_random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)


def derived_seed(*parts: object) -> int:
    """A seed of 63 bits that is always the same for the same ``parts`` (integers, strings, bytes), and else another."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else f"{part};".encode())
    return int.from_bytes(digest.digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seed python, numpy (if it is imported) and torch on the CPU: 7 µs, against 120 µs of `torch.manual_seed`."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if (numpy := _numpy()) is not None:
        numpy.random.seed(seed & 0xFFFF_FFFF)


class RandomStream:
    """Random numbers apart from the program's: in its context, python, numpy and torch's CPU generator draw from here.

    Entering and leaving costs about 25 µs. Numpy's generator is exchanged, not copied, which would cost three times
    that; the price is that numpy forgets the second of a pair of Gaussian numbers (``np.random.randn``) on each exchange.

    Args:
        seed: where the stream begins.
    """

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        self._python: Any = None
        self._torch: Any = None
        self._numpy: Any = None
        self._outer: tuple[Any, Any, Any] = (None, None, None)

    def begin(self, seed: int) -> RandomStream:
        """Begin anew at ``seed`` when the context is entered next; for one batch after the other."""
        self._seed = seed
        return self

    def __enter__(self) -> None:
        numpy = _numpy()
        outer = None
        if numpy is not None:
            outer = numpy.random.get_bit_generator()
            self._numpy = self._numpy or numpy.random.MT19937(0)
            numpy.random.set_bit_generator(self._numpy)
        self._outer = (random.getstate(), torch.default_generator.get_state(), outer)
        if self._seed is not None:
            seed_all(self._seed)
            self._seed = None
        else:
            random.setstate(self._python)
            torch.default_generator.set_state(self._torch)

    def __exit__(self, *_: object) -> None:
        self._python, self._torch = random.getstate(), torch.default_generator.get_state()
        python, torch_state, numpy_generator = self._outer
        random.setstate(python)
        torch.default_generator.set_state(torch_state)
        if numpy_generator is not None:
            sys.modules["numpy"].random.set_bit_generator(numpy_generator)


def exchange_numpy_generator() -> None:
    """Do to numpy what a `RandomStream` does to it, where a worker process did the drawing instead."""
    if (numpy := _numpy()) is not None:
        numpy.random.set_bit_generator(numpy.random.get_bit_generator())


def _numpy() -> Any:
    """Numpy if the program has imported it: who has not cannot have drawn from it."""
    return sys.modules.get("numpy")
