"""`Trainer.add_argparse_args` and `Trainer.from_argparse_args`: a Trainer's arguments on the command line, as of 0.7 to 1.9."""

from __future__ import annotations

import ast
import inspect
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

from leyden.compat.arguments import FORMER_NAMES
from leyden.compat.once import tell

_TODAY = "a parser of your own and Trainer(max_epochs=args.max_epochs, …)"


def add_arguments(trainer_class: type, parent: ArgumentParser) -> ArgumentParser:
    """Return a parser with the parent's arguments and one for each of the Trainer's.

    Args:
        trainer_class: whose arguments of today; a value is a Python literal, or else a text.
        parent: the program's own parser; made with ``add_help=False``, or its help is left to the new one.
    """
    tell("Trainer.add_argparse_args(parser)", _TODAY)
    parser = ArgumentParser(parents=[parent], add_help=False, conflict_handler="resolve")
    for name, parameter in inspect.signature(trainer_class).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD or f"--{name}" in parser._option_string_actions:
            continue
        parser.add_argument(f"--{name}", default=parameter.default, type=_value, nargs="?", const=True)
    return parser


def _value(written: str) -> Any:
    try:
        return ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(written.lower(), written)


def arguments_from(trainer_class: type, args: Namespace | ArgumentParser, more: Mapping[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments among those of a program, which may have others too.

    Args:
        trainer_class: whose arguments.
        args: parsed arguments, or a parser that is asked for them.
        more: what counts before them.
    """
    tell("Trainer.from_argparse_args(args)", _TODAY)
    given = vars(args.parse_args() if isinstance(args, ArgumentParser) else args)
    known = {*inspect.signature(trainer_class).parameters, *FORMER_NAMES} - {"others"}
    return {**{name: value for name, value in given.items() if name in known}, **more}
