"""The base class of loggers, and what file loggers share: a version folder, plain hyperparameters, YAML."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import functools
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leyden.errors import MetricError

if TYPE_CHECKING:
    from leyden.callbacks.callback import Callback

_VERSION = re.compile(r"version_(\d+)")
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
# YAML 1.1 reads these, unquoted, as booleans or nulls.
_YAML_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
# JSON leaves these alone in a string, but YAML takes them for line breaks, or refuses them.
_YAML_BREAKS = {character: f"\\u{character:04x}" for character in (*range(0x7F, 0xA0), 0x2028, 0x2029, 0xFEFF)}


class Logger(ABC):
    """Receives what a run logs. In a distributed run only the logger of rank zero is asked to write.

    A logger does nothing, and makes no folder, before it is first asked to write something.
    """

    @property
    @abstractmethod
    def name(self) -> str | None:
        """The name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Which run of the experiment this is."""

    @property
    def save_dir(self) -> str | None:
        """The folder below which everything is saved, or ``None`` if nothing is saved in files."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The folder of this run, or ``None`` if nothing is saved in files."""
        return None

    @property
    def experiment(self) -> Any:
        """The object underneath, for everything that this interface does not cover."""
        return None

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics.

        Args:
            metrics: numbers by name.
            step: number of optimizer steps done.
        """

    @abstractmethod
    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Write hyperparameters, and metrics that belong to them."""

    def log_graph(self, model: torch.nn.Module, input_array: Any = None) -> None:
        """Write the model's graph, if this logger can and was asked to."""

    def save(self) -> None:
        """Bring everything logged so far to where it is kept."""

    def finalize(self, status: str) -> None:
        """Save at the end of a run.

        Args:
            status: ``"success"``, ``"failed"`` or ``"interrupted"``.
        """
        self.save()

    def after_save_checkpoint(self, checkpoint_callback: Callback) -> None:
        """Called after a checkpoint was written."""

    def adopt_version(self, version: int | str | None) -> None:
        """Be a silent copy of rank zero's logger: take its version, and write nothing from here on.

        Args:
            version: None in a process that only watches over the ranks, and never logs.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return, as plain data, how far this logger has written; it becomes part of a checkpoint.

        Called whenever the state of a run is captured. What was logged so far should then be where it is kept: a process that is
        killed later goes on from here.
        """
        return {}

    def resume_from(self, global_step: int, state: Mapping[str, Any]) -> None:
        """Learn that the run goes on from a checkpoint, before anything is logged.

        What a killed process logged after that checkpoint will be logged again: a logger that goes on in the same place should
        drop it.

        Args:
            global_step: optimizer steps that were done at the checkpoint.
            state: what `state_dict` returned then; empty if the checkpoint has none for this logger.
        """


