"""Run: all that was decided before the first batch. The loop walks it and decides nothing again."""

from __future__ import annotations

import enum
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden.account import TimeAccount
from leyden.agreement import Agreement
from leyden.data.generators import set_generator_states
from leyden.data.loader import Move, Source
from leyden.errors import ConfigurationError, StepError
from leyden.fused import KernelChoice
from leyden.hooks import EvaluationHooks, Hook, HookTable
from leyden.metrics import Metrics, Value, missing_metric, to_floats
from leyden.metrics_state import restore_metrics
from leyden.optimizers import LightningOptimizer, SchedulerConfig
from leyden.precision import LossScaler
from leyden.progress import Progress
from leyden.seed import restore_random_state

if TYPE_CHECKING:
    from leyden.compiled import Compilation, MeasuredCompilation
    from leyden.halving import Halving
    from leyden.loggers import Logger
    from leyden.module import LightningModule
    from leyden.policies import FiniteGuard
    from leyden.strategy import Strategy


class Mode(enum.Enum):
    """Who steps the optimizer."""

    AUTOMATIC = "the loop"
    CLOSURE = "the loop, through a closure: the optimizer or an overridden optimizer_step needs one"
    MANUAL = "training_step itself"


@dataclass
class Status:
    """What is going on, for the public Trainer: the verb, and the stage inside of it."""

    verb: str | None = None
    stage: str | None = None
    sanity: bool = False


@dataclass
class Outlet:
    """Where values leave for the loggers, and the account of the verb's time."""

    loggers: Sequence[Logger]
    metrics: Metrics
    progress: Progress
    account: TimeAccount = field(default_factory=TimeAccount)

    def send(self, values: dict[str, Value], step: int, with_epoch: bool = True) -> None:
        """Send values to every logger; this is where the host waits for the device.

        Args:
            values: by key, on any device.
            step: the number of optimizer steps done, or of the batch for step values of an evaluation.
            with_epoch: whether the epoch goes along.
        """
        if not values or not self.loggers:
            return
        account = self.account
        with account.spent_on("logging"):
            with account.spent_on("logging" if account.device is None else "waiting for the device"):
                numbers = to_floats(values)
            if with_epoch:
                numbers["epoch"] = self.progress.epoch
            for logger in self.loggers:
                logger.log_metrics(numbers, step)


@dataclass
class Evaluation:
    """One kind of evaluation: validation, sanity check, test or predict.

    Attributes:
        stage: for `Status`.
        step: the user's step, which gets the first ``arity`` of ``(batch, batch_idx, dataloader_idx)``.
        arity: see ``step``.
        hooks: who listens.
        sources: the loaders.
        move: brings a batch to the device, or None.
        metrics: shared with training, so that callbacks see all values.
        outlet: where they leave for the loggers.
        step_context: autocast or nothing.
        no_grad: makes a context without gradients.
        own_eval: whether the user sets eval mode; else it is set here.
        own_train: whether the user sets train mode back; else every submodule's own is restored.
        predictions: where `predict` keeps what steps return, one list per loader; None if nothing is kept.
        records_indices: whether sample indices are kept, for prediction writers.
        batch_indices: sample indices of the present batch.
        in_step: gives the batches of a loader of which ranks may have different numbers, where each rank takes part in the
            forward passes of all; None where each is on its own.
    """

    module: LightningModule
    stage: str
    step: Hook
    arity: int
    hooks: EvaluationHooks
    sources: Sequence[Source]
    move: Move | None
    metrics: Metrics
    outlet: Outlet
    status: Status
    step_context: AbstractContextManager[Any]
    no_grad: Callable[[], AbstractContextManager[Any]]
    own_eval: bool
    own_train: bool
    predictions: list[list[Any]] | None = None
    records_indices: bool = False
    batch_indices: list[int] | None = None
    epoch_batch_indices: list[list[list[int]]] = field(default_factory=list)
    in_step: Callable[[Evaluation, Source, int], Iterator[tuple[Any, int]]] | None = None

    @property
    def logs(self) -> bool:
        """Whether values may be logged: not in prediction."""
        return self.stage != "predict"


