"""What callbacks, loggers and modules may read of a Trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden.account import TimeAccount
from leyden.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    Preemption,
    ProgressBar,
)
from leyden.errors import ConfigurationError, LeydenError, reject
from leyden.metrics import as_tensors
from leyden.optimizers import SchedulerConfig
from leyden.precision import default_dtype
from leyden.trainer.arguments import TrainerArguments
from leyden.trainer.states import RunningStage, TrainerState, TrainerStatus

if TYPE_CHECKING:
    from leyden.compiled import Compilation, MeasuredCompilation
    from leyden.datamodule import LightningDataModule
    from leyden.loggers import Logger
    from leyden.module import LightningModule
    from leyden.profilers import Profiler
    from leyden.run import Evaluation, Outlet, Run, Status
    from leyden.sources import Sources
    from leyden.strategy import Strategy
    from leyden.trainer import Trainer

Counts = list[int | float]

_SHOWN_FROM_S = 1.0  # of training: in less there is nothing to save


class TrainerView(TrainerArguments):
    """The public state of a Trainer: abstract, and there so that the verbs have a page of their own."""

    callbacks: list[Callback]
    _active_callbacks: list[Callback]  # the above, and those that the module brings itself
    loggers: list[Logger]
    strategy: Strategy
    state: TrainerState
    _last_counts: dict[str, Counts]
    profiler: Profiler
    _loaded_from: str | None = None
    _status: Status
    _outlet: Outlet
    _sources: Sources | None
    _module: LightningModule | None
    _datamodule: LightningDataModule | None
    _run: Run | None
    _evaluation: Evaluation | None

    # Where the run stands

    @property
    def current_epoch(self) -> int:
        """Epochs completed before the present one."""
        return self._outlet.progress.epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps done: one per window of accumulated batches."""
        return self._outlet.progress.global_step

    @property
    def run_id(self) -> str | None:
        """A name of this training, the same after a resume; None before the first `fit`."""
        return None if self._run is None else self._run.run_id

    @property
    def is_last_batch(self) -> bool:
        """Whether the present training batch is the last of its epoch."""
        return self._run is not None and self._run.is_last_batch

    @property
    def interrupted(self) -> bool:
        """Whether the present or the last verb ended by an exception: an error, Ctrl-C, a signal."""
        return self.state.status is TrainerStatus.INTERRUPTED

    @property
    def skipped_batches(self) -> int:
        """Training batches whose `training_step` returned None, or which ``nan_policy`` left out."""
        return self._outlet.progress.skipped_batches

    @property
    def should_stop(self) -> bool:
        """Whether training ends at the next step boundary (once ``min_epochs`` and ``min_steps`` are reached)."""
        return self._run is not None and (self._run.should_stop or self._run.stop_wished())

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        if self._run is not None:
            self._run.wish_stop(stop)

    @property
    def training(self) -> bool:
        """Whether `fit` trains, or is being set up."""
        return self.state.stage is RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        """Whether validation is running, by itself or inside of training."""
        return self.state.stage is RunningStage.VALIDATING

    @property
    def testing(self) -> bool:
        """Whether `test` is running."""
        return self.state.stage is RunningStage.TESTING

    @property
    def predicting(self) -> bool:
        """Whether `predict` is running."""
        return self.state.stage is RunningStage.PREDICTING

    @property
    def sanity_checking(self) -> bool:
        """Whether the validation batches before training are running."""
        return self.state.stage is RunningStage.SANITY_CHECKING

    @property
    def evaluating(self) -> bool:
        """Whether validation (the sanity check too) or test is running."""
        stage = self.state.stage
        return stage is not None and stage.evaluating

    @property
    def received_sigterm(self) -> bool:
        """Whether SIGTERM, or another signal that `Preemption` watches, has come during the present or the last `fit`."""
        return any(isinstance(callback, Preemption) and callback.received for callback in self._active_callbacks)

    # Time

    @property
    def time_account(self) -> TimeAccount:
        """Where the time of the present or the last `fit` went; an empty one before the first."""
        return TimeAccount() if self._run is None else self._run.account

    def _close_account(self, verb: str, outcome: str) -> None:
        """End the account of a `fit`, and print it beneath a progress bar."""
        if verb != "fit" or self._run is None:
            return
        account, bar = self._run.account, self.progress_bar_callback
        account.stop()
        # A script that wants no bar wants no account. A trial, or a run of a moment, has no time that could be saved.
        shown = bar is not None and bar.is_enabled and self.is_global_zero and not self.fast_dev_run
        if shown and outcome != "failed" and account.total - account.setup_s >= _SHOWN_FROM_S:
            print(account.summary())
            if self._run.compiled is not None:
                print(": ".join(self._run.compiled.line()))

    @property
    def compilation(self) -> Compilation | MeasuredCompilation | None:
        """What ``compile`` has come to in the present or last `fit`: ``line()`` says it; None if nothing was to be compiled."""
        return None if self._run is None else self._run.compiled

    # Metrics

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Every logged value by key, as 0-d tensors on the device."""
        return as_tensors(self._outlet.metrics.callback_values())

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """Those of the values that loggers are given, by their key, each as it is now."""
        return as_tensors(self._outlet.metrics.logger_values())

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The values logged with ``prog_bar=True``, as numbers; reading them waits for the device."""
        return self._outlet.metrics.progress_bar_values()

    # Settings that change, and places

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches per optimizer step."""
        return self._run.accumulate if self._run is not None else self._settings.accumulate_grad_batches

    @accumulate_grad_batches.setter
    def accumulate_grad_batches(self, batches: int) -> None:
        if type(batches) is not int or batches < 1:
            reject("accumulate_grad_batches", batches, "an integer ≥ 1")
        if self._run is not None:
            self._run.accumulate = batches
        else:
            self._settings.accumulate_grad_batches = batches

    @property
    def log_dir(self) -> str | None:
        """The first logger's folder, else `default_root_dir`; None if nothing is written."""
        for logger in self.loggers:
            if logger.log_dir is not None:
                return os.fspath(Path(logger.log_dir))
        return None if self.fast_dev_run else self._default_root_dir

    def explain(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> str:
        """Print the lifecycle of `fit` with your own hooks in their places, and what was chosen for you and why.

        After a `fit` of the same module also where its time went, as `time_account` has it.

        Args:
            model: whose hooks.
            datamodule: whose hooks as well.

        Returns:
            What was printed.
        """
        from leyden import assemble, checks
        from leyden.explain import explain

        checks.check_fit(checks.check_module(model))
        text = explain(cast("Trainer", self), model, datamodule, assemble.dressed)
        print(text)
        return text

    # Parts

    @property
    def logger(self) -> Logger | None:
        """The first logger; setting it leaves no other, and None leaves none."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Logger | None) -> None:
        self.loggers = [logger] if logger else []

    @property
    def ckpt_path(self) -> str | None:
        """The file that the present or the last verb has loaded; None if it was none."""
        return self._loaded_from

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss of the present or the last `fit`, under "16-mixed"; else None."""
        scaler = self._run.scaler if self._run is not None else None
        return scaler.scaler if scaler is not None else None

    @property
    def lightning_module(self) -> LightningModule:
        """The module of the present or the last verb."""
        if self._module is None:
            raise LeydenError("This Trainer has not run a module yet.")
        return self._module

    @property
    def model(self) -> LightningModule | None:
        """The module of the present or the last verb; None before."""
        return self._module

    @property
    def datamodule(self) -> LightningDataModule | None:
        """The datamodule of the present or the last verb."""
        return self._datamodule

    @property
    def optimizers(self) -> list[Optimizer]:
        """Torch's optimizers of the present or the last `fit`."""
        return [handle.optimizer for handle in self._run.handles] if self._run is not None else []

    @property
    def lr_scheduler_configs(self) -> list[SchedulerConfig]:
        """The schedulers of the present or the last `fit`, with when they step."""
        return self._run.schedulers if self._run is not None else []

    @property
    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        """Every `ModelCheckpoint`, one that `configure_callbacks` brought too; so for the next four."""
        return [callback for callback in self._active_callbacks if isinstance(callback, ModelCheckpoint)]

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        """The first `ModelCheckpoint`."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        """Every `EarlyStopping`."""
        return [callback for callback in self._active_callbacks if isinstance(callback, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The first `EarlyStopping`."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        """The progress bar."""
        return next((callback for callback in self._active_callbacks if isinstance(callback, ProgressBar)), None)

    def _way_on(self, verb: str) -> str:
        """What to do after an interruption, where there is something to go on from."""
        saved = any(callback.last_model_path or callback.best_model_path for callback in self.checkpoint_callbacks)
        return " fit(..., ckpt_path='last') goes on from the newest checkpoint." if saved and verb == "fit" else ""

    def _ran_last(
        self, verb: str, datamodule: LightningDataModule | None, has_loaders: bool, ckpt_path: Any
    ) -> tuple[LightningModule, LightningDataModule | None, Any]:
        """What a verb without a model evaluates: the module that was run last, with its best weights if there are some."""
        if self._module is None:
            raise ConfigurationError(f"{verb} needs a model: this Trainer has not run one yet.")
        callback = self.checkpoint_callback
        if ckpt_path is None and callback is not None and callback.best_model_path:
            ckpt_path = "best"
            self.print(f"{verb}() without a model: its best checkpoint is taken, {callback.best_model_path}.")
        return self._module, datamodule or (None if has_loaders else self._datamodule), ckpt_path

    # Loaders

    @property
    def train_dataloader(self) -> Any:
        """The training loader as the user gave it; None before it was asked for."""
        return self._sources.raw("train") if self._sources is not None else None

    @property
    def val_dataloaders(self) -> Any:
        """The validation loaders as the user gave them."""
        return self._sources.raw("val") if self._sources is not None else None

    @property
    def test_dataloaders(self) -> Any:
        """The test loaders as the user gave them."""
        return self._sources.raw("test") if self._sources is not None else None

    @property
    def predict_dataloaders(self) -> Any:
        """The loaders to predict as the user gave them."""
        return self._sources.raw("predict") if self._sources is not None else None

    @property
    def num_training_batches(self) -> int | float:
        """Training batches per epoch; inf if the loader has no length, and as long as it was not asked for."""
        return _whole(self._run.source.total) if self._run is not None and hasattr(self._run, "source") else math.inf

    @property
    def val_check_batch(self) -> int | float | None:
        """Training batches between two validations of the present or the last `fit`; None if time or nobody says when."""
        schedule = self._run.schedule if self._run is not None else None
        if schedule is None or schedule.every is not None:
            return None
        every = schedule.every_n_batches
        return self.num_training_batches if every == math.inf else _whole(every)

    @property
    def enable_validation(self) -> bool:
        """Whether the present or the last verb validates: there is a step and a loader, and the limit is not 0."""
        return self._sources is not None and self._sources.validates()

    @property
    def num_val_batches(self) -> Counts:
        """Validation batches of each loader, also during the sanity check, which takes fewer."""
        if self.sanity_checking and self._sources is not None:
            return [_whole(source.total) for source in self._sources.validation()]
        return self._counts("validation")

    @property
    def num_sanity_val_batches(self) -> Counts:
        """Batches of the sanity check, of each loader."""
        return [_whole(min(self.num_sanity_val_steps, batches)) for batches in self.num_val_batches]

    @property
    def num_test_batches(self) -> Counts:
        """Test batches of each loader."""
        return self._counts("test")

    @property
    def num_predict_batches(self) -> Counts:
        """Batches to predict of each loader."""
        return self._counts("predict")

    def _counts(self, stage: str) -> Counts:
        for evaluation in (self._evaluation, self._run.validation if self._run is not None else None):
            if evaluation is not None and evaluation.stage == stage:
                return [_whole(source.total) for source in evaluation.sources]
        return self._last_counts.get(stage, [])

    def _remember_counts(self) -> None:
        for stage in ("validation", "test", "predict"):
            self._last_counts[stage] = self._counts(stage)

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that `fit` will make; inf if it has no end. Schedulers such as OneCycleLR need it."""
        if self._sources is None:
            raise LeydenError("estimated_stepping_batches is known during fit only: in configure_optimizers and later.")
        for callback in self._active_callbacks:
            if isinstance(callback, GradientAccumulationScheduler):
                return _whole(self._sources.estimated_steps(callback.get_accumulate_grad_batches))
        return _whole(self._sources.estimated_steps(lambda epoch: self.accumulate_grad_batches))

    # Predictions

    @property
    def predictions(self) -> list[Any]:
        """What `predict` has so far: a list of outputs, or a list of such lists if there are several loaders."""
        evaluation = self._evaluation
        if evaluation is None or evaluation.predictions is None:
            return []
        return evaluation.predictions[0] if len(evaluation.sources) == 1 else evaluation.predictions

    @property
    def predict_batch_indices(self) -> list[int] | None:
        """The sample indices of the present batch to predict, if a writer asked for them and they can be known."""
        return self._evaluation.batch_indices if self._evaluation is not None else None

    @property
    def epoch_batch_indices(self) -> list[list[list[int]]]:
        """The sample indices of all batches so far, by loader and batch."""
        return self._evaluation.epoch_batch_indices if self._evaluation is not None else []

    # Processes and devices

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once, from the first process only."""
        if self.is_global_zero:
            print(*args, **kwargs)

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes logs and files."""
        return self.strategy.is_global_zero

    @property
    def global_rank(self) -> int:
        """This process's number among all."""
        return self.strategy.global_rank

    @property
    def local_rank(self) -> int:
        """This process's number on its machine."""
        return self.strategy.local_rank

    @property
    def node_rank(self) -> int:
        """The number of this process's machine."""
        return self.strategy.node_rank

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self.strategy.world_size

    @property
    def device(self) -> torch.device:
        """The device that steps run on."""
        return self.strategy.device

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make modules in here on the device and in the precision that they will be trained in, so that nothing is copied.

        Args:
            empty_init: accepted for compatibility. For modules that no device can hold whole, see `configure_model`.
        """
        place = torch.device("cpu") if self.strategy.shards_state else self.device
        with place, default_dtype(self._settings.precision.parameter_dtype):
            yield


def _whole(count: float) -> int | float:
    return count if count == math.inf else int(count)
