"""The ledger that former arguments are translated in: what is set, by which spelling, and what is to be told."""

from __future__ import annotations

import os
from typing import Any

from leyden.callbacks import Callback
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


class Translation:
    """Arguments of a Trainer on their way from former names to today's.

    Args:
        asked: today's names, each with its value, which may be the default.
        others: former names with their values.
    """

    def __init__(self, asked: dict[str, Any], others: dict[str, Any]) -> None:
        self.arguments = dict(asked)
        self.others = dict(others)
        self.ckpt_path: str | os.PathLike[str] | None = None
        self.truncated_bptt_steps: int | None = None
        given = asked["callbacks"]
        self.callbacks: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given] * (given is not None)
        self.said: list[tuple[str, str]] = []
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

    def say(self, spelt: str, today: str) -> None:
        """Note what is to be told of a spelling, once everything has turned out to be right."""
        self.said.append((f"Trainer({spelt})", today))

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
