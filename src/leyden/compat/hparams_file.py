"""Hyperparameters in files beside a checkpoint, as loggers wrote them: ``meta_tags.csv`` and ``hparams.yaml``."""

from __future__ import annotations

import ast
import csv
import inspect
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from leyden.errors import CheckpointError, ConfigurationError


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
    found = readers[file.suffix](text, file)
    return {"hparams": Namespace(**found)} if "hparams" in inspect.signature(cls).parameters else found


def _read_csv(text: str, file: Path) -> dict[str, Any]:
    rows = list(csv.reader(text.splitlines()))
    if not rows or any(len(row) != 2 for row in rows if row):
        raise CheckpointError(f"{file} is not a table of two columns, name and value.")
    return {name: _value(written) for name, written in (row for row in rows[1:] if row)}


def _value(written: str) -> Any:
    """What a cell means: a Python literal, else the text itself."""
    try:
        return ast.literal_eval(written)
    except (ValueError, SyntaxError):
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
