"""The ledger that former arguments are translated in: what is set, by which spelling, and what is to be told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from leyden.callbacks import Callback
from leyden.compat.once import tell
from leyden.errors import ConfigurationError

# Of today's names that former ones turn into, the default: another value was given by the user.
DEFAULTS: dict[str, Any] = {
    "accelerator": "auto",
    "devices": "auto",
    "strategy": "auto",
    "num_nodes": 1,
    "precision": None,
    "max_epochs": None,
    "min_epochs": None,
    "max_steps": -1,
    "limit_train_batches": None,
    "limit_val_batches": None,
    "limit_test_batches": None,
    "num_sanity_val_steps": None,
    "log_every_n_steps": None,
    "enable_checkpointing": None,
    "enable_progress_bar": None,
    "enable_model_summary": None,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "profiler": None,
    "nan_policy": None,
    "use_distributed_sampler": True,
    "reload_dataloaders_every_n_epochs": 0,
    "default_root_dir": None,
}


@dataclass(frozen=True)
class Said:
    """What is told of one former spelling; see `Translation.say`."""

    spelt: str
    note: str
    callback: str
    today: dict[str, Any]

    @property
    def name(self) -> str:
        """The argument."""
        return self.spelt.partition("=")[0]


class Translation:
    """Arguments of a Trainer on their way from former names to today's.

    Args:
        asked: today's names, each with its value, which may be the default.
        others: former names with their values.
    """

    def __init__(self, asked: dict[str, Any], others: dict[str, Any]) -> None:
        self.arguments = dict(asked)
        self.others, self._written = dict(others), dict(others)
        self.ckpt_path: str | os.PathLike[str] | None = None
        self.truncated_bptt_steps: int | None = None
        given = asked["callbacks"]
        self.callbacks: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given] * (given is not None)
        self._said: list[Said] = []
        self._set_by = {name: f"{name}={asked[name]!r}" for name, default in DEFAULTS.items() if asked[name] != default}

    def is_given(self, name: str) -> bool:
        """Whether one of today's names has got a value, from the user or from a former name."""
        return name in self._set_by

    def release(self, name: str) -> None:
        """Take a former value of one of today's names as not given."""
        if name in DEFAULTS:
            self.arguments[name] = DEFAULTS[name]
            self._set_by.pop(name, None)

    def take(self, name: str) -> Any:
        """Return the value of a former name, None if it was not given; it counts as translated."""
        return self.others.pop(name, None)

    def set(self, name: str, value: Any, spelt: str) -> None:
        """Give one of today's names its value.

        Args:
            name: of today.
            value: of today.
            spelt: what the user wrote.

        Raises:
            ConfigurationError: if something else has set it to another value.
        """
        before = self._set_by.get(name)
        if before is not None and not _same(self.arguments[name], value):
            raise ConfigurationError(
                f"{spelt} and {before} contradict each other: both set {name}. Give {name} alone, as in {fill(**{name: value})}."
            )
        self.arguments[name] = value
        self._set_by.setdefault(name, spelt)

    def say(self, spelt: str, note: str = "", callback: str = "", **today: Any) -> None:
        """Note what is to be told of a spelling, once everything has turned out to be right.

        Args:
            spelt: what the user wrote.
            note: why nothing needs to be written any more, or what is worth knowing of what is.
            callback: one that is written today, as text.
            **today: arguments that are written today.
        """
        self._said.append(Said(spelt, note, callback, today))

    def tell(self) -> None:
        """Tell of all spellings of one call at once; once in a process for the same names together."""
        if not self._said:
            return
        order = [*self._written, *self.arguments]
        said = sorted(self._said, key=lambda one: order.index(one.name))
        written: dict[str, str] = {}
        callbacks: list[str] = []
        for one in said:
            written.update({name: repr(value) for name, value in one.today.items()})
            callbacks += [one.callback] * bool(one.callback)
        if callbacks:
            written["callbacks"] = f"[{', '.join(callbacks)}]"
        parts = [f"Trainer({', '.join(f'{name}={value}' for name, value in written.items())})"] * bool(written)
        if len(said) == 1:
            parts += [said[0].note] * bool(said[0].note)
        else:
            parts += [f"{one.spelt}: {one.note}" for one in said if one.note]
        former = f"Trainer({', '.join(one.spelt for one in said)})"
        names = " ".join(sorted({one.name for one in said}))
        tell(former, "; ".join(parts), key=f"Trainer: {names}", several=len(said) > 1)

    def add(self, callback: Callback) -> None:
        """Add a callback, unless this very one is there."""
        if all(callback is not other for other in self.callbacks):
            self.callbacks.append(callback)

    def have(self, kind: type[Callback]) -> list[Any]:
        """The callbacks of a kind."""
        return [callback for callback in self.callbacks if isinstance(callback, kind)]


def fill(**arguments: Any) -> str:
    """The call that is written today, for messages."""
    return f"Trainer({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


def _same(before: Any, value: Any) -> bool:
    if isinstance(before, os.PathLike) or isinstance(value, os.PathLike):
        return str(before) == str(value)
    # 1 and 1.0 are one batch and all of them
    return bool(before == value) and isinstance(before, float) == isinstance(value, float)
