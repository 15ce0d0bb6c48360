"""leyden's warnings, and how to mute them."""

from __future__ import annotations

import warnings

from leyden.errors import LeydenWarning as PossibleUserWarning

__all__ = ["PossibleUserWarning", "disable_possible_user_warnings"]


def disable_possible_user_warnings(module: str = "") -> None:
    """Mute all of leyden's warnings; to mute one kind, see `leyden.errors.LeydenWarning`.

    Args:
        module: a regular expression of the modules that they are raised in; empty for all.
    """
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)
