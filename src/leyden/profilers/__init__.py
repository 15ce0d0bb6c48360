"""Profilers: what takes the time of a run, by action. Each is loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from leyden.errors import did_you_mean, no_such_name, reject

if TYPE_CHECKING:
    from leyden.profilers.advanced import AdvancedProfiler
    from leyden.profilers.profiler import PassThroughProfiler, Profiler
    from leyden.profilers.pytorch import PyTorchProfiler
    from leyden.profilers.simple import SimpleProfiler
    from leyden.profilers.throughput import ThroughputProfiler

__all__ = [
    "AdvancedProfiler",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
    "ThroughputProfiler",
]

_MODULES = {
    "AdvancedProfiler": "advanced",
    "PassThroughProfiler": "profiler",
    "Profiler": "profiler",
    "PyTorchProfiler": "pytorch",
    "SimpleProfiler": "simple",
    "ThroughputProfiler": "throughput",
}
_NAMES = {
    "simple": "SimpleProfiler",
    "advanced": "AdvancedProfiler",
    "pytorch": "PyTorchProfiler",
    "throughput": "ThroughputProfiler",
}


def resolve_profiler(profiler: object) -> Profiler:
    """Turn the Trainer's ``profiler`` argument into a `Profiler`.

    Args:
        profiler: None, "simple", "advanced", "pytorch", "throughput", or a `Profiler`.

    Returns:
        The profiler; for None one that measures nothing.

    Raises:
        ConfigurationError: for anything else; the message lists what is known.
    """
    from leyden.profilers.profiler import PassThroughProfiler, Profiler

    if profiler is None:
        return PassThroughProfiler()
    if isinstance(profiler, Profiler):
        return profiler
    if not isinstance(profiler, str) or profiler not in _NAMES:
        hint = did_you_mean(profiler, _NAMES) if isinstance(profiler, str) else ""
        reject("profiler", profiler, f"None, {', '.join(map(repr, _NAMES))}, or a leyden.profilers.Profiler", hint)
    made = getattr(import_module(f"{__name__}.{profiler}"), _NAMES[profiler])()
    assert isinstance(made, Profiler)
    return made


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        no_such_name(__name__, name, {"XLAProfiler": "use torch_xla.debug.profiler itself"})
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next access is a plain dict look-up
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
