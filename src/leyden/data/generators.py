"""Random generators that samplers and datasets own: found among their attributes, so that they can be kept and seeded."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

from leyden.seed import derived_seed

_MAX_DEPTH = 4
_MAX_ITEMS = 100  # of a list or dict of transforms; longer ones hold data
_OF_TORCH = frozenset(vars(torch.nn.Module()))


def owned_generators(*owners: Any, but: Any = None) -> dict[str, Any]:
    """Find the generators of torch, numpy and python among the attributes of ``owners``, and of what these hold.

    Args:
        owners: samplers, a dataset, a collate function; None is passed over.
        but: an object that is not looked into.

    Returns:
        Generators by a name that is the same in every process, such as ``"0.transform.rng"``.
    """
    found: dict[str, Any] = {}
    seen = {id(but)}
    for number, owner in enumerate(owners):
        for name, generator in _walk(owner, str(number), _MAX_DEPTH, seen):
            found[name] = generator
    return found


def module_generators(module: torch.nn.Module) -> dict[str, Any]:
    """Find the generators among the attributes of a module and of all modules in it, by dotted names."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for path, part in module.named_modules():
        for key in [key for key in vars(part) if key not in _OF_TORCH]:
            found.update(_walk(vars(part)[key], f"{path}.{key}", _MAX_DEPTH - 1, seen))
    return found


def _walk(value: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(value) in seen or isinstance(
        value, (str, bytes, int, float, type(None), torch.Tensor, torch.nn.Module, type)
    ):
        return
    if depth < _MAX_DEPTH and type(value).__module__.partition(".")[0] == "leyden":
        return  # somebody kept the Trainer, through which everything could be reached
    seen.add(id(value))
    if _is_generator(value):
        yield name, value
        return
    if depth == 0:
        return
    if isinstance(value, (list, tuple)):
        parts: Any = enumerate(value) if len(value) <= _MAX_ITEMS else ()
    elif isinstance(value, dict):
        parts = value.items() if len(value) <= _MAX_ITEMS else ()
    else:
        parts = getattr(value, "__dict__", {}).items()
    for key, part in list(parts):
        yield from _walk(part, f"{name}.{key}", depth - 1, seen)


def _is_generator(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return not isinstance(value, random.SystemRandom)  # which has no state
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def generator_states(generators: dict[str, Any]) -> dict[str, Any]:
    """The states of ``generators`` as plain data and tensors."""
    return {name: _state(generator) for name, generator in generators.items()}


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def set_generator_states(generators: dict[str, Any], states: dict[str, Any]) -> None:
    """Take back what `generator_states` returned; generators that are gone or of another kind are left alone."""
    for name, generator in generators.items():
        state = states.get(name)
        if isinstance(generator, torch.Generator) and isinstance(state, torch.Tensor):
            generator.set_state(state.cpu())
        elif isinstance(generator, random.Random) and isinstance(state, (tuple, list)):
            version, words, gauss = state
            generator.setstate((version, tuple(words), gauss))
        elif isinstance(state, dict) and hasattr(generator, "bit_generator"):
            generator.bit_generator.state = state
        elif isinstance(state, dict) and hasattr(generator, "set_state"):
            generator.set_state(state)


def seed_generators(generators: dict[str, Any], seed: int) -> None:
    """Begin each of ``generators`` anew, each elsewhere, as ``seed`` says."""
    for name, generator in generators.items():
        own = derived_seed(seed, name)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, random.Random):
            generator.seed(own)
        elif hasattr(generator, "bit_generator"):
            generator.bit_generator.state = type(generator.bit_generator)(own).state
        else:
            generator.seed(own & 0xFFFF_FFFF)
