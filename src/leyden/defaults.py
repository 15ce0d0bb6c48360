"""What a Trainer adds by itself: callbacks, loggers, torch's global switches."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from leyden.callbacks import (
    Callback,
    ModelCheckpoint,
    ModelSummary,
    Preemption,
    ProgressBar,
    RichProgressBar,
    Timer,
)
from leyden.callbacks.preemption import describe
from leyden.errors import ConfigurationError, reject
from leyden.memory import give_back_freed_memory, keep_freed_memory
from leyden.settings import Settings

if TYPE_CHECKING:
    from leyden.loggers import Logger


def default_callbacks(given: Any, settings: Settings) -> list[Callback]:
    """The user's callbacks, and those that the settings ask for; `ModelCheckpoint` comes last.

    Raises:
        ConfigurationError: if something else than callbacks is given, or a callback and an argument contradict each
            other.
    """
    if given is None:
        callbacks: list[Any] = []
    else:
        callbacks = list(given) if isinstance(given, (list, tuple)) else [given]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            hint = f" This is the class: write {callback.__name__}(…)." if isinstance(callback, type) else ""
            reject("callbacks", callback, "a leyden.Callback, or a list of them", hint)
    for kind, name, make in (
        (ModelSummary, "enable_model_summary", ModelSummary),
        (ProgressBar, "enable_progress_bar", RichProgressBar),
        (ModelCheckpoint, "enable_checkpointing", ModelCheckpoint),
    ):
        wanted = getattr(settings, name)
        present = any(isinstance(callback, kind) for callback in callbacks)
        if wanted is False and present and not settings.fast_dev_run:
            raise ConfigurationError(
                f"{name}=False contradicts the {kind.__name__} among callbacks. Leave one of the two out."
            )
        if wanted is not False and not present:
            callbacks.append(make())
            settings.reasons.append((f"callback {make.__name__}", f"added, because {name}=False was not given"))
    if settings.fast_dev_run:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
    elif not settings.barebones and not any(isinstance(callback, Preemption) for callback in callbacks):
        callbacks.append(Preemption(**(settings.environment.preemption if settings.environment is not None else {})))
        settings.reasons.append(("callback Preemption", f"added: {describe(callbacks[-1])}"))
    if settings.max_time is not None and not any(isinstance(callback, Timer) for callback in callbacks):
        callbacks.append(Timer(duration=settings.max_time))
    return ordered(callbacks)


def ordered(callbacks: Iterable[Callback]) -> list[Callback]:
    """The same callbacks with `ModelCheckpoint` last, so that it saves what the others have done.

    Raises:
        ConfigurationError: if two of them would keep their state under the same key.
    """
    found = sorted(callbacks, key=lambda callback: isinstance(callback, ModelCheckpoint))
    keys: dict[str, Callback] = {}
    for callback in found:
        if type(callback).state_dict is not Callback.state_dict and callback.state_key in keys:
            raise ConfigurationError(
                f"Two callbacks have the state_key {callback.state_key!r}, so their states would overwrite each other in a "
                "checkpoint. Leave one out, or override state_key."
            )
        keys[callback.state_key] = callback
    return found


def with_modules_own(callbacks: Sequence[Callback], own: Any) -> list[Callback]:
    """The Trainer's callbacks, those of a class replaced that the module brings itself."""
    extra = [own] if isinstance(own, Callback) else list(own or [])
    for callback in extra:
        if not isinstance(callback, Callback):
            raise ConfigurationError(
                f"configure_callbacks returned {callback!r}. Allowed: callbacks, or a list of them."
            )
    kinds = {type(callback) for callback in extra}
    return ordered([*(callback for callback in callbacks if type(callback) not in kinds), *extra])


def default_loggers(given: Any, settings: Settings, root: str) -> list[Logger]:
    """The loggers: those given, TensorBoard (else CSV) by default, silent ones in a trial run."""
    from leyden.loggers import Logger, default_logger
    from leyden.loggers.dummy import DummyLogger

    if given is False or (settings.barebones and given is None):
        return []
    if settings.barebones:
        raise ConfigurationError("barebones=True turns logging off, but a logger was given. Leave one of them out.")
    if settings.fast_dev_run:
        return [DummyLogger()]
    if given is None or given is True:
        logger = default_logger(root)
        settings.reasons.append(
            (f"logger {type(logger).__name__}", "default: TensorBoard if it is installed, else CSV")
        )
        return [logger]
    loggers = [given] if isinstance(given, Logger) else given
    if not isinstance(loggers, (list, tuple)) or not all(isinstance(logger, Logger) for logger in loggers):
        reject("logger", given, "True, False, a leyden.loggers.Logger, or a list of them")
    return list(loggers)


@contextmanager
def global_switches(settings: Settings, device: torch.device) -> Iterator[None]:
    """Set torch's global switches for one verb, and set them back afterwards; on the CPU let freed memory be kept meanwhile."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_benchmark = torch.backends.cudnn.benchmark
    if settings.deterministic is not None:
        torch.use_deterministic_algorithms(bool(settings.deterministic), warn_only=settings.deterministic == "warn")
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, by name
    if settings.benchmark is not None or settings.deterministic:
        torch.backends.cudnn.benchmark = bool(settings.benchmark)
    compiler: AbstractContextManager[Any] = nullcontext()
    if settings.compile:
        from leyden.compiled.backend import compiler_switches  # torch's compiler takes a second to import

        compiler = compiler_switches()
    keeps_memory = device.type == "cpu" and keep_freed_memory()
    try:
        with torch.autograd.set_detect_anomaly(settings.detect_anomaly or torch.is_anomaly_enabled()), compiler:
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = cudnn_benchmark
        if keeps_memory:
            give_back_freed_memory()


def is_interactive() -> bool:
    """Whether a person types at this interpreter, so that a stop should give the prompt back."""
    return hasattr(sys, "ps1") or ("IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None)
