"""A Trainer's or a datamodule's arguments on the command line, as of 0.7 to 1.9: `add_argparse_args`, `from_argparse_args`."""

from __future__ import annotations

import ast
import inspect
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from leyden.compat.once import tell


def add_arguments(kind: type, parent: ArgumentParser, former: Iterable[str] = ()) -> ArgumentParser:
    """Return a parser with the parent's arguments and one for each of a Trainer's, or a datamodule's.

    Args:
        kind: whose arguments of today; a value is a Python literal, or else a text.
        parent: the program's own parser; made with ``add_help=False``, or its help is left to the new one.
        former: names of former days, which are there in the result only if they were written.
    """
    tell(f"{kind.__name__}.add_argparse_args(parser)", _today(kind))
    parser = ArgumentParser(parents=[parent], add_help=False, conflict_handler="resolve")
    options: dict[str, Any] = defaults_of(kind) | dict.fromkeys(former, SUPPRESS)
    for name, default in options.items():
        if f"--{name}" not in parser._option_string_actions:
            parser.add_argument(f"--{name}", default=default, type=_value, nargs="?", const=True)
    return parser


def arguments_from(
    kind: type, args: Namespace | ArgumentParser, more: Mapping[str, Any], former: Iterable[str] = ()
) -> dict[str, Any]:
    """The arguments of a Trainer, or of a datamodule, among those of a program, which may have others too.

    Args:
        kind: whose arguments.
        args: parsed arguments, or a parser that is asked for them.
        more: what counts before them.
        former: names of former days that count as well.
    """
    tell(f"{kind.__name__}.from_argparse_args(args)", _today(kind))
    known = {*_parameters(kind), *former}
    return {**{name: value for name, value in vars(parsed(args)).items() if name in known}, **more}


def parsed(args: Namespace | ArgumentParser) -> Namespace:
    """The arguments of a program, parsed if they are not yet."""
    return args.parse_args() if isinstance(args, ArgumentParser) else args


def defaults_of(kind: type) -> dict[str, Any]:
    """The default of each argument; None where there is none."""
    return {
        name: None if each.default is inspect.Parameter.empty else each.default
        for name, each in _parameters(kind).items()
    }


def names_types_defaults(kind: type) -> list[tuple[str, tuple[type, ...], Any]]:
    """Name, types and default of each argument. Of types those that a command line has: bool, int, float and str."""
    plain: tuple[type, ...] = (bool, int, float, str)
    found = []
    for name, each in _parameters(kind).items():
        words = {part.strip() for part in str(each.annotation).split("|")}
        types = tuple(one for one in plain if one.__name__ in words) or plain[-1:]
        found.append((name, types, defaults_of(kind)[name]))
    return found


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: each for name, each in inspect.signature(kind).parameters.items() if each.kind not in several}


def _value(written: str) -> Any:
    try:
        return ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(written.lower(), written)


def _today(kind: type) -> str:
    return f"a parser of your own and {kind.__name__}(name=args.name, …)"
