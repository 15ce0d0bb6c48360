"""The command ``leyden``, also ``python -m leyden``: one subcommand for each task.

To add one: a line in `COMMANDS`, and a module with ``add_arguments(parser)`` and ``run(arguments)``, which returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from leyden.errors import LeydenError

COMMANDS: dict[str, tuple[str, str]] = {
    "convert": (
        "leyden.compat.convert",
        "make a checkpoint of leyden of one of Lightning or of weights, or the other way round",
    ),
}
"""The module of each subcommand, imported when it is called, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; by default with the command line's arguments. Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser("leyden", description="Deep-learning training for PyTorch, from the command line.")
    parser.add_argument("--version", action="version", version=f"leyden {import_module('leyden').__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, what) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        if name in given[:1]:
            import_module(module).add_arguments(subparser)
    parsed = parser.parse_args(given)
    try:
        code: int = import_module(COMMANDS[parsed.command][0]).run(parsed)
    except LeydenError as error:
        print(f"leyden {parsed.command}: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
