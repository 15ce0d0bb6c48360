"""Hyperparameters beside a checkpoint: in files, as loggers wrote them (``meta_tags.csv``, ``hparams.yaml``), and overrides."""

from __future__ import annotations

import ast
import csv
import inspect
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leyden.compat.once import tell
from leyden.errors import CheckpointError, ConfigurationError, reject

_LONGEST = 10_000  # characters of a cell that is read as a literal: the interpreter's parser may crash on more


def with_former_hparams(
    cls: type, given: Mapping[str, Any], path: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """What a module is to be made with: what a file has, if there is one, overrides, and what was given by name.

    Args:
        cls: the module's class.
        given: by the caller; ``hparam_overrides`` or ``hparams_overrides`` among it are a dict, and told of.
        path: see `read_hparams_file`.

    Raises:
        ConfigurationError: if the overrides are not a dict.
    """
    given = dict(given)
    overrides: Any = {}
    for name in ("hparam_overrides", "hparams_overrides"):
        if name in given and name not in inspect.signature(cls).parameters:
            overrides = given.pop(name) or {}
            if not isinstance(overrides, Mapping):
                reject(name, overrides, "a dict of hyperparameters")
            call = f"{cls.__name__}.load_from_checkpoint(path, "
            written = ", ".join(f"{each}={value!r}" for each, value in overrides.items())
            tell(f"{call}{name}={overrides!r})", f"{call}{written})")
    found = {} if path is None else read_hparams_file(path, cls)
    if isinstance(found.get("hparams"), Namespace):
        vars(found["hparams"]).update(overrides)
        overrides = {}
    return {**found, **overrides, **given}


def read_hparams_file(path: str | os.PathLike[str], cls: type) -> dict[str, Any]:
    """Return what a module is to be made with.

    Args:
        path: a ``.csv`` with a row for each: name and value, after a row of headings; or a ``.yaml``.
        cls: the module's class; if its `__init__` takes ``hparams``, all come as one Namespace.

    Raises:
        CheckpointError: if the file cannot be read.
        ConfigurationError: if it is of another kind, or a YAML file and PyYAML is not installed.
    """
    file = Path(path)
    readers = {".csv": _read_csv, ".yaml": _read_yaml, ".yml": _read_yaml}
    if file.suffix not in readers:
        raise ConfigurationError(f"hparams_file={os.fspath(path)!r} is not valid. Allowed: a .csv or a .yaml file.")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"hparams_file={os.fspath(path)!r} cannot be read: {error}") from error
    try:
        found = readers[file.suffix](text, file)
    except (ValueError, csv.Error, RecursionError, MemoryError, OverflowError) as error:
        if isinstance(error, CheckpointError | ConfigurationError):
            raise
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error!s:.200}") from error
    if odd := [name for name in found if not isinstance(name, str)]:
        raise CheckpointError(f"{file}: the name {odd[0]!r:.60} is not a string. Write it in quotes.")
    return {"hparams": Namespace(**found)} if "hparams" in inspect.signature(cls).parameters else found


def _read_csv(text: str, file: Path) -> dict[str, Any]:
    rows = list(csv.reader(text.splitlines()))
    if not rows or any(len(row) != 2 for row in rows if row):
        raise CheckpointError(f"{file} is not a table of two columns, name and value.")
    return {name: _value(written) for name, written in (row for row in rows[1:] if row)}


def _value(written: str) -> Any:
    """What a cell means: a Python literal, else the text itself."""
    if len(written) > _LONGEST:
        return written
    try:
        return ast.literal_eval(written)
    except (ValueError, TypeError, SyntaxError):
        return written


def _read_yaml(text: str, file: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ConfigurationError(f"{file}: reading YAML needs PyYAML (pip install pyyaml).") from error
    try:
        found = yaml.safe_load(text)  # plain data only: a tag that names Python code is an error
    except yaml.YAMLError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, not names with values.")
    return found