@dataclass
class ValidationSchedule:
    """When training stops to validate.

    Attributes:
        every_n_batches: training batches between validations; inf means at each epoch's end only.
        every_n_epochs: which epochs; None counts ``every_n_batches`` across epochs.
        every: a duration instead of a number of batches.
        ask: asks all ranks to owe a validation, because their clocks differ; None if there is one.
    """

    every_n_batches: float
    every_n_epochs: int | None
    every: timedelta | None = None
    ask: Callable[[], None] | None = None
    last: float = field(default_factory=time.monotonic)
    owed: bool = False

    def note_batch(self, progress: Progress, epoch_is_over: bool) -> None:
        """Count a batch; a validation that falls into a window of accumulated batches is owed until its end."""
        if self.every is not None:
            if not self.owed and time.monotonic() - self.last >= self.every.total_seconds():
                (self.ask or self.owe)()
            return
        if self.every_n_epochs is None:
            self.owed = self.owed or progress.total_batches % self.every_n_batches == 0
        elif (progress.epoch + 1) % self.every_n_epochs == 0:
            at_end = self.every_n_batches == math.inf
            self.owed = self.owed or (epoch_is_over if at_end else progress.batch % self.every_n_batches == 0)

    def owe(self) -> None:
        """Validate at the next step boundary."""
        self.owed = True

    def pay(self) -> bool:
        """Whether a validation is owed; it is not any more."""
        owed, self.owed = self.owed, False
        if owed and self.every is not None:
            self.last = time.monotonic()
        return owed


@dataclass
class Restored:
    """What of a checkpoint must be put in place last, when set-up and the epoch's first hooks have run.

    Attributes:
        random_state: from `leyden.seed.capture_random_state`.
        metrics: training's unfinished series and the published values; None if the file has none.
        data: where the loaders stood: ``position`` in the middle of an epoch, ``train`` between two, ``validation``.
        generators: finds the random generators that the user's objects own.
        then: called afterwards by all ranks, or None.
    """

    random_state: dict[str, Any]
    metrics: dict[str, Any] | None
    data: dict[str, Any]
    generators: Callable[[], dict[str, Any]] = dict
    then: Callable[[], None] | None = None


