"""The exception tree, coded warnings and the search for what a misspelt name meant."""

from __future__ import annotations

import difflib
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn


class LeydenError(Exception):
    """Base of every error that leyden raises on purpose."""


class MisconfigurationException(LeydenError):  # noqa: N818 the name that programs catch
    """What the program has to change: arguments, hooks, data, names of metrics. Programs raise it themselves, too."""


class ConfigurationError(MisconfigurationException, ValueError):
    """An argument, or a combination of arguments, that cannot work. Names the argument, the value, the mend."""


class UnknownArgumentError(ConfigurationError, TypeError):
    """An argument that there is none of, today or in former days. Names the one that was probably meant."""


class HookError(ConfigurationError, TypeError):
    """A hook that is misspelt, missing, or has a signature that it cannot be called with."""


class StepError(MisconfigurationException, RuntimeError):
    """What a step returned, or did, cannot be trained on."""


class NonFiniteError(StepError, FloatingPointError):
    """A loss or a gradient that is NaN or infinite, found by ``detect_anomaly`` or ``nan_policy``."""


class DataError(MisconfigurationException, ValueError):
    """A loader or a batch that cannot be used."""


class MetricError(MisconfigurationException, ValueError):
    """A value that cannot be logged."""


class MissingMetricError(MetricError, RuntimeError):
    """A monitored key that was never logged. Names those that were."""


class CheckpointError(LeydenError, RuntimeError):
    """A checkpoint that cannot be written, read or applied. Names the file or the key, and the reason."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint. Names what is there."""


class NoTrainerError(LeydenError, RuntimeError):
    """A module that no Trainer runs was asked for what only one that is run has."""


class RankError(LeydenError, RuntimeError):
    """A rank that has to end because of another one: it failed first, or never came. Names that rank, and its error if known."""


class AbsentError(LeydenError, ImportError):
    """A public name of Lightning that leyden does not have, or not yet. Says what to write instead."""


class SIGTERMException(SystemExit):
    """The end of a run whose machine is taken away: what `on_exception` sees after SIGTERM and other signals of preemption."""


class LeydenWarning(UserWarning):
    """A coded warning. Mute one code with ``warnings.filterwarnings("ignore", message=r"\\[LEY-code\\]")``."""


_PASSED_OVER = ("leyden.", "torch.", "contextlib", "functools")


def warn(code: str, message: str) -> None:
    """Warn with a stable code in front, so that one kind of warning can be muted; the line shown is the user's.

    Args:
        code: a short kebab-case name, shown as ``[LEY-code]``.
        message: what happened and what to do about it.
    """
    stacklevel, frame = 2, inspect.currentframe()
    frame = frame.f_back if frame is not None else None
    while frame is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(_PASSED_OVER):
        stacklevel, frame = stacklevel + 1, frame.f_back
    warnings.warn(f"[LEY-{code}] {message}", LeydenWarning, stacklevel=stacklevel)


def call_each(actions: Iterable[Callable[[], object]], first: BaseException | None = None) -> BaseException | None:
    """Call every action, also after one of them has raised.

    The exception that came first is the one that counts; Python prints the notes that later ones leave on it.

    Args:
        actions: what must all be tried, such as the parts of a teardown.
        first: an exception that came before any of them.

    Returns:
        The exception that came first, for the caller to raise; None if there was none.
    """
    for action in actions:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 nothing is swallowed: the caller raises it, or it is noted
            if first is None:
                first = error
            elif error is not first:
                place = traceback.extract_tb(error.__traceback__)[-1]
                first.add_note(f"Afterwards {place.filename}:{place.lineno} raised {type(error).__name__}: {error}")
    return first


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def reject(argument: str, value: object, allowed: str, hint: str = "") -> NoReturn:
    """Raise the one error for a bad argument: its name, what was given, what is allowed, and what may have been meant."""
    raise ConfigurationError(f"{argument}={value!r} is not valid. Allowed: {allowed}.{hint}")


def no_such_name(module: str, name: str, absent: Mapping[str, str]) -> NoReturn:
    """Raise for a name that a module does not have, where Lightning's has one say what to write instead.

    An `AttributeError` would lose its text in ``from module import name``.

    Args:
        module: the module's full name.
        name: what was asked for.
        absent: the names that Lightning's module has, with what to say.
    """
    if name in absent:
        raise AbsentError(f"{module} has no {name}: {absent[name]}.")
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def missing_metric(what: str, key: str, known: Iterable[str]) -> MissingMetricError:
    """The error for a monitored key that was never logged: it names those that were."""
    names = sorted(known)
    listed = ", ".join(map(repr, names)) if names else "nothing: no value has been logged with self.log yet"
    return MissingMetricError(
        f"{what} monitors {key!r}, which was not logged. Logged are: {listed}.{did_you_mean(key, names)}"
    )
