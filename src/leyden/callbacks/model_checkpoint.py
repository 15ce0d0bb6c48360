"""Save checkpoints during `fit`: the best k by a metric, the last one, or all."""

from __future__ import annotations

import os
import re
import string
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from leyden.callbacks.callback import Callback
from leyden.checkpoint.retention import Mode, Saved, is_kept, ranked, to_delete
from leyden.checkpoint.store import copy_checkpoint, link_checkpoint, remove
from leyden.errors import ConfigurationError, MetricError, did_you_mean, reject, warn

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer

_DEFAULT_FILENAME = "{epoch}-{step}"


class ModelCheckpoint(Callback):
    """Save a checkpoint at each trigger, and keep the best ``save_top_k`` of them and, if asked, the last.

    The trigger is one of: every ``every_n_epochs`` epochs (the default, 1), every ``every_n_train_steps`` optimizer steps, or
    every ``train_time_interval``. The file is written at the next step boundary, with the metrics of then, once per step.

    **Best k**: at a trigger, the checkpoint is written if it is among the best ``save_top_k`` so far; only then the one that it
    displaces is deleted. Of equal scores the earlier is kept; NaN is the worst. Without ``monitor``, the latest is kept.

    **Last**: ``last.ckpt`` is written at every trigger, whether or not that checkpoint is among the best, and when training ends
    if steps were done since. It is always the last; one from an earlier run in the same folder is replaced.

    If ``monitor`` was never logged, a `MetricError` is raised. Only before the fit's first validation has ended is it a warning
    (``checkpoint-no-score``): no best-k file is written then, but ``last`` is; with ``save_top_k=-1`` one with the score NaN.

    When a run is resumed into another folder, files in the old one are never deleted: the best k are counted anew, and
    ``best_model_path`` stays the old best until it is beaten.

    Args:
        dirpath: folder; by default ``checkpoints`` in the first logger's ``log_dir``, or in ``default_root_dir``.
        filename: template without the ending, such as ``"{epoch:02d}-{val_loss:.2f}"``; keys are logged metrics,
            ``epoch`` and ``step``. A ``/`` in a metric's name becomes ``_``, elsewhere it makes a folder. Default:
            ``"{epoch}-{step}"``.
        monitor: key of the metric to rank by; also ``"epoch"`` and ``"step"``.
        verbose: print what is saved.
        save_last: True: also keep ``last.ckpt``; ``"link"``: as a symbolic link wherever the same checkpoint
            is among the best k.
        save_top_k: how many to keep by score; -1 keeps all, 0 none.
        save_weights_only: leave out what only a resumed run needs.
        mode: whether a low (``"min"``) or a high (``"max"``) score is good.
        auto_insert_metric_name: ``{epoch}`` gives ``epoch=0`` rather than ``0``.
        every_n_train_steps: optimizer steps between triggers; 0 means never.
        train_time_interval: time between triggers, looked at after each batch.
        every_n_epochs: epochs between triggers; 0 means never.
        save_on_train_epoch_end: with the epoch trigger, save at the end of the training epoch rather than after
            validation. Without validation it is always the former.
        enable_version_counter: a name that is taken gets ``-v1``, ``-v2``, …; otherwise it is overwritten.

    Attributes:
        last_model_path: path of the last checkpoint, or ``""``.

    Raises:
        ConfigurationError: an argument is out of range, or triggers contradict each other.
    """

    CHECKPOINT_NAME_LAST = "last"
    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_weights_only: bool = False,
        mode: Mode = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        _check_policy(monitor, mode, save_top_k, save_last)
        _check_triggers(every_n_train_steps, train_time_interval, every_n_epochs, save_on_train_epoch_end)
        no_trigger = every_n_train_steps is None and train_time_interval is None and every_n_epochs is None
        self.dirpath = None if dirpath is None else _absolute(dirpath)
        self.filename = filename
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_weights_only = save_weights_only
        self.mode: Mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self.every_n_train_steps = every_n_train_steps or 0
        self.train_time_interval = train_time_interval
        self.every_n_epochs = 1 if no_trigger else every_n_epochs or 0
        self.save_on_train_epoch_end = save_on_train_epoch_end
        self.enable_version_counter = enable_version_counter
        last = self.CHECKPOINT_NAME_LAST
        for template in (filename, last):
            if template is not None:
                _check_template(template)
        if save_last and self._with_ending(filename or _DEFAULT_FILENAME) == self._with_ending(last):
            reject("filename", filename, f"another name than {last!r}, which save_last uses")
        self._fitting = False
        self._validated = False
        self._start_step = 0
        self._started_s = 0.0
        self._pending: Callable[[], None] | None = None
        self.start_anew()

    def start_anew(self) -> None:
        """Forget the checkpoints of an earlier `fit`; their files stay."""
        self.last_model_path = ""
        self._history: list[Saved] = []  # the kept ones, in order of time
        self._inherited: Saved | None = None  # the best of the folder that this run was resumed from
        self._current: float | None = None
        self._step_saved: int | None = None
        self._loaded_from: str | None = None  # folder in the state that was loaded, until it is compared

    @property
    def state_key(self) -> str:
        """Differs for callbacks that differ in what they monitor or in their trigger."""
        names = ("monitor", "mode", "every_n_train_steps", "every_n_epochs", "train_time_interval")
        return f"{type(self).__qualname__}{ {name: getattr(self, name) for name in names}!r}"

    @property
    def best_model_path(self) -> str:
        """Path of the best checkpoint (without ``monitor``: of the most recent), or an empty string."""
        best = self._best()
        return best[1] if best else ""

    @property
    def best_model_score(self) -> Tensor | None:
        """Score of the best checkpoint, on the CPU in double precision; None without ``monitor``."""
        best = self._best()
        return _tensor(best[0]) if best and self.monitor is not None else None

    @property
    def best_k_models(self) -> dict[str, Tensor]:
        """The kept checkpoints' scores by path, in order of time; empty without ``monitor``."""
        return {path: _tensor(score) for score, path in self._history} if self.monitor is not None else {}

    @property
    def kth_best_model_path(self) -> str:
        """Path of the worst of the kept checkpoints, or an empty string."""
        return ranked(self._history, self._rank_mode)[-1][1] if self._history else ""

    @property
    def kth_value(self) -> Tensor | None:
        """Score of the worst of the kept checkpoints, or None."""
        return self.best_k_models.get(self.kth_best_model_path)

    @property
    def current_score(self) -> Tensor | None:
        """The monitored value at the latest trigger, or None."""
        return None if self._current is None else _tensor(self._current)

    def state_dict(self) -> dict[str, Any]:
        """Paths, scores and the step of the last save, as plain data."""
        return {
            "monitor": self.monitor,
            "dirpath": self.dirpath,
            "history": [[score, path] for score, path in self._history],
            "inherited": None if self._inherited is None else list(self._inherited),
            "last_model_path": self.last_model_path,
            "current_score": self._current,
            "step_saved": self._step_saved,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; files that are gone are forgotten when the fit starts."""
        self._history = [(float(score), str(path)) for score, path in state_dict["history"]]
        inherited = state_dict["inherited"]
        self._inherited = None if inherited is None else (float(inherited[0]), str(inherited[1]))
        self.last_model_path = state_dict["last_model_path"]
        self._current = state_dict["current_score"]
        self._step_saved = state_dict["step_saved"]
        self._loaded_from = state_dict["dirpath"] or ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, if none was given."""
        self._fitting = stage == "fit"
        if not self._fitting or self.dirpath is not None:
            return
        log_dirs = (logger.log_dir for logger in trainer.loggers)
        root = next((folder for folder in log_dirs if folder is not None), trainer.default_root_dir)
        self.dirpath = _absolute(os.path.join(root, "checkpoints"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a save that was asked for and never came, because of an error."""
        self._fitting = self._validated = False
        self._pending = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare loaded state with the folder and the run."""
        self._start_step = trainer.global_step
        self._started_s = time.monotonic()
        if self._step_saved != trainer.global_step:  # the same object in another run
            self._step_saved = None
        if self._loaded_from is None:
            return
        best = self._best()
        if self._loaded_from != self.dirpath:
            self._inherited, self._history, self.last_model_path = best, [], ""
        self._history = [saved for saved in self._history if os.path.exists(saved[1])]
        if self._inherited is not None and not os.path.exists(self._inherited[1]):
            self._inherited = None
        self._loaded_from = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step and time triggers."""
        step = trainer.global_step
        if step == self._start_step:  # within the first accumulation window
            return
        if self.every_n_train_steps:
            due = step % self.every_n_train_steps == 0
        elif self.train_time_interval is not None:
            due = time.monotonic() - self._started_s >= self.train_time_interval.total_seconds()
        else:
            return
        if due:
            self._request(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch trigger, by default."""
        if not self._fitting or trainer.sanity_checking:
            return
        self._validated = True
        if not self.save_on_train_epoch_end and self._epoch_is_due(trainer):
            self._request(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch trigger, without validation or if asked for."""
        if (self.save_on_train_epoch_end or not _has_validation(trainer)) and self._epoch_is_due(trainer):
            self._request(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last`` once more if steps were done since."""
        if self.save_last and trainer.global_step != self._start_step:
            self._request(trainer, last_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was asked for at the very end, in case no step boundary came after it."""
        if self._pending is not None:
            self._pending()

    def format_checkpoint_name(
        self, metrics: Mapping[str, Any], filename: str | None = None, ver: int | None = None
    ) -> str:
        """Fill a template and return the path, within ``dirpath`` if that is known.

        Args:
            metrics: values by key; numbers or 0-d tensors.
            filename: the template; by default the one this callback was given.
            ver: version to append.

        Raises:
            MetricError: the template names a key that is not in ``metrics``.
            ConfigurationError: the template is malformed, or a value does not fit its format.
        """
        if filename is None:
            filename = self.filename if self.filename is not None else _DEFAULT_FILENAME
        name = ""
        for literal, key, spec in _check_template(filename):
            name += literal
            if key is None:
                continue
            if key not in metrics:
                raise MetricError(_missing(f"filename={filename!r} names", key, metrics))
            shown = re.sub(r"[/\\]", "_", key)
            if self.auto_insert_metric_name and not name.endswith(f"{shown}{self.CHECKPOINT_EQUALS_CHAR}"):
                name += f"{shown}{self.CHECKPOINT_EQUALS_CHAR}"
            try:
                value = metrics[key]
                name += format(value.item() if isinstance(value, Tensor) else value, spec)
            except ValueError as error:
                raise ConfigurationError(f"filename={filename!r}: {key} is {metrics[key]!r}: {error}.") from None
        version = "" if ver is None else f"{self.CHECKPOINT_JOIN_CHAR}v{ver}"
        return os.path.join(self.dirpath or "", self._with_ending(name, version))

    @property
    def _rank_mode(self) -> Mode:
        return self.mode if self.monitor is not None else "max"  # without a metric the scores count the saves

    def _with_ending(self, name: str, version: str = "") -> str:
        return name.removesuffix(self.FILE_EXTENSION) + version + self.FILE_EXTENSION

    def _best(self) -> Saved | None:
        known = ranked(self._known(), self._rank_mode)
        return known[0] if known else None

    def _known(self) -> list[Saved]:
        return self._history if self._inherited is None else [self._inherited, *self._history]

    def _epoch_is_due(self, trainer: Trainer) -> bool:
        return self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _request(self, trainer: Trainer, last_only: bool = False) -> None:
        """Ask for one save at the next step boundary."""
        if trainer.fast_dev_run or self._pending is not None or trainer.global_step == self._step_saved:
            return
        epoch = trainer.current_epoch  # the boundary may lie behind the turn of the epoch

        def save() -> None:
            if self._pending is save:
                self._pending = None
                self._save(trainer, epoch, last_only)

        self._pending = save
        trainer.at_step_boundary(save)

    def _save(self, trainer: Trainer, epoch: int, last_only: bool) -> None:
        """Decide, write, and only then delete what is no longer among the best."""
        metrics = {**trainer.callback_metrics, "epoch": epoch, "step": trainer.global_step}
        self._started_s = time.monotonic()
        before = (self._history, self.last_model_path, self._current, self._step_saved)
        score = None if last_only or self.save_top_k == 0 else self._score(trainer, metrics)
        path, outdated = (None, []) if score is None else self._place(trainer, metrics, score)
        previous_last = self.last_model_path
        # the file that is about to be written holds this callback's state, itself included
        self._step_saved = trainer.global_step
        if path is not None and score is not None:
            kept = [saved for saved in self._history if saved[1] not in (*outdated, path)]
            self._history = [*kept, (score, path)]
        if self.save_last:
            self.last_model_path = self._filled(trainer, metrics, self.CHECKPOINT_NAME_LAST)
        try:
            if path is not None:
                trainer.save_checkpoint(path, weights_only=self.save_weights_only)
            if self.save_last:
                self._write_last(trainer, path)
        except BaseException:
            self._history, self.last_model_path, self._current, self._step_saved = before
            raise
        if self.save_last and previous_last not in ("", self.last_model_path):
            outdated = [*outdated, previous_last]
        if trainer.is_global_zero:
            for old in outdated:
                if old not in (path, self.last_model_path):
                    remove(old)
        if path is not None or self.save_last:
            self._tell(trainer, path)

    def _score(self, trainer: Trainer, metrics: Mapping[str, Any]) -> float | None:
        """Return the monitored value, or None if it cannot be there yet."""
        if self.monitor is None:
            return max((score for score, _ in self._known()), default=-1.0) + 1.0
        if self.monitor in metrics:
            self._current = float(metrics[self.monitor])
            return self._current
        message = _missing(f"ModelCheckpoint(monitor={self.monitor!r}) monitors", self.monitor, metrics)
        if self._validated or not _has_validation(trainer):
            raise MetricError(message)
        if self.save_top_k == -1:  # all are kept, so this one as well, as the worst
            return float("nan")
        warn(
            "checkpoint-no-score",
            f"At step {trainer.global_step}, before the first validation: {message} No best-k checkpoint is written.",
        )
        return None

    def _place(self, trainer: Trainer, metrics: Mapping[str, Any], score: float) -> tuple[str | None, list[str]]:
        """Return where to write this checkpoint, None if it is not among the best, and what it displaces."""
        k, mode = self.save_top_k, self._rank_mode
        if not is_kept(self._history, score, k, mode):
            return None, []
        outdated = to_delete([*self._history, (score, "")], k, mode)
        path = self._filled(trainer, metrics)
        if not self.enable_version_counter:
            here = [saved for saved in self._history if saved[1] == path]
            if here and k != -1 and not is_kept(here, score, 1, mode):
                return None, []  # one name holds one checkpoint: with k the better, with -1 the later
            others = [saved for saved in self._history if saved not in here]
            return path, to_delete([*others, (score, "")], k, mode)
        version = self.STARTING_VERSION
        while os.path.lexists(path) and path not in outdated:
            path = self._filled(trainer, metrics, version=version)
            version += 1
        return path, outdated

    def _filled(
        self, trainer: Trainer, metrics: Mapping[str, Any], filename: str | None = None, version: int | None = None
    ) -> str:
        """Fill the template; before the first validation, metrics that are not there yet show as ``nan``."""
        if not self._validated and _has_validation(trainer):
            template = filename if filename is not None else self.filename or _DEFAULT_FILENAME
            keys = (key for _, key, _ in _check_template(template) if key is not None)
            metrics = {**dict.fromkeys(keys, float("nan")), **metrics}
        return self.format_checkpoint_name(metrics, filename, version)

    def _write_last(self, trainer: Trainer, path: str | None) -> None:
        """Write ``last``: from the file just written where there is one."""
        if path is None:
            trainer.save_checkpoint(self.last_model_path, weights_only=self.save_weights_only)
        elif trainer.is_global_zero:
            put = link_checkpoint if self.save_last == "link" else copy_checkpoint
            put(path, self.last_model_path)

    def _tell(self, trainer: Trainer, path: str | None) -> None:
        if self.verbose:
            where = " and ".join(where for where in (path, self.last_model_path if self.save_last else None) if where)
            value = "" if self.monitor is None or self._current is None else f", {self.monitor}={self._current:.5g}"
            trainer.print(f"Saved step {trainer.global_step}{value}: {where}")
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)


def _check_policy(monitor: object, mode: object, save_top_k: object, save_last: object) -> None:
    if monitor is not None and (not isinstance(monitor, str) or not monitor):
        reject("monitor", monitor, "the key of a logged metric, or None")
    if mode not in ("min", "max"):
        reject("mode", mode, "'min' (lower is better) or 'max' (higher is better)")
    if isinstance(save_top_k, bool) or not isinstance(save_top_k, int) or save_top_k < -1:
        reject("save_top_k", save_top_k, "-1 (keep all), 0 (none), or a number of checkpoints")
    if monitor is None and save_top_k > 1:
        reject("save_top_k", save_top_k, "-1, 0 or 1 without monitor; to keep the latest k: monitor='step', mode='max'")
    if save_last not in (None, True, False, "link"):
        reject("save_last", save_last, "True, 'link', or None")


def _check_triggers(steps: object, interval: object, epochs: object, on_train_epoch_end: bool | None) -> None:
    for name, value in (("every_n_train_steps", steps), ("every_n_epochs", epochs)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            reject(name, value, "a number >= 0, where 0 means never, or None")
    if interval is not None and (not isinstance(interval, timedelta) or interval <= timedelta(0)):
        reject("train_time_interval", interval, "a datetime.timedelta longer than 0, or None")
    given = {"every_n_train_steps": steps, "every_n_epochs": epochs, "train_time_interval": interval}
    given = {name: value for name, value in given.items() if value}
    if len(given) > 1:
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigurationError(
            f"ModelCheckpoint has one trigger, and got {len(given)}: {shown}. Pass one of them, and add a second "
            "ModelCheckpoint for the other."
        )
    if on_train_epoch_end and given and "every_n_epochs" not in given:
        other = next(iter(given))
        reject("save_on_train_epoch_end", True, f"None with {other}; it moves the epoch trigger, which is not set")


def _check_template(template: str) -> list[tuple[str, str | None, str]]:
    """Split a template into (text, key or None, format) and refuse what cannot be filled."""
    if not template or os.path.isabs(template):
        reject("filename", template, "a name within dirpath, such as '{epoch}-{val_loss:.2f}'")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigurationError(f"filename={template!r} is not a valid template: {error}.") from None
    for _, key, spec, conversion in parts:
        if key is None:
            continue
        if not key or conversion or "{" in (spec or ""):
            reject("filename", template, "fields such as '{epoch:02d}' or '{val_loss:.2f}'")
        if not any(_accepts(spec or "", value) for value in (1, 1.5)):
            reject("filename", template, f"a number format after the colon in {{{key}:{spec}}}, such as .2f or 02d")
    return [(literal, key, spec or "") for literal, key, spec, _ in parts]


def _accepts(spec: str, value: float) -> bool:
    try:
        format(value, spec)
    except ValueError:
        return False
    return True


def _missing(who: str, key: str, metrics: Mapping[str, Any]) -> str:
    known = ", ".join(sorted(metrics)) or "none"
    return f"{who} {key!r}, which was not logged.{did_you_mean(key, metrics)} Known: {known}."


def _tensor(score: float) -> Tensor:
    return torch.tensor(score, dtype=torch.float64)


def _absolute(path: str | os.PathLike[str]) -> str:
    if "://" in str(path):
        reject("dirpath", str(path), "a local folder; remote ones are not supported yet")
    return os.path.abspath(Path(path).expanduser())


def _has_validation(trainer: Trainer) -> bool:
    return any(n > 0 for n in trainer.num_val_batches)