@dataclass
class Run:
    """One `fit`: everything the loop needs, resolved.

    Attributes:
        training_step: the user's step, which gets the first ``arity`` of ``(batch, batch_idx)``.
        mode: who steps the optimizer.
        optimizer: the one of automatic optimization.
        handles: all optimizers as `LightningModule.optimizers()` gives them out.
        reevaluates: whether the optimizer evaluates a whole window several times, as LBFGS does.
        backward: ``Tensor.backward`` or the user's.
        zero_grad: sets gradients to none: the optimizer's or the user's.
        clip: clips gradients, or None.
        own_optimizer_step: the user's `optimizer_step`, or None.
        own_scheduler_step: the user's `lr_scheduler_step`, or None.
        wants_outputs: whether somebody listens to what a training batch gave.
        steps_schedulers: whether the loop steps the schedulers; in manual optimization the user does.
        accumulate: batches per step.
        window: batches in the present window: ``accumulate``, or fewer at an epoch's end.
        share: of its batch's samples that is in what is trained on now: below 1 if ``oom_policy`` has split the batch.
        weight: of this rank's batch, where ranks have parts of different size of one global batch; else 1.
        guard: does what ``nan_policy`` says, or None.
        halving: does what ``oom_policy`` says, or None.
        compiled: takes whole steps as graphs, or None.
        kernels: whose kernels the optimizers step with, for `Trainer.explain`.
        restored: what of the checkpoint that the run goes on from waits until training begins.
        run_id: a name of this training; a run that goes on from a checkpoint takes its name over.
        account: of where the time goes.
        strategy: how ranks share the work.
        agreement: what ranks ask of each other at step boundaries; None if there is one rank.
        sync_gradients: told before each micro-batch whether it is its window's last, so that gradients are reduced once; or None.
        agrees_on_skipping: whether somebody may end an epoch from `on_train_batch_start`, which all ranks must do together.
    """

    module: LightningModule
    status: Status
    progress: Progress
    metrics: Metrics
    hooks: HookTable
    step_context: AbstractContextManager[Any]
    backward_context: AbstractContextManager[Any]
    scaler: LossScaler | None
    device: torch.device
    mode: Mode
    training_step: Hook
    arity: int
    optimizer: Optimizer | None
    handles: list[LightningOptimizer]
    schedulers: list[SchedulerConfig]
    reevaluates: bool
    backward: Callable[..., Any]
    zero_grad: Callable[[], Any]
    clip: Callable[[Optimizer], Any] | None
    own_optimizer_step: Hook | None
    own_scheduler_step: Hook | None
    wants_outputs: bool
    max_epochs: int
    min_epochs: int
    max_steps: int
    min_steps: int
    accumulate: int
    log_every_n_steps: int
    outlet: Outlet
    reload_loaders: Callable[[Run], None]
    move: Move | None
    strategy: Strategy
    steps_schedulers: bool = True
    source: Source = field(init=False)
    validation: Evaluation | None = None
    schedule: ValidationSchedule | None = None
    window: int = 1
    share: float = 1.0
    weight: float = 1.0
    guard: FiniteGuard | None = None
    halving: Halving | None = None
    compiled: Compilation | MeasuredCompilation | None = None
    held: list[tuple[Any, int, float]] = field(default_factory=list)
    loss: Tensor | None = None
    stepped: bool = False
    moved: bool = True
    is_last_batch: bool = False
    should_stop: bool = False
    requests: list[Callable[[], None]] = field(default_factory=list)
    kernels: list[KernelChoice] = field(default_factory=list)
    agreement: Agreement | None = None
    sync_gradients: Callable[[bool], None] | None = None
    agrees_on_skipping: bool = False
    restored: Restored | None = None
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    account: TimeAccount = field(init=False)
    epoch_schedulers: list[SchedulerConfig] = field(init=False)
    step_schedulers: list[SchedulerConfig] = field(init=False)

    def __post_init__(self) -> None:
        self.account = self.outlet.account
        self.move = None if self.move is None else self.account.timed("host to device", self.move)
        stepped_here = self.schedulers if self.steps_schedulers else []
        self.epoch_schedulers = [config for config in stepped_here if config.interval == "epoch"]
        self.step_schedulers = [config for config in stepped_here if config.interval == "step"]

    # When to go on, when to stop

    def wants_epoch(self) -> bool:
        """Whether another epoch is to be trained."""
        if self.source.total == 0 or (self.max_epochs != -1 and self.progress.epoch >= self.max_epochs):
            return False
        return not self.stop_reached()

    def stop_reached(self) -> bool:
        """Whether training ends here: the last step is made, or a stop was asked for and the minima are reached."""
        if self.max_steps != -1 and self.progress.global_step >= self.max_steps:
            return True
        if not self.should_stop:
            return False
        return self.progress.epoch >= self.min_epochs and self.progress.global_step >= self.min_steps

    def serve_requests(self) -> None:
        """Do what callbacks asked for, now that the state is that of a whole step."""
        while self.requests:
            self.requests.pop(0)()

    def take_up_restored(self) -> None:
        """Go on with the random numbers and metrics of the checkpoint, whatever set-up and hooks have done meanwhile."""
        if self.restored is not None:
            if self.restored.metrics is not None:
                restore_metrics(self.metrics, self.module, self.restored.metrics, self.device)
            restore_random_state(self.restored.random_state, self.device)
            set_generator_states(self.restored.generators(), self.restored.random_state.get("own", {}))
            if self.restored.then is not None:
                self.restored.then()
            self.restored = None

    # Several ranks

    def wish_stop(self, stop: bool) -> None:
        """Ask for the end of training, which several ranks must agree on; or withdraw it, which all of them do."""
        if self.agreement is None or not stop:
            self.should_stop = stop
        if self.agreement is not None:
            self.agreement.stop_wished = stop

    def stop_wished(self) -> bool:
        """Whether this rank has asked for the end, and the others do not know yet."""
        return self.agreement is not None and self.agreement.stop_wished

    def mean_loss(self, loss: Tensor | None) -> Tensor | None:
        """The loss for an optimizer that looks at it: the mean over ranks, so that all take the same step."""
        if loss is None or self.agreement is None or not self.strategy.in_step:
            return loss
        return self.strategy.reduce(loss)

    def refuse_lone_skip(self) -> None:
        """Raise where a rank would skip its batch while others wait for its gradients.

        Raises:
            StepError: if there are several ranks.
        """
        if self.agreement is not None and self.strategy.in_step:
            raise StepError(
                f"training_step returned None on rank {self.strategy.global_rank} of {self.strategy.world_size}, in "
                f"{self.progress.where()}. One rank alone cannot skip a batch, because the others wait for its gradients. Return "
                "a loss of zero that depends on the parameters, such as 0.0 * the loss."
            )

    # Optimization

    def count_step(self, moved: bool = True) -> None:
        """Note that an optimizer stepped; called by `LightningOptimizer`.

        Args:
            moved: False if the gradients had overflowed, so that the parameters stayed where they were.
        """
        self.stepped, self.moved = True, moved

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward from inside of the user's step: scaled, outside of autocast, with its hooks."""
        if self.weight != 1.0:
            loss = loss * self.weight
        for hook in self.hooks.on_before_backward:
            hook(loss)
        with self.backward_context:
            self.backward(loss if self.scaler is None else self.scaler.scale(loss), *args, **kwargs)
        for hook in self.hooks.on_after_backward:
            hook()

    def bring_to_size(self, optimizer: Optimizer) -> None:
        """Make an optimizer's gradients what it will step with: averaged over ranks, and unscaled."""
        for handle in self.handles:
            if handle.optimizer is optimizer:
                handle.unscale()

    def step_schedulers_after_step(self) -> None:
        """Step the schedulers that count steps."""
        for config in self.step_schedulers:
            if not config.reduce_on_plateau and self.progress.global_step % config.frequency == 0:
                self._step_scheduler(config)

    def step_schedulers_after_epoch(self) -> None:
        """Step the schedulers that count epochs."""
        for config in self.epoch_schedulers:
            if not config.reduce_on_plateau and (self.progress.epoch + 1) % config.frequency == 0:
                self._step_scheduler(config)

    def step_plateau_schedulers(self, configs: Sequence[SchedulerConfig], done: int) -> None:
        """Step those of ``configs`` that watch a value, whose newest is known now, after ``done`` intervals."""
        for config in configs:
            if not config.reduce_on_plateau or done % config.frequency:
                continue
            values = self.metrics.callback_values()
            # values of single steps are each rank's own, and rank 0 may have logged one that others have not
            value = self.strategy.broadcast(values.get(str(config.monitor)))
            if value is not None:
                self._step_scheduler(config, value)
            elif config.strict:
                raise missing_metric("ReduceLROnPlateau", str(config.monitor), values)

    def _step_scheduler(self, config: SchedulerConfig, value: Value | None = None) -> None:
        if self.own_scheduler_step is not None:
            self.own_scheduler_step(config.scheduler, value)
        elif value is None:
            config.scheduler.step()
        else:
            config.scheduler.step(value)


