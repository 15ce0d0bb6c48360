"""Save checkpoints during `fit`: the best k by a metric, the last one, or all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from leyden.callbacks.callback import Callback, has_validation
from leyden.callbacks.checkpoint_name import (
    DEFAULT_FILENAME,
    check_names,
    check_policy,
    check_triggers,
    fill_template,
    folder_path,
    is_anothers,
    is_former,
    keys_of,
    lies_in,
    missing,
    none_saved,
    step_in,
)
from leyden.checkpoint.retention import Books, Mode, Saved, is_kept, ranked, to_delete
from leyden.checkpoint.store import copy_checkpoint, exists, join, link_checkpoint, remove
from leyden.errors import MetricError, warn

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer


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
    A `fit` that ends before there was a validation, and therefore without a file, says so (``checkpoint-none-saved``).

    **In the background**: training waits while the state is copied, not while it is written. ``last`` is set, and what is
    displaced is deleted, only once the new file is whole on the disk. A write that failed raises at the next step boundary,
    or at the end of `fit`.

    **Resumed** from its newest checkpoint, a run that was killed ends with the same files as one that was not. Files that
    this training wrote beyond the step it goes on from are overwritten when it comes to their names again. Into another
    folder, files in the old one are never deleted: the best k are counted anew, and ``best_model_path`` stays the old
    best until it is beaten.

    Args:
        dirpath: folder or URL, such as ``s3://bucket/run``; by default ``checkpoints`` in the first logger's ``log_dir``,
            or in ``default_root_dir``.
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
        background: False waits for each file to be on the disk.
        **former: arguments of former days, which are translated and told of; others are refused.

    Raises:
        ConfigurationError: an argument is out of range, or triggers contradict each other.
    """

    CHECKPOINT_NAME_LAST = "last"
    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1
    _former = {"best": "best_model_score", "best_model": "best_model_path", "kth_best_model": "kth_best_model_path"}  # noqa: RUF012

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
        background: bool = True,
        **former: Any,
    ) -> None:
        if is_former(former, mode, save_top_k):
            from leyden.compat.former_callbacks import CheckpointArguments, checkpoint_arguments

            given = CheckpointArguments(dirpath, filename, monitor, mode, save_top_k, every_n_epochs)
            now = checkpoint_arguments(type(self), former, given)
            dirpath, filename, monitor, mode = now.dirpath, now.filename, now.monitor, now.mode
            save_top_k, every_n_epochs = now.save_top_k, now.every_n_epochs
        check_policy(monitor, mode, save_top_k, save_last)
        check_triggers(every_n_train_steps, train_time_interval, every_n_epochs, save_on_train_epoch_end)
        no_trigger = every_n_train_steps is None and train_time_interval is None and every_n_epochs is None
        self.dirpath = None if dirpath is None else folder_path(dirpath)
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
        self.background = background
        check_names(filename, self.CHECKPOINT_NAME_LAST, save_last, self.FILE_EXTENSION)
        self._fitting = False
        self._validated = False
        self._start_step = 0
        self._started_s = 0.0
        self._pending: Callable[[], None] | None = None
        self._unsettled: list[Books] = []  # as they were before each save that is not on the disk yet
        self.start_anew()

    def start_anew(self) -> None:
        """Forget the checkpoints of an earlier `fit`; their files stay."""
        self._books = Books()
        self._requested: tuple[int, bool] | None = None  # a save that was asked for and is not made yet
        self._loaded_from: str | None = None  # folder in the state that was loaded, until it is compared

    @property
    def state_key(self) -> str:
        """Differs for callbacks that differ in what they monitor or in their trigger."""
        names = ("monitor", "mode", "every_n_train_steps", "every_n_epochs", "train_time_interval")
        return f"{type(self).__qualname__}{ {name: getattr(self, name) for name in names}!r}"

    @property
    def last_model_path(self) -> str:
        """Path of the last checkpoint, or an empty string."""
        return self._books.last

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
        return {path: _tensor(score) for score, path in self._books.history} if self.monitor is not None else {}

    @property
    def kth_best_model_path(self) -> str:
        """Path of the worst of the kept checkpoints, or an empty string."""
        history = self._books.history
        return ranked(history, self._rank_mode)[-1][1] if history else ""

    @property
    def kth_value(self) -> Tensor | None:
        """Score of the worst of the kept checkpoints, or None."""
        return self.best_k_models.get(self.kth_best_model_path)

    @property
    def current_score(self) -> Tensor | None:
        """The monitored value at the latest trigger, or None."""
        return None if self._books.current is None else _tensor(self._books.current)

    def state_dict(self) -> dict[str, Any]:
        """Paths, scores and the step of the last save, as plain data."""
        requested = None if self._requested is None else list(self._requested)
        return {"monitor": self.monitor, "dirpath": self.dirpath, "requested": requested, **self._books.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; files that are gone are forgotten when the fit starts."""
        self._books = Books.of_state(state_dict)
        requested = state_dict.get("requested")
        self._requested = None if requested is None else (int(requested[0]), bool(requested[1]))
        self._loaded_from = state_dict["dirpath"] or ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, if none was given."""
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        self._ask = trainer.shared_request(partial(self._request, trainer))
        if self.dirpath is None:
            log_dirs = (logger.log_dir for logger in trainer.loggers)
            root = next((folder for folder in log_dirs if folder is not None), trainer.default_root_dir)
            self.dirpath = folder_path(join(root, "checkpoints"))
        self.dirpath = trainer.strategy.broadcast(self.dirpath)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget saves that never came, or failed in the background, because of an error."""
        self._fitting = self._validated = False
        self._pending = self._requested = None
        if self._unsettled:
            self._take_back(self._unsettled[0])
        self._books = replace(self._books, displaced=())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare loaded state with the folder and the run."""
        self._start_step = trainer.global_step
        self._started_s = time.monotonic()
        if self._loaded_from is None:  # if it is the same object in another run, its steps were others
            self._books = replace(self._books, step_saved=None, displaced=())
            return
        if self._loaded_from != self.dirpath:
            self._books = replace(self._books, inherited=self._best(), history=(), last="", displaced=())
        self._loaded_from = None
        books = self._books
        self._books = replace(
            books,
            history=tuple(saved for saved in books.history if self._is_still(saved[1])),
            inherited=books.inherited if books.inherited is not None and exists(books.inherited[1]) else None,
            last=books.last if self._lies_here(books.last) else "",
        )
        if trainer.is_global_zero:
            self._finish(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the save that was still to come when the checkpoint was written that the run goes on from."""
        if self._requested is not None and self._pending is None:
            self._save(trainer, *self._requested)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step and time triggers."""
        step = trainer.global_step
        if step == self._start_step:  # within the first accumulation window
            return
        every, interval = self.every_n_train_steps, self.train_time_interval
        if every and step % every == 0:
            self._request(trainer)
        elif interval is not None and time.monotonic() - self._started_s >= interval.total_seconds():
            self._ask()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch trigger, by default."""
        if not self._fitting or trainer.sanity_checking:
            return
        self._validated = True
        if not self.save_on_train_epoch_end and self._epoch_is_due(trainer):
            self._request(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch trigger, without validation or if asked for."""
        if (self.save_on_train_epoch_end or not has_validation(trainer)) and self._epoch_is_due(trainer):
            self._request(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last`` once more if steps were done since."""
        if self.save_last and trainer.global_step:
            self._request(trainer, last_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was asked for at the very end, in case no step boundary came after it; tell if there is no file."""
        if self._pending is not None:
            self._pending()
        after_validation = self.every_n_epochs > 0 and not self.save_on_train_epoch_end and has_validation(trainer)
        nothing = not self._books.held and self.save_top_k != 0
        trained = trainer.global_step != self._start_step and not trainer.fast_dev_run
        if nothing and trained and after_validation and not self._validated:
            warn("checkpoint-none-saved", none_saved(self.monitor, trainer.global_step, trainer.current_epoch))

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
            filename = self.filename if self.filename is not None else DEFAULT_FILENAME
        name = fill_template(filename, metrics, self.auto_insert_metric_name, self.CHECKPOINT_EQUALS_CHAR)
        version = "" if ver is None else f"{self.CHECKPOINT_JOIN_CHAR}v{ver}"
        name = self._with_ending(name, version)
        return name if self.dirpath is None else join(self.dirpath, name)

    @property
    def _rank_mode(self) -> Mode:
        return self.mode if self.monitor is not None else "max"  # without a metric the score is the step

    def _with_ending(self, name: str, version: str = "") -> str:
        return name.removesuffix(self.FILE_EXTENSION) + version + self.FILE_EXTENSION

    def _best(self) -> Saved | None:
        known = ranked(self._books.known, self._rank_mode)
        return known[0] if known else None

    def _epoch_is_due(self, trainer: Trainer) -> bool:
        return self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _request(self, trainer: Trainer, last_only: bool = False) -> None:
        """Ask for one save at the next step boundary."""
        if trainer.fast_dev_run or self._pending is not None or trainer.global_step == self._books.step_saved:
            return
        epoch = trainer.current_epoch  # the boundary may lie behind the turn of the epoch

        def save() -> None:
            if self._pending is save:
                self._pending = None
                self._save(trainer, epoch, last_only)

        self._pending, self._requested = save, (epoch, last_only)
        trainer.at_step_boundary(save)

    def _save(self, trainer: Trainer, epoch: int, last_only: bool) -> None:
        """Decide on rank 0, write, and leave what has to wait for the file to those who write it."""
        self._started_s = time.monotonic()
        self._requested = None
        before = self._books
        decision = self._decide(trainer, epoch, last_only) if trainer.is_global_zero else None
        # the file that is about to be written holds this callback's state, itself included
        self._books, path = trainer.strategy.broadcast(decision)
        if path is None and not self.save_last:
            return
        self._unsettled.append(before)
        settle = partial(self._settle, before, self._books, path, self._teller(trainer, path))
        first = path or self._books.last
        try:
            trainer.save_checkpoint(first, self.save_weights_only, wait=not self.background, then=[settle])
        except BaseException:
            self._take_back(before)
            raise
        if not trainer.is_global_zero:  # which settles it
            self._unsettled.clear()

    def _decide(self, trainer: Trainer, epoch: int, last_only: bool) -> tuple[Books, str | None]:
        """What the books say once this checkpoint is written, and where; None if it is not among the best."""
        metrics = {**trainer.callback_metrics, "epoch": epoch, "step": trainer.global_step}
        before = self._books
        score = None if last_only or self.save_top_k == 0 else self._score(trainer, metrics)
        path, displaced = (None, []) if score is None else self._place(trainer, metrics, score)
        last = self._filled(trainer, metrics, self.CHECKPOINT_NAME_LAST) if self.save_last else before.last
        history = before.history
        if path is not None and score is not None:
            history = (*(saved for saved in history if saved[1] not in (*displaced, path)), (score, path))
        gone = tuple(old for old in (*displaced, before.last) if old not in ("", path, last))
        books = replace(self._books, history=history, last=last, step_saved=trainer.global_step, displaced=gone)
        return books, path

    def _settle(self, before: Books, books: Books, path: str | None, tell: Callable[[], None]) -> None:
        """Do what had to wait for the file; called by the thread that wrote it."""
        if before not in self._unsettled:  # taken back: Ctrl-C came between the copy and the write
            return
        if path is not None and self.save_last:
            self._put_last(path, books.last)
        del self._unsettled[: self._unsettled.index(before) + 1]  # each write waits for the one before
        for old in books.displaced:
            remove(old)
        tell()

    def _take_back(self, before: Books) -> None:
        """Undo what a failed save has changed, and the saves after it; nothing if the file is there."""
        if before in self._unsettled:
            self._books = before
            del self._unsettled[self._unsettled.index(before) :]

    def _put_last(self, path: str, last: str) -> None:
        put = link_checkpoint if self.save_last == "link" else copy_checkpoint
        put(path, last)

    def _finish(self, trainer: Trainer) -> None:
        """Do what the process that wrote the checkpoint we go on from was killed before it could do."""
        books = self._books
        newest = books.history[-1][1] if books.history else ""
        if books.step_saved != self._start_step or books.step_saved not in (step_in(newest), step_in(books.last)):
            return
        if self.save_last and books.last and step_in(books.last) != books.step_saved:
            self._put_last(newest, books.last)
        for old in set(filter(self._lies_here, books.displaced)) - self._held(trainer):
            remove(old)

    def _score(self, trainer: Trainer, metrics: Mapping[str, Any]) -> float | None:
        """Return the monitored value, or None if it cannot be there yet."""
        if self.monitor is None:
            return float(trainer.global_step)  # the later the better
        if self.monitor in metrics:
            score = float(metrics[self.monitor])
            self._books = replace(self._books, current=score)
            return score
        message = missing(f"ModelCheckpoint(monitor={self.monitor!r}) monitors", self.monitor, metrics)
        if self._validated or not has_validation(trainer):
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
        k, mode, history = self.save_top_k, self._rank_mode, self._books.history
        if not is_kept(history, score, k, mode):
            return None, []
        outdated = to_delete([*history, (score, "")], k, mode)
        path = self._filled(trainer, metrics)
        if not self.enable_version_counter:
            here = [saved for saved in history if saved[1] == path]
            if here and k != -1 and not is_kept(here, score, 1, mode):
                return None, []  # one name holds one checkpoint: with k the better, with -1 the later
            others = [saved for saved in history if saved not in here]
            return path, to_delete([*others, (score, "")], k, mode)
        version = self.STARTING_VERSION
        while path not in outdated and self._is_taken(trainer, path):
            path = self._filled(trainer, metrics, version=version)
            version += 1
        return path, outdated

    def _filled(
        self, trainer: Trainer, metrics: Mapping[str, Any], filename: str | None = None, version: int | None = None
    ) -> str:
        """Fill the template; before the first validation, metrics that are not there yet show as ``nan``."""
        if not self._validated and has_validation(trainer):
            template = filename if filename is not None else self.filename or DEFAULT_FILENAME
            metrics = {**dict.fromkeys(keys_of(template), float("nan")), **metrics}
        return self.format_checkpoint_name(metrics, filename, version)

    def _is_taken(self, trainer: Trainer, path: str) -> bool:
        """Whether nothing may be written under this name: a file that is kept, or of another run."""
        if path in self._held(trainer):
            return True
        if path in self._books.displaced or not exists(path):  # what is deleted in the background counts as gone
            return False
        return is_anothers(path, trainer.run_id, self._start_step, trainer.global_step)

    def _held(self, trainer: Trainer) -> set[str]:
        """Every path that a ModelCheckpoint of this Trainer keeps."""
        return self._books.held.union(*(each._books.held for each in trainer.checkpoint_callbacks))

    def _lies_here(self, path: str) -> bool:
        return lies_in(self.dirpath, path, self.FILE_EXTENSION)

    def _is_still(self, path: str) -> bool:
        """Whether the file is there and the one it was, not one that a later save put under its name."""
        return self._lies_here(path) and exists(path) and (step_in(path) or 0) <= self._start_step

    def _teller(self, trainer: Trainer, path: str | None) -> Callable[[], None]:
        """What tells of this save, with the values of now."""
        where = " and ".join(where for where in (path, self._books.last if self.save_last else None) if where)
        current = self._books.current
        value = "" if self.monitor is None or current is None else f", {self.monitor}={current:.5g}"
        line = f"Saved step {trainer.global_step}{value}: {where}"

        def tell() -> None:
            if self.verbose:
                trainer.print(line)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

        return tell


def _tensor(score: float) -> Tensor:
    return torch.tensor(score, dtype=torch.float64)
