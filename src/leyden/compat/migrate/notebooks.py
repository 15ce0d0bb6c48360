"""Notebooks: their code cells as one program, and back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_CELL = "# ---- cell {} ----"
_IS_CELL = re.compile(r"^# ---- cell (\d+) ----$")
_MAGIC = re.compile(r"^(\s*)([%!?].*)$")
_HIDDEN = "#leyden-keeps-{}"
_IS_HIDDEN = re.compile(r"#leyden-keeps-(\d+)")


@dataclass
class Notebook:
    """A notebook's code cells in one text, a line of comment before each; lines for IPython alone are hidden in comments."""

    document: dict[str, Any]
    program: str
    hidden: list[str]
    layout: dict[str, Any]
    end: str


def opened(text: str) -> Notebook:
    """Read a notebook.

    Raises:
        ValueError: if it is not one.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
        raise ValueError("it has no list of cells (nbformat 4 is needed)")
    hidden: list[str] = []
    lines: list[str] = []
    for number, cell in enumerate(document["cells"]):
        if cell.get("cell_type") != "code":
            continue
        source = _source(cell)
        if source.lstrip().startswith("%%"):
            continue  # another language, or timed as a whole
        lines.append(_CELL.format(number))
        for line in source.split("\n"):
            magic = _MAGIC.match(line)
            if magic is not None:
                hidden.append(magic[2])
                line = magic[1] + _HIDDEN.format(len(hidden) - 1)
            lines.append(line)
    end = text[len(text.rstrip()) :]
    return Notebook(document, "\n".join(lines) + "\n", hidden, _layout(document, text.rstrip()), end)


def closed(notebook: Notebook, program: str) -> str:
    """The notebook's text with another program in its cells; all else as it was."""
    cells: dict[int, list[str]] = {}
    lines: list[str] = []
    for line in program[:-1].split("\n"):
        mark = _IS_CELL.match(line)
        if mark is not None:
            lines = cells.setdefault(int(mark[1]), [])
        else:
            lines.append(_IS_HIDDEN.sub(lambda found: notebook.hidden[int(found[1])], line))
    document = {**notebook.document, "cells": list(notebook.document["cells"])}
    for number, new in cells.items():
        cell = document["cells"][number]
        source = "\n".join(new)
        if source != _source(cell):
            value = source if isinstance(cell["source"], str) else source.splitlines(keepends=True)
            document["cells"][number] = {**cell, "source": value}
    return json.dumps(document, **notebook.layout) + notebook.end


def cell_and_line(program: str, line: int) -> tuple[int, int]:
    """Where a line of the program is: the cell from 0, and the line in it from 1."""
    cell, first = 0, 0
    for number, each in enumerate(program.split("\n")[:line]):
        mark = _IS_CELL.match(each)
        if mark is not None:
            cell, first = int(mark[1]), number + 1
    return cell, line - first


def _source(cell: dict[str, Any]) -> str:
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def _layout(document: dict[str, Any], text: str) -> dict[str, Any]:
    """How the file was written, so that only what changes is written otherwise; nbformat's way if that cannot be found."""
    for indent in (1, 2, 4, None):
        for ascii_only in (False, True):
            layout = {"indent": indent, "ensure_ascii": ascii_only}
            if json.dumps(document, **layout) == text:  # type: ignore[arg-type]
                return layout
    return {"indent": 1, "ensure_ascii": False}