def loss_of(output: Any) -> Tensor | None:
    """The loss that a training step returned; None if the batch is to be skipped.

    Raises:
        StepError: if there is none, or none that gradients can be computed of.
    """
    if output is None:
        return None
    loss = output
    if not isinstance(loss, Tensor):
        if not hasattr(output, "get") or output.get("loss") is None:
            given = f"a dict with the keys {list(output)}" if hasattr(output, "keys") else f"a {type(output).__name__}"
            raise StepError(
                f"training_step returned {given}. Allowed: the loss as a tensor, a dict with it under 'loss', or None to skip "
                "the batch. To step optimizers yourself, set self.automatic_optimization = False in __init__."
            )
        loss = output["loss"]
    if not isinstance(loss, Tensor):
        raise StepError(f"training_step returned a loss that is a {type(loss).__name__}, not a tensor.")
    if not loss.requires_grad:
        raise StepError(
            "training_step returned a loss that has no gradient. Was it computed under torch.no_grad(), detached (.item(), "
            ".detach(), numpy), or are all parameters that it depends on frozen (requires_grad=False)?"
        )
    if loss.numel() != 1:
        raise StepError(
            f"training_step returned a loss of shape {tuple(loss.shape)}; it must be one number. Reduce it, e.g. with .mean()."
        )
    return loss


def detached(output: Any) -> Any:
    """What callbacks get of a training step: a dict with the detached loss, other tensors detached as well."""
    if isinstance(output, Tensor):
        return {"loss": output.detach()}
    if isinstance(output, dict):
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in output.items()}
    return output


def one_optimizer(optimizers: Sequence[Optimizer]) -> Optimizer:
    """The optimizer of automatic optimization.

    Raises:
        ConfigurationError: if there are several.
    """
    if len(optimizers) > 1:
        raise ConfigurationError(
            f"configure_optimizers returned {len(optimizers)} optimizers, and automatic optimization knows how to step one. Set "
            "self.automatic_optimization = False in __init__ and step them in training_step: opt_a, opt_b = "
            "self.optimizers(); opt_a.minimize(loss)."
        )
    return optimizers[0]
