"""Where a Trainer meets programs of former days: arguments, keywords and attributes, which `leyden.compat` translates."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any, Self

from leyden.trainer.view import TrainerView

if TYPE_CHECKING:
    from leyden.compat.dress import Dress

_FORMER_VALUES = (
    ("max_steps", None),
    ("profiler", True),
    ("profiler", False),
    *(("strategy", name) for name in ("dp", "ddp2", "ddp_cpu")),
    *(("accelerator", name) for name in ("dp", "ddp", "ddp2", "ddp_cpu", "ddp_spawn")),
)


def in_words_of_today(
    asked: dict[str, Any], others: dict[str, Any]
) -> tuple[dict[str, Any], str | os.PathLike[str] | None, int | None]:
    """Translate what a Trainer was asked for in words of former days.

    Args:
        asked: the arguments of today, of which some had other values once.
        others: arguments that there are none of today.

    Returns:
        The arguments of today; ``resume_from_checkpoint``; ``truncated_bptt_steps``.

    Raises:
        ConfigurationError: for names that no Trainer ever had, and for contradictions.
    """
    former = [name for name, value in _FORMER_VALUES if asked[name] is value or asked[name] == value]
    if not others and not former and not isinstance(asked["accumulate_grad_batches"], dict):
        return asked, None, None
    from leyden.compat.arguments import modernise

    modern = modernise(asked, others)
    return modern.arguments, modern.ckpt_path, modern.truncated_bptt_steps


class TrainerOfFormerDays(TrainerView):
    """What programs of former days call and read: abstract, so that all of it is in one place, and nothing is loaded before."""

    truncated_bptt_steps: int | None
    _dress: Dress | None = None

    @classmethod
    def add_argparse_args(cls, parent_parser: ArgumentParser) -> ArgumentParser:
        """Former way to have a Trainer's arguments on the command line."""
        from leyden.compat.argparse_2020 import add_arguments
        from leyden.compat.arguments import FORMER_NAMES

        return add_arguments(cls, parent_parser, FORMER_NAMES)

    @classmethod
    def from_argparse_args(cls, args: Namespace | ArgumentParser, **kwargs: Any) -> Self:
        """Former way to make a Trainer from the command line: of ``args`` it takes what it knows."""
        from leyden.compat.argparse_2020 import arguments_from
        from leyden.compat.arguments import FORMER_NAMES

        return cls(**arguments_from(cls, args, kwargs, FORMER_NAMES))

    @classmethod
    def parse_argparser(cls, arg_parser: ArgumentParser | Namespace) -> Namespace:
        """Former way to read the command line for a Trainer."""
        from leyden.compat.argparse_2020 import parsed

        return parsed(arg_parser)

    @classmethod
    def default_attributes(cls) -> dict[str, Any]:
        """Former way to ask for the default of each of the Trainer's arguments."""
        from leyden.compat.argparse_2020 import defaults_of

        return defaults_of(cls)

    @classmethod
    def get_init_arguments_and_types(cls) -> list[tuple[str, tuple[type, ...], Any]]:
        """Former way to ask for name, types and default of each of the Trainer's arguments."""
        from leyden.compat.argparse_2020 import names_types_defaults

        return names_types_defaults(cls)

    def _loaders(self, verb: str, name: str, loaders: Any, former: dict[str, Any]) -> Any:
        """The loaders that a verb was given, under whichever name."""
        if not former:
            return loaders
        from leyden.compat.verbs import former_loaders

        return former_loaders(verb, name, loaders, former)

    @property
    def _takes_turns(self) -> bool:
        """Whether a module of former days makes several steps in a batch, which it does as if it optimized manually."""
        return self._dress is not None and self._dress.by_turns

    def _undress(self) -> None:
        """Leave a module of former days as its user made it."""
        if self._dress is not None:
            self._dress.undo()
        self._dress = None

    if not TYPE_CHECKING:  # else every misspelt attribute would pass for one

        def __getattr__(self, name: str) -> Any:
            # Only for what is not there: attributes that Trainers had in former days.
            if name.startswith("_") or hasattr(type(self), name):
                return object.__getattribute__(self, name)
            from leyden.compat.former_attributes import trainer_attribute

            return trainer_attribute(self, name)
