"""``python -m leyden.compat.migrate PATH``: show what would be rewritten, and with ``--write`` rewrite it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leyden.compat.migrate import files, notebooks
from leyden.compat.migrate.notes import Note
from leyden.errors import ConfigurationError

if TYPE_CHECKING:
    from leyden.compat.migrate.uses import Plan

WITHOUT_LIBCST = "Rewriting programs needs libcst, which is not installed. Install it: pip install 'leyden[migrate]'"


@dataclass(eq=False)
class Source:
    """One file and its program, which for a notebook is that of all its cells."""

    file: files.File
    program: str
    notebook: notebooks.Notebook | None = None

    def text(self, program: str) -> str:
        """What the file holds with this program."""
        return program if self.notebook is None else notebooks.closed(self.notebook, program)

    def difference(self, program: str) -> str:
        """What another program changes, as it is printed."""
        before, after = (
            each if self.notebook is None else notebooks.shown(self.notebook, each) for each in (self.program, program)
        )
        return _diff(self.file.path, before, after)

    def failure(self, error: Exception) -> str:
        """Why this cannot be rewritten, with the place in a notebook."""
        place, why = str(self.file.path), str(error)
        if self.notebook is not None:
            from libcst import ParserSyntaxError, parse_module

            for number, text in notebooks.cells(self.program):
                try:
                    parse_module(text)
                except ParserSyntaxError as own:
                    place, why = f"{place}:cell {number}", own.message
                    break
        return f"{place}: cannot be rewritten, and is left as it is: {_one_line(why)}"

    def shown(self, note: Note, program: str) -> str:
        """A note with its place."""
        if self.notebook is None:
            return note.shown(str(self.file.path))
        cell, line = notebooks.cell_and_line(program, note.line)
        return Note(line, note.what, note.why, note.write).shown(f"{self.file.path}:cell {cell}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        arguments: as on the command line.

    Returns:
        0; 1 if a file could not be read or parsed, or, with ``--check``, if something would be rewritten; 2 for wrong usage.
    """
    options = _parser().parse_args(arguments)
    try:
        import libcst  # noqa: F401
    except ImportError:
        print(WITHOUT_LIBCST, file=sys.stderr)
        return 2
    try:
        paths = list(files.find(options.paths))
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    failed: list[str] = []
    sources = list(_read(paths, failed))
    changed, notes = _rewrite_all(sources, failed, options.write)
    _report(changed, notes, failed, options)
    return 1 if failed or (options.check and changed) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m leyden.compat.migrate",
        description="Rewrite programs for PyTorch Lightning (2019 to today) into programs for leyden. Prints a diff and the "
        "places that need a hand; changes nothing without --write.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files (.py, .ipynb) or folders")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="change the files")
    what.add_argument("--check", action="store_true", help="exit with 1 if a file would change")
    return parser


def _read(paths: Iterable[Path], failed: list[str]) -> Iterator[Source]:
    for path in paths:
        try:
            file = files.read(path)
            notebook = notebooks.opened(file.text) if path.suffix == ".ipynb" else None
        except (OSError, ValueError, SyntaxError) as error:
            failed.append(f"{path}: cannot be read: {error}")
            continue
        yield Source(file, file.text if notebook is None else notebook.program, notebook)


def _rewrite_all(sources: Sequence[Source], failed: list[str], write: bool) -> tuple[list[Path], list[str]]:
    """Print the diffs; the files that change, and the notes."""
    from libcst import ParserSyntaxError

    from leyden.compat.migrate.rewriting import rewrite

    known, plans = _plans(sources)
    changed: list[Path] = []
    notes: list[str] = []
    for source in sources:
        path = source.file.path
        try:
            done = rewrite(source.program, known, plans.get(source, {}))
        except (ParserSyntaxError, RecursionError, ConfigurationError) as error:
            failed.append(source.failure(error))
            continue
        shown, program = (done.later, done.text) if write else (done.notes, source.program)
        notes += [source.shown(note, program) for note in shown]
        if done.text == source.program:
            continue
        changed.append(path)
        print(source.difference(done.text), end="")
        if write:
            try:
                files.write(source.file, source.text(done.text))
            except (OSError, UnicodeEncodeError) as error:
                failed.append(f"{path}: cannot be written: {error}")
    return changed, notes


def _plans(sources: Sequence[Source]) -> tuple[dict[str, str], dict[Source, dict[str, Plan]]]:
    """Classes that derive from ours, over all files, and what becomes of their hooks.

    A file that knows of none may derive from another file's.
    """
    from libcst import ParserSyntaxError

    from leyden.compat.migrate.facts import derived
    from leyden.compat.migrate.rewriting import concerns, read
    from leyden.compat.migrate.uses import Reading, decide

    readings: dict[Source, Reading] = {}
    known: dict[str, str] = {}
    waiting, concerned = list(sources), list(sources)
    while concerned:
        concerned = [source for source in waiting if concerns(source.program, known)]
        waiting = [source for source in waiting if source not in concerned]
        for source in concerned:
            # what cannot be parsed is named when its turn comes to be rewritten
            with contextlib.suppress(ParserSyntaxError, RecursionError):
                readings[source] = read(source.program)
        classes = {name: each.bases for reading in readings.values() for name, each in reading.classes.items()}
        known = derived(classes)
    return known, dict(zip(readings, decide(list(readings.values()), known), strict=True))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _diff(path: Path, before: str, after: str) -> str:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"{path} (now)", f"{path} (rewritten)"
    )
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _report(changed: Sequence[Path], notes: Sequence[str], failed: Sequence[str], options: argparse.Namespace) -> None:
    if notes:
        print(f"\n{'These places need' if len(notes) > 1 else 'This place needs'} a hand:\n")
        print("\n".join(notes))
    files_ = f"{len(changed)} file{'s' * (len(changed) != 1)}"
    if not changed:
        print("\nNothing to rewrite." if notes else "Nothing to rewrite.")
    elif options.write:
        print(f"\nRewritten: {files_}.")
    else:
        again = " ".join(map(str, options.paths))
        print(
            f"\n{files_} would be rewritten; nothing was changed. To do it: python -m leyden.compat.migrate --write {again}"
        )
    for each in failed:
        print(each, file=sys.stderr)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