def rank_zero_experiment(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a logger's ``experiment``, below ``@property``: in other processes it is an object that accepts every call."""

    @functools.wraps(fn)
    def experiment(self: Any) -> Any:
        from leyden.rank_zero import Anything, rank_zero_only

        return fn(self) if rank_zero_only.rank == 0 else Anything()

    return experiment


def capture_loggers(loggers: Sequence[Logger]) -> list[list[Any]]:
    """Return the state of every logger with the name of its class."""
    return [[type(logger).__qualname__, logger.state_dict()] for logger in loggers]


def resume_loggers(loggers: Sequence[Logger], states: Sequence[Sequence[Any]], global_step: int) -> None:
    """Tell every logger that the run goes on from a checkpoint.

    Args:
        loggers: each gets the next state of its class.
        states: from `capture_loggers`, perhaps of other loggers.
        global_step: optimizer steps that were done at the checkpoint.
    """
    left = [list(entry) for entry in states]
    for logger in loggers:
        own = next((entry for entry in left if entry[0] == type(logger).__qualname__), None)
        if own is not None:
            left.remove(own)
        logger.resume_from(global_step, own[1] if own is not None else {})


class VersionFolder:
    """The folder ``<save_dir>/<name>/version_N``, whose number is picked when it is first needed.

    The next number is taken by making the folder, which only one process can do: two runs that start
    together get two folders.

    Args:
        save_dir: the folder below which all experiments lie.
        name: the experiment; an empty name adds no folder.
        version: a number N for ``version_N``, a folder name, or ``None`` for the next free number.
    """

    def __init__(self, save_dir: str | os.PathLike[str], name: str | None, version: int | str | None) -> None:
        self.save_dir = os.fspath(save_dir)
        self.root_dir = os.path.join(self.save_dir, name or "")
        self._version = version
        self._made: str | None = None  # the folder that was made to take a number

    @property
    def version(self) -> int | str:
        """The version; where it was left open, reading it takes the next free number and makes the folder."""
        if self._version is None:
            self._version = self._take_next_number()
        return self._version

    @property
    def is_picked(self) -> bool:
        """Whether the version is known: it was given, or has been read."""
        return self._version is not None

    @property
    def path(self) -> str:
        """The version's folder, which need not exist yet when the version was given."""
        version = self.version
        return os.path.join(self.root_dir, f"version_{version}" if isinstance(version, int) else version)

    def set_version(self, version: int | str) -> None:
        """Use this version; makes no folder."""
        self._version = version

    def give_back(self) -> None:
        """Leave the number to somebody else, if it was taken here and nothing has been written under it."""
        if self._made is not None:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(self._made)
        self._made = None

    def _take_next_number(self) -> int:
        os.makedirs(self.root_dir, exist_ok=True)
        taken = [int(match[1]) for entry in os.listdir(self.root_dir) if (match := _VERSION.fullmatch(entry))]
        number = max(taken, default=-1) + 1
        while True:
            folder = os.path.join(self.root_dir, f"version_{number}")
            try:
                os.mkdir(folder)
            except FileExistsError:
                number += 1
            else:
                self._made = folder
                return number


def add_prefix(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Put ``<prefix>-`` in front of every name; an empty prefix changes nothing."""
    return {f"{prefix}-{name}": value for name, value in metrics.items()} if prefix else dict(metrics)


def scalar(name: str, value: Any) -> float | int:
    """Return the one number in ``value``, which may be a tensor or an array of one element.

    Raises:
        MetricError: if it is not one number.
    """
    # `size` is a number in numpy and a method in torch.
    count = value.numel() if isinstance(value, torch.Tensor) else getattr(value, "size", None)
    if count == 1:
        value = value.item()
    if isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise MetricError(
        f"The metric {name!r} is a {type(value).__name__}, but a logger takes one number for each name. "
        "Log its mean, or its parts under their own names."
    )


def plain_hyperparams(params: Mapping[str, Any] | argparse.Namespace) -> dict[str, Any]:
    """Reduce hyperparameters to dicts, lists, strings, numbers, booleans and ``None``; the rest becomes text."""
    named = vars(params) if isinstance(params, argparse.Namespace) else params
    return {str(key): _plain(value) for key, value in named.items()}


def _plain(value: Any) -> Any:
    # An enum that is also a str or an int is reduced to its value, so it must come before them.
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [_plain(item) for item in sorted(value, key=str)]
    if isinstance(value, torch.Tensor):
        # A large tensor is no hyperparameter; its shape says more than its truncated values.
        return value.tolist() if value.numel() <= 64 else f"tensor{tuple(value.shape)}"
    if isinstance(value, Path):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def flat_hyperparams(plain: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Flatten nested plain hyperparameters to ``a/b`` names and scalar values; lists become text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            flat.update({f"{key}/{inner}": scalar for inner, scalar in flat_hyperparams(value).items()})
        else:
            flat[key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def write_hyperparams(plain: Mapping[str, Any], log_dir: str) -> None:
    """Write plain hyperparameters to ``hparams.yaml``, whole or not at all."""
    os.makedirs(log_dir, exist_ok=True)
    path = os.path.join(log_dir, "hparams.yaml")
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(to_yaml(plain))
    os.replace(temporary, path)


def to_yaml(plain: Mapping[str, Any], indent: str = "") -> str:
    """Write nested plain data as YAML that 1.1 and 1.2 readers agree on."""
    lines = []
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{_yaml_key(key)}:\n{to_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{_yaml_key(key)}: {_yaml_flow(value)}\n")
    return "".join(lines) or "{}\n"


def _yaml_key(key: str) -> str:
    plain = _PLAIN_KEY.fullmatch(key) and key.lower() not in _YAML_WORDS
    return key if plain else _yaml_string(key)


def _yaml_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).translate(_YAML_BREAKS)


def _yaml_flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_yaml_string(key)}: {_yaml_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml_flow(item) for item in value) + "]"
    if isinstance(value, float):
        return _yaml_float(float(value))
    if isinstance(value, str):
        return _yaml_string(str(value))
    return json.dumps(value)


def _yaml_float(value: float) -> str:
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    text = repr(value)
    mantissa, exponent_sign, exponent = text.partition("e")
    # YAML 1.1 takes 1e-05 for a string: a float needs a point, and a sign in its exponent.
    if not exponent_sign:
        return text
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{mantissa}e{exponent if exponent[0] in '+-' else '+' + exponent}"
