"""Notebooks: their code cells as one program, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_CELL = "# ---- cell {} ----"
_IS_CELL = re.compile(r"^# ---- cell (\d+) ----$")
_MAGIC = re.compile(
    r"^\s*(?:"
    r"[%!?]"  # %time f(), !ls, ?name
    r"|(?:[^#='\"]|'[^']*'|\"[^\"]*\")+=\s*[!%]"  # files = !ls
    r"|(?:[^#'\"]|'[^']*'|\"[^\"]*\")*[\w\])*]\s*\?{1,2}\s*$"  # name?
    r")"
)
_PYTHON = re.compile(r"^%%(?:time|timeit|capture|prun)\b")
"""Magics of whole cells that hold Python."""
_PACKAGE = re.compile(r"\b(?:pytorch_lightning|lightning)\b(?=[.?])")
"""What a line for IPython may use: it is named in what hides the line, for a name that is declared stays what it is."""
_HIDDEN = "{}  #leyden-keeps-{}"
_IS_HIDDEN = re.compile(r"^\s*(?:pass|global \w+)  #leyden-keeps-(\d+)$")
_TOKEN = re.compile(
    r"#.*|(?P<quotes>\'\'\'|\"\"\")|'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<more>\\$)"
)


@dataclass
class Notebook:
    """A notebook's code cells in one text, a line of comment before each; a ``pass`` for each that is for IPython alone."""

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
        if source.lstrip().startswith("%%") and not _PYTHON.match(source.lstrip()):
            continue  # another language
        lines.append(_CELL.format(number))
        lines += _without_magics(source, hidden)
    end = text[len(text.rstrip()) :]
    return Notebook(document, "\n".join(lines) + "\n", hidden, _layout(document, text.rstrip()), end)


def _without_magics(source: str, hidden: list[str]) -> Iterator[str]:
    """The lines of a cell, with a statement in place of each that is no Python, and of those that continue it."""
    depth, quotes, goes_on, indent = 0, "", False, None
    for line in source.split("\n"):
        begins = depth <= 0 and not quotes and not goes_on
        if indent is None and begins and _MAGIC.match(line):
            indent = line[: len(line) - len(line.lstrip())]
        if indent is not None:
            hidden.append(line)
            package = None if line.lstrip().startswith("!") else _PACKAGE.search(line)
            yield indent + _HIDDEN.format(f"global {package[0]}" if package else "pass", len(hidden) - 1)
            indent = indent if line.endswith("\\") else None
            continue
        yield line
        depth, quotes, goes_on = _after(line, depth, quotes)


def _after(line: str, depth: int, quotes: str) -> tuple[int, str, bool]:
    """How many brackets are open behind a line, the quotes of a text that goes on, and whether a backslash ends it."""
    goes_on, place = False, 0
    while place < len(line):
        if quotes:
            end = line.find(quotes, place)
            if end < 0:
                return depth, quotes, False
            quotes, place = "", end + 3
            continue
        found = _TOKEN.search(line, place)
        if found is None:
            break
        place, quotes = found.end(), found["quotes"] or ""
        depth += (found["open"] is not None) - (found["close"] is not None)
        goes_on = found["more"] is not None
    return depth, quotes, goes_on


def shown(notebook: Notebook, program: str) -> str:
    """A program with the lines for IPython as they are."""
    lines = []
    for line in program.split("\n"):
        found = _IS_HIDDEN.match(line)
        lines.append(line if found is None else notebook.hidden[int(found[1])])
    return "\n".join(lines)


def closed(notebook: Notebook, program: str) -> str:
    """The notebook's text with another program in its cells; all else as it was."""
    cells: dict[int, list[str]] = {}
    lines: list[str] = []
    for line in shown(notebook, program[:-1]).split("\n"):
        mark = _IS_CELL.match(line)
        if mark is not None:
            lines = cells.setdefault(int(mark[1]), [])
        else:
            lines.append(line)
    document = {**notebook.document, "cells": list(notebook.document["cells"])}
    for number, new in cells.items():
        cell = document["cells"][number]
        source = "\n".join(new)
        if source != _source(cell):
            value = source if isinstance(cell["source"], str) else source.splitlines(keepends=True)
            document["cells"][number] = {**cell, "source": value}
    return json.dumps(document, **notebook.layout) + notebook.end


def cells(program: str) -> Iterator[tuple[int, str]]:
    """The cells of a program: their numbers from 0, and texts."""
    number, lines = -1, list[str]()
    for line in program.split("\n"):
        mark = _IS_CELL.match(line)
        if mark is not None:
            if number >= 0:
                yield number, "\n".join(lines) + "\n"
            number, lines = int(mark[1]), []
        else:
            lines.append(line)
    if number >= 0:
        yield number, "\n".join(lines)


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
