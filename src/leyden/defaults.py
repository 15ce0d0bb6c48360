"""What a Trainer adds by itself: callbacks, loggers, torch's global switches, and where checkpoints are looked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leyden.callbacks import Callback, ModelCheckpoint, ModelSummary, ProgressBar, RichProgressBar, Timer
from leyden.errors import CheckpointError, ConfigurationError, reject
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
    if settings.max_time is not None:
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


def find_checkpoint(path: Any, callback: ModelCheckpoint | None, root: str, verb: str) -> str | None:
    """The file that ``ckpt_path`` means.

    Args:
        path: None, "best", "last", or a path.
        callback: the first `ModelCheckpoint`.
        root: the Trainer's ``default_root_dir``.
        verb: what it is for.

    Returns:
        A path; None to go on without: none was asked for, or "last" in `fit` where there is none yet.

    Raises:
        CheckpointError: if there is no such file.
    """
    if path is None:
        return None
    if path == "best":
        if callback is None or not callback.best_model_path:
            raise CheckpointError(
                f"{verb}(ckpt_path='best'): no best checkpoint is known. It is known after fit with a ModelCheckpoint that has "
                "saved; give a path otherwise."
            )
        return callback.best_model_path
    if path == "last":
        folders = [Path(root, "checkpoints"), *Path(root, "lightning_logs").glob("version_*/checkpoints")]
        if callback is not None and callback.dirpath:
            folders = [Path(callback.dirpath), *_earlier_versions(Path(callback.dirpath))]
        candidates = [file for folder in folders for file in folder.glob("last*.ckpt")]
        if callback is not None and callback.last_model_path:
            candidates.append(Path(callback.last_model_path))
        there = sorted((file for file in candidates if file.is_file()), key=_changed_at)
        if there:
            return os.fspath(there[-1])
        where = ", ".join(dict.fromkeys(map(os.fspath, folders)))
        if verb == "fit":
            print(f"ckpt_path='last': there is none in {where}; training starts anew.")
            return None
        raise CheckpointError(
            f"{verb}(ckpt_path='last'): there is no last*.ckpt in {where}. ModelCheckpoint(save_last=True)."
        )
    if not isinstance(path, (str, os.PathLike)):
        reject("ckpt_path", path, "None, 'best', 'last', or a path")
    if not Path(path).is_file():
        raise CheckpointError(f"{verb}(ckpt_path={os.fspath(path)!r}): there is no such file.")
    return os.fspath(path)


def _earlier_versions(folder: Path) -> Iterable[Path]:
    """Where earlier runs kept theirs, if this run keeps its checkpoints beside its logs: a new run has a new version."""
    if folder.name != "checkpoints" or not folder.parent.name.startswith("version_"):
        return ()
    return sorted(folder.parent.parent.glob("version_*/checkpoints"))


def _changed_at(file: Path) -> int:
    return file.stat().st_mtime_ns


@contextmanager
def global_switches(settings: Settings) -> Iterator[None]:
    """Set torch's global switches for one verb, and set them back afterwards."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_benchmark = torch.backends.cudnn.benchmark
    if settings.deterministic is not None:
        torch.use_deterministic_algorithms(bool(settings.deterministic), warn_only=settings.deterministic == "warn")
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, by name
    if settings.benchmark is not None or settings.deterministic:
        torch.backends.cudnn.benchmark = bool(settings.benchmark)
    try:
        with torch.autograd.set_detect_anomaly(settings.detect_anomaly or torch.is_anomaly_enabled()):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = cudnn_benchmark


def is_interactive() -> bool:
    """Whether a person types at this interpreter, so that a stop should give the prompt back."""
    return hasattr(sys, "ps1") or ("IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None)
