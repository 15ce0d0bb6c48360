"""The Trainer's arguments, validated once, with the reason for everything that was chosen for the user."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from leyden.errors import ConfigurationError, did_you_mean, reject
from leyden.optimizers import CLIP_ALGORITHMS
from leyden.precision import Precision, resolve_precision

if TYPE_CHECKING:
    from leyden.strategy.cluster import ClusterEnvironment

Limit = int | float


@dataclass
class Settings:
    """What `Trainer` was asked for, checked and made one form; `Trainer` documents each.

    Attributes:
        environment: the launcher that ``plugins`` names, or None.
        reasons: what was not given and what was chosen instead, for `Trainer.explain`.
    """

    precision: Any = "32-true"
    fast_dev_run: int | bool = False
    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: Any = None
    limit_train_batches: Limit | None = None
    limit_val_batches: Limit | None = None
    limit_test_batches: Limit | None = None
    limit_predict_batches: Limit | None = None
    overfit_batches: Limit = 0.0
    val_check_interval: Any = None
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int | None = None
    log_every_n_steps: int | None = None
    enable_checkpointing: bool | None = None
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    deterministic: bool | str | None = None
    benchmark: bool | None = None
    compile: bool | str = False
    fused_optimizer: bool = True
    inference_mode: bool = True
    use_distributed_sampler: bool = True
    detect_anomaly: bool = False
    nan_policy: str | None = None
    oom_policy: str = "raise"
    barebones: bool = False
    plugins: Any = None
    sync_batchnorm: bool = False
    reload_dataloaders_every_n_epochs: int = 0
    num_nodes: int = 1
    max_restarts: int = 0
    profiler: Any = None
    default_root_dir: Any = None
    environment: ClusterEnvironment | None = None
    reasons: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.barebones:
            self._apply_barebones()
        self._check_whole_numbers()
        self._check_switches()
        self._check_precision()
        self._check_limits()
        self._check_durations()
        self._check_validation_schedule()
        self._check_clipping()
        self._check_policies()
        self._apply_fast_dev_run()
        self._fill_defaults()

    def _choose(self, name: str, value: Any, reason: str) -> None:
        setattr(self, name, value)
        self.reasons.append((f"{name}={value!r}", reason))

    def _check_whole_numbers(self) -> None:
        for name, least, special in (
            ("max_epochs", 0, {None, -1}),
            ("min_epochs", 0, {None}),
            ("max_steps", 0, {-1}),
            ("min_steps", 0, {None}),
            ("check_val_every_n_epoch", 1, {None}),
            ("num_sanity_val_steps", 0, {None, -1}),
            ("log_every_n_steps", 0, {None}),
            ("accumulate_grad_batches", 1, set()),
            ("reload_dataloaders_every_n_epochs", 0, set()),
            ("fast_dev_run", 0, {True, False}),
            ("num_nodes", 1, set()),
            ("max_restarts", 0, set()),
        ):
            value = getattr(self, name)
            if any(value is item or (type(value) is int and value == item) for item in special):
                continue
            if type(value) is not int or value < least:
                others = "".join(f" or {item}" for item in sorted(special, key=str))
                reject(name, value, f"an integer ≥ {least}{others}")

    def _check_switches(self) -> None:
        for name in (
            "inference_mode", "detect_anomaly", "barebones", "sync_batchnorm", "use_distributed_sampler", "fused_optimizer",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                reject(name, getattr(self, name), "True or False")
        for name in ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "benchmark"):
            if not isinstance(getattr(self, name), bool | None):
                reject(name, getattr(self, name), "True, False or None")
        if not isinstance(self.compile, bool) and self.compile != "auto":
            reject("compile", self.compile, "True, False or 'auto'")
        if not isinstance(self.deterministic, bool | None) and self.deterministic != "warn":
            reject("deterministic", self.deterministic, "True, False, 'warn' or None")
        if not isinstance(self.default_root_dir, str | os.PathLike | None):
            reject("default_root_dir", self.default_root_dir, "a path, or None for the working directory")

    def _check_precision(self) -> None:
        plugins = self.plugins if isinstance(self.plugins, (list, tuple)) else [self.plugins]
        for plugin in plugins:
            if plugin is None:
                continue
            from leyden.strategy.cluster import ClusterEnvironment  # few programs have plugins

            if isinstance(plugin, ClusterEnvironment):
                if self.environment is not None:
                    reject("plugins", self.plugins, "at most one environment")
                self.environment = plugin
                continue
            if not isinstance(plugin, Precision):
                allowed = "a Precision, or an environment, of leyden.plugins"
                hint = " Checkpoints have one format; `leyden convert` makes others of it, and ModelCheckpoint(dirpath='s3://…')"
                writes = callable(getattr(plugin, "save_checkpoint", None))
                reject("plugins", plugin, allowed, f"{hint} writes elsewhere." if writes else "")
            if self.precision is not None:
                raise ConfigurationError(
                    f"precision={self.precision!r} and a Precision in plugins contradict each other. Give one of the two."
                )
            self.precision = plugin
        if self.precision is None:
            self._choose("precision", "32-true", "not given: parameters and computation in fp32")
        self.precision = resolve_precision(self.precision)

    def _check_limits(self) -> None:
        for name in (
            "limit_train_batches",
            "limit_val_batches",
            "limit_test_batches",
            "limit_predict_batches",
            "overfit_batches",
        ):
            value = getattr(self, name)
            if value is None and name != "overfit_batches":
                setattr(self, name, 1.0)
                continue
            is_count = type(value) is int and value >= 0
            is_fraction = type(value) is float and 0.0 <= value <= 1.0
            if not (is_count or is_fraction):
                reject(name, value, "a number of batches (int ≥ 0) or a fraction of them (float from 0.0 to 1.0)")
        if self.overfit_batches:
            for name in ("limit_train_batches", "limit_val_batches"):
                if getattr(self, name) != 1.0 and not (name == "limit_val_batches" and self.limit_val_batches == 0):
                    raise ConfigurationError(
                        f"overfit_batches={self.overfit_batches!r} and {name}={getattr(self, name)!r} contradict each "
                        "other: overfit_batches is the limit of both. Give one of the two."
                    )
            self._choose("limit_train_batches", self.overfit_batches, "overfit_batches is the limit")
            if self.limit_val_batches:
                self._choose("limit_val_batches", self.overfit_batches, "overfit_batches is the limit")

    def _check_durations(self) -> None:
        self.max_time = parse_duration("max_time", self.max_time)
        for least, most in (("min_epochs", "max_epochs"), ("min_steps", "max_steps")):
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and high != -1 and low > high:
                raise ConfigurationError(
                    f"{least}={low} is more than {most}={high}. Lower the first or raise the second."
                )

    def _check_validation_schedule(self) -> None:
        interval, every = self.val_check_interval, self.check_val_every_n_epoch
        allowed = "a number of training batches (int ≥ 1), a fraction of an epoch (float in (0, 1]), or a duration"
        if isinstance(interval, (str, dict, timedelta)):
            self.val_check_interval = parse_duration("val_check_interval", interval)
        elif interval is not None:
            is_count = type(interval) is int and interval >= 1
            is_fraction = type(interval) is float and 0.0 < interval <= 1.0
            if not (is_count or is_fraction):
                reject("val_check_interval", interval, allowed)
        if every is None and type(interval) is float:
            raise ConfigurationError(
                f"val_check_interval={interval} is a fraction of an epoch, but check_val_every_n_epoch=None counts batches "
                "across epochs. Give val_check_interval as a number of batches."
            )
        if every is None and interval is None:
            raise ConfigurationError(
                "check_val_every_n_epoch=None counts batches across epochs, so it needs val_check_interval=<batches>."
            )

    def _check_clipping(self) -> None:
        value, algorithm = self.gradient_clip_val, self.gradient_clip_algorithm
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0
        ):
            reject("gradient_clip_val", value, "a number ≥ 0 (0 does not clip) or None")
        if algorithm is not None and algorithm not in CLIP_ALGORITHMS:
            reject("gradient_clip_algorithm", algorithm, ", ".join(map(repr, CLIP_ALGORITHMS)))
        if value == 0:
            self.gradient_clip_val = None

    def _check_policies(self) -> None:
        for name, allowed in (("nan_policy", (None, "raise", "skip", "rollback")), ("oom_policy", ("raise", "halve"))):
            value = getattr(self, name)
            if value not in allowed:
                known = ", ".join(map(repr, allowed))
                reject(name, value, known, did_you_mean(str(value), [each for each in allowed if each]))
        if self.detect_anomaly and self.nan_policy in ("skip", "rollback"):
            raise ConfigurationError(
                f"detect_anomaly=True stops at what is not finite, and nan_policy={self.nan_policy!r} goes on. Leave one of the "
                "two out."
            )

    def _apply_fast_dev_run(self) -> None:
        batches = int(self.fast_dev_run)
        self.fast_dev_run = batches
        if not batches:
            return
        why = f"fast_dev_run={batches}"
        for stage in ("train", "val", "test", "predict"):
            if getattr(self, f"limit_{stage}_batches") != 0:
                self._choose(f"limit_{stage}_batches", batches, why)
        for name, value in (
            ("max_epochs", 1), ("max_steps", batches), ("num_sanity_val_steps", 0), ("val_check_interval", 1.0),
            ("check_val_every_n_epoch", 1), ("min_epochs", None), ("min_steps", None), ("enable_checkpointing", False),
            ("log_every_n_steps", 1),
        ):  # fmt: skip
            self._choose(name, value, why)

    def _apply_barebones(self) -> None:
        for name in ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "fast_dev_run", "profiler"):
            if getattr(self, name):
                raise ConfigurationError(
                    f"barebones=True turns {name} off, but {name}={getattr(self, name)!r} was given. Leave one of them out."
                )
        for name in ("num_sanity_val_steps", "log_every_n_steps"):
            if getattr(self, name):
                raise ConfigurationError(
                    f"barebones=True sets {name}=0, but {name}={getattr(self, name)!r} was given. Leave one of them out."
                )
        if self.detect_anomaly:
            raise ConfigurationError(
                "barebones=True is for measuring speed; detect_anomaly=True would slow every step."
            )
        for name, off in (("nan_policy", None), ("oom_policy", "raise")):
            if getattr(self, name) != off:
                raise ConfigurationError(
                    f"barebones=True is for measuring speed; {name}={getattr(self, name)!r} would slow every step."
                )
        for name, value in (
            ("enable_checkpointing", False), ("enable_progress_bar", False), ("enable_model_summary", False),
            ("num_sanity_val_steps", 0), ("log_every_n_steps", 0),
        ):  # fmt: skip
            self._choose(name, value, "barebones=True")

    def _fill_defaults(self) -> None:
        if self.max_epochs is None:
            if self.max_steps == -1 and self.max_time is None:
                self._choose("max_epochs", 1000, "no limit was given: pass max_epochs, max_steps or max_time")
            else:
                self._choose("max_epochs", -1, "max_steps or max_time is the limit")
        if self.num_sanity_val_steps is None:
            self._choose("num_sanity_val_steps", 2, "default: a broken validation shows before training")
        if self.log_every_n_steps is None:
            self._choose("log_every_n_steps", 50, "default: values are read from the device once per 50 steps")
        if self.val_check_interval is None:
            self.val_check_interval = 1.0


def parse_duration(name: str, value: Any) -> timedelta | None:
    """Read ``"DD:HH:MM:SS"``, a dict of `timedelta`'s arguments, or a `timedelta`.

    Raises:
        ConfigurationError: for anything else, and for negative durations.
    """
    if value is None:
        return None
    found: timedelta | None = None
    if isinstance(value, timedelta):
        found = value
    elif isinstance(value, dict):
        try:
            found = timedelta(**value)
        except (TypeError, ValueError, OverflowError):
            found = None
    elif isinstance(value, str):
        parts = value.split(":")
        if len(parts) == 4 and all(part.strip().isdigit() for part in parts):
            days, hours, minutes, seconds = map(int, parts)
            found = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    if found is None or found < timedelta(0):
        reject(name, value, "'DD:HH:MM:SS', a timedelta, or a dict such as {'hours': 2}")
    return found
