"""Arguments of callbacks of former days in the words of today. It imports no callback, for they import it."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from typing import Any, Literal

from leyden.compat.once import tell
from leyden.errors import ConfigurationError, UnknownArgumentError, did_you_mean, reject

CLASSES = {"LearningRateLogger": "LearningRateMonitor"}
_ELSEWHERE = {"save_best_only": "save_top_k=1, which keeps the best by monitor"}
_TEMPLATE = "{epoch}"  # what files were called in a folder that was given


@dataclass
class CheckpointArguments:
    """Those arguments of `ModelCheckpoint` that former ones set."""

    dirpath: str | os.PathLike[str] | None
    filename: str | None
    monitor: str | None
    mode: Any
    save_top_k: int
    every_n_epochs: int | None


def class_of_today(name: str) -> str:
    """What a callback is called today, told once."""
    tell(f"leyden.callbacks.{name}", f"leyden.callbacks.{CLASSES[name]}")
    return CLASSES[name]


def checkpoint_arguments(kind: type, former: dict[str, Any], given: CheckpointArguments) -> CheckpointArguments:
    """Translate ``filepath``, ``prefix``, ``period``, ``every_n_val_epochs``, ``mode="auto"`` and ``save_top_k=True``.

    ``filepath`` was a folder that exists, or ends with a slash, or else a folder and a template. Without ``monitor`` the best by
    ``val_loss`` were kept; that is done here where several are to be kept, which needs a value to rank by.

    Args:
        kind: the class, for messages.
        former: names that it does not have.
        given: its own; changed, and returned.

    Raises:
        ConfigurationError: for a name that never was one, and where two contradict each other.
    """
    _check_names(kind, former, ("filepath", "prefix", "period", "every_n_val_epochs"))
    spelt, before = dict(former), dict(vars(given))
    if spelt.get("filepath") is not None:
        _refuse_both("filepath", spelt, {"dirpath": given.dirpath, "filename": given.filename})
        given.dirpath, given.filename = _split(spelt["filepath"])
    if spelt.get("prefix"):
        given.filename = f"{spelt['prefix']}{given.filename or _TEMPLATE}"
    for name in ("period", "every_n_val_epochs"):
        if spelt.get(name) is not None:
            every = max(1, spelt[name]) if type(spelt[name]) is int else reject(name, spelt[name], "a number of epochs")
            _refuse_both(name, spelt, {"every_n_epochs": given.every_n_epochs})
            given.every_n_epochs = every
    if isinstance(given.save_top_k, bool):
        spelt["save_top_k"], given.save_top_k = given.save_top_k, int(given.save_top_k)
    if given.monitor is None and given.save_top_k > 1:
        given.monitor = "val_loss"
    if given.mode == "auto":
        spelt["mode"], given.mode = "auto", auto_mode(given.monitor or "val_loss")
    elif "filepath" in former and given.monitor is not None and given.mode == "min":
        given.mode = auto_mode(given.monitor)  # the default of then
    changed = {name: value for name, value in vars(given).items() if value != before[name]}
    by_default = ", and monitor='val_loss' for what was the default" if former and given.monitor is None else ""
    _tell(kind.__name__, spelt, changed, by_default)
    return given


def stopping_arguments(kind: type, former: dict[str, Any], monitor: str | None, mode: Any) -> tuple[str, Any]:
    """Translate a ``monitor`` that was left out, and ``mode="auto"``, for `EarlyStopping`.

    Args:
        kind: the class, for messages.
        former: names that it does not have; there were none.
        monitor: None if it was left out.
        mode: "auto" goes by the name: high is good if it has "acc" in it or begins with "fmeasure".

    Returns:
        ``monitor`` and ``mode``.

    Raises:
        ConfigurationError: for a name that never was one.
    """
    _check_names(kind, former, ())
    spelt: dict[str, Any] = {}
    today: dict[str, Any] = {}
    if monitor is None:
        monitor = today["monitor"] = "val_loss"
    if mode == "auto":
        spelt["mode"] = "auto"
        mode = today["mode"] = auto_mode(monitor)
    if today:
        _tell(kind.__name__, spelt, today)
    return monitor, mode


def auto_mode(monitor: str) -> Literal["min", "max"]:
    """Whether low or high values are good, by the name of the metric; the default of then."""
    return "max" if "acc" in monitor or monitor.startswith("fmeasure") else "min"


def _split(filepath: Any) -> tuple[str, str]:
    if not isinstance(filepath, str | os.PathLike):
        reject("filepath", filepath, "a path")
    path = os.fspath(filepath)
    if os.path.isdir(path) or not os.path.basename(path):
        return path, _TEMPLATE
    folder, name = os.path.split(path)
    return folder or ".", name


def _refuse_both(name: str, spelt: dict[str, Any], today: dict[str, Any]) -> None:
    for other, value in today.items():
        if value is not None:
            raise ConfigurationError(
                f"{name}={spelt[name]!r} and {other}={value!r} contradict each other. Give {other} alone."
            )


def _check_names(kind: type, former: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in former:
        if name not in known:
            if name in _ELSEWHERE:
                raise UnknownArgumentError(f"{kind.__name__} has no argument {name!r}. Write {_ELSEWHERE[name]}.")
            own = [each for each in inspect.signature(kind).parameters if each != "former"]
            raise UnknownArgumentError(f"{kind.__name__} has no argument {name!r}.{did_you_mean(name, [*own, *known])}")


def _tell(kind: str, spelt: dict[str, Any], today: dict[str, Any], more: str = "") -> None:
    written = {name: value for name, value in today.items() if value is not None}
    tell(_call(kind, spelt), _call(kind, written) + more)  # where the callback was made


def _call(kind: str, arguments: dict[str, Any]) -> str:
    return f"{kind}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
