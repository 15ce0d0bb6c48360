"""From a Trainer's settings and the user's module to a `Run`: every decision of a run is made here, once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leyden.callbacks.callback import Callback
from leyden.data.loader import Move, Source, recording
from leyden.data.transfer import move_to_device
from leyden.datamodule import LightningDataModule
from leyden.errors import ConfigurationError, HookError, NonFiniteError, warn
from leyden.hooks import Resolver, overridden, step_arity
from leyden.metrics import Metrics
from leyden.module import LightningModule
from leyden.optimizers import LightningOptimizer, clip_gradients, needs_closure, normalize_optimizers
from leyden.precision import LossScaler, Precision
from leyden.progress import Progress
from leyden.run import Evaluation, Mode, Outlet, Run, Status, ValidationSchedule, one_optimizer
from leyden.settings import Settings

if TYPE_CHECKING:
    from leyden.sources import Sources
    from leyden.trainer import Trainer

STEP_OF = {"validation": "validation_step", "test": "test_step", "predict": "predict_step"}


def check_fit(module: LightningModule) -> None:
    """Refuse a module that cannot be trained, before anything is set up."""
    for name, what in (
        ("training_step", "what one step computes"),
        ("configure_optimizers", "which optimizer it uses"),
    ):
        if not overridden(module, name, LightningModule):
            raise HookError(
                f"{type(module).__name__} has no {name}, so the Trainer does not know {what}. Define it"
                + (", or return None from it to train without an optimizer." if name == "configure_optimizers" else ".")
            )


def make_resolver(trainer: Trainer, module: LightningModule, callbacks: Sequence[Callback]) -> Resolver:
    """The look-up of who overrides what."""
    return Resolver(trainer, module, callbacks, LightningModule, Callback)


def make_move(
    module: LightningModule, datamodule: LightningDataModule | None, device: torch.device, precision: Precision
) -> Move | None:
    """What brings a batch to the device: None on the CPU if nobody hooks in, for there is nothing to do."""

    def owner(name: str) -> Any:
        if datamodule is not None and overridden(datamodule, name, LightningDataModule):
            return datamodule
        return module if overridden(module, name, LightningModule) else None

    before, transfer, after = map(
        owner, ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    )
    dtype = precision.parameter_dtype
    if before is transfer is after is None:
        if device.type == "cpu" and dtype is None:
            return None
        return lambda batch, index: move_to_device(batch, device, dtype)

    def move(batch: Any, index: int) -> Any:
        if before is not None:
            batch = before.on_before_batch_transfer(batch, index)
        if transfer is not None:
            batch = transfer.transfer_batch_to_device(batch, device, index)
            batch = move_to_device(batch, device, dtype) if dtype is not None else batch
        else:
            batch = move_to_device(batch, device, dtype)
        return after.on_after_batch_transfer(batch, index) if after is not None else batch

    return move


def make_run(
    trainer: Trainer,
    module: LightningModule,
    resolver: Resolver,
    settings: Settings,
    status: Status,
    outlet: Outlet,
    device: torch.device,
    move: Move | None,
    reload_loaders: Callable[[Run], None],
) -> Run:
    """Build the optimizers and resolve every hook of `fit`. The loaders come later: `attach_sources`."""
    found = normalize_optimizers(module.configure_optimizers())
    precision: Precision = settings.precision
    scaler = precision.grad_scaler(device.type)
    loss_scaler = LossScaler(scaler) if scaler is not None else None
    own_step = module.optimizer_step if overridden(module, "optimizer_step", LightningModule) else None
    mode, optimizer, reevaluates = Mode.MANUAL, None, False
    if module.automatic_optimization and found.optimizers:
        optimizer = one_optimizer(found.optimizers)
        reevaluates = needs_closure(optimizer)
        mode = Mode.CLOSURE if own_step is not None or reevaluates else Mode.AUTOMATIC
    elif not found.optimizers:
        warn("no-optimizer", "configure_optimizers returned None: training_step runs, but nothing is optimized.")
    if not module.automatic_optimization:
        _refuse_engine_settings(settings)
    if reevaluates and loss_scaler is not None:
        raise ConfigurationError(
            f"precision={precision.name!r} scales the loss, which {type(optimizer).__name__} cannot be used with, because it "
            "evaluates the loss several times per step. Use 'bf16-mixed' or '32-true'."
        )
    hooks = resolver.table()
    if settings.detect_anomaly:
        hooks.on_before_backward = (partial(_refuse_non_finite, outlet.progress), *hooks.on_before_backward)
    clip = _make_clip(module, settings) if mode is not Mode.MANUAL else None
    run = Run(
        module=module,
        status=status,
        progress=outlet.progress,
        metrics=outlet.metrics,
        hooks=hooks,
        step_context=precision.step_context(device.type),
        backward_context=precision.backward_context(device.type),
        scaler=loss_scaler,
        device=device,
        mode=mode,
        training_step=module.training_step,
        arity=step_arity(module, "training_step", False),
        optimizer=optimizer,
        handles=[],
        schedulers=found.schedulers,
        reevaluates=reevaluates,
        backward=module.backward if overridden(module, "backward", LightningModule) else Tensor.backward,
        zero_grad=optimizer.zero_grad if optimizer is not None else _nothing,
        clip=clip,
        own_optimizer_step=own_step if mode is Mode.CLOSURE else None,
        own_scheduler_step=(
            module.lr_scheduler_step if overridden(module, "lr_scheduler_step", LightningModule) else None
        ),
        wants_outputs=bool(hooks.on_train_batch_end),
        max_epochs=-1 if settings.max_epochs is None else settings.max_epochs,
        min_epochs=settings.min_epochs or 0,
        max_steps=settings.max_steps,
        min_steps=settings.min_steps or 0,
        accumulate=settings.accumulate_grad_batches,
        log_every_n_steps=settings.log_every_n_steps or 0,
        outlet=outlet,
        reload_loaders=reload_loaders,
        move=move,
    )
    if optimizer is not None and overridden(module, "optimizer_zero_grad", LightningModule):
        run.zero_grad = lambda: module.optimizer_zero_grad(run.progress.epoch, run.progress.batch, optimizer)
    before_step = (*hooks.on_before_optimizer_step, *([clip] if clip is not None else []))
    run.handles = [
        LightningOptimizer(
            optimizer=each,
            others=[other for other in found.optimizers if other is not each],
            scaler=loss_scaler,
            before_step=before_step,
            after_step=run.count_step,
            backward=run.manual_backward,
        )
        for each in found.optimizers
    ]
    return run


def _refuse_engine_settings(settings: Settings) -> None:
    for name, unset in (("gradient_clip_val", None), ("accumulate_grad_batches", 1)):
        if getattr(settings, name) != unset:
            raise ConfigurationError(
                f"{name}={getattr(settings, name)!r} needs automatic optimization, but the module sets "
                "automatic_optimization = False. Do it in training_step: optimizer.minimize(loss, "
                f"{name}={getattr(settings, name)!r})."
            )


def _make_clip(module: LightningModule, settings: Settings) -> Callable[[Any], Any] | None:
    value, algorithm = settings.gradient_clip_val, settings.gradient_clip_algorithm
    if overridden(module, "configure_gradient_clipping", LightningModule):
        return lambda optimizer: module.configure_gradient_clipping(optimizer, value, algorithm)
    if value is None:
        return None
    return partial(clip_gradients, clip_val=value, algorithm=algorithm or "norm")


def _nothing() -> None:
    """There is no optimizer whose gradients the loop could set to none."""


def _refuse_non_finite(progress: Progress, loss: Tensor) -> None:
    if not torch.isfinite(loss).all():
        raise NonFiniteError(
            f"The loss is {loss.item()} in epoch {progress.epoch}, batch_idx {progress.batch}, after "
            f"{progress.global_step} steps. Look for a division by zero, a log or root of something ≤ 0, an overflow "
            "in fp16, or a learning rate that is too high."
        )


def make_evaluation(
    stage: str,
    module: LightningModule,
    resolver: Resolver,
    settings: Settings,
    status: Status,
    outlet: Outlet,
    device: torch.device,
    move: Move | None,
    sources: Sequence[Source],
    *,
    keep_predictions: bool = False,
    record_indices: bool = False,
) -> Evaluation:
    """Resolve everything of one evaluation.

    Args:
        stage: "validation", "test" or "predict".
        module: the user's.
        resolver: who overrides what.
        settings: the Trainer's.
        status: where the stage is shown.
        outlet: where values leave for the loggers.
        device: where steps run.
        move: brings batches there.
        sources: the loaders.
        keep_predictions: whether what steps return is kept.
        record_indices: whether sample indices are kept for prediction writers.
    """
    several = len(sources) > 1
    name = STEP_OF[stage]
    if stage != "predict" and not overridden(module, name, LightningModule):
        raise HookError(f"{type(module).__name__} has no {name}, so there is nothing to run. Define it.")
    recorders = []
    if record_indices:
        for source in sources:
            source.loader, recorder = recording(source.loader)
            recorders.append(recorder)
    arity = step_arity(module, name, several) if overridden(module, name, LightningModule) else 1
    no_grad: Callable[[], AbstractContextManager[Any]] = (
        torch.inference_mode if settings.inference_mode else torch.no_grad
    )
    return Evaluation(
        module=module,
        stage=stage,
        step=getattr(module, name),
        arity=arity,
        hooks=resolver.evaluation(stage, several),
        sources=sources,
        move=move,
        metrics=outlet.metrics,
        outlet=outlet,
        status=status,
        step_context=settings.precision.step_context(device.type),
        no_grad=no_grad,
        own_eval=overridden(module, f"on_{stage}_model_eval", LightningModule),
        own_train=overridden(module, f"on_{stage}_model_train", LightningModule),
        predictions=[[] for _ in sources] if keep_predictions else None,
        recorders=recorders,
        epoch_batch_indices=[[] for _ in sources],
    )


def attach_sources(
    run: Run, sources: Sources, settings: Settings, make: Callable[[Sequence[Source]], Evaluation]
) -> None:
    """Give the run its training loader, its validation and the schedule of it.

    Args:
        run: from `make_run`.
        sources: the user's loaders.
        settings: the Trainer's.
        make: builds the validation for its loaders.

    Raises:
        ConfigurationError: if the validation would never be due.
    """
    run.source = sources.train()
    validation = sources.validation()
    run.validation = make(validation) if validation and any(source.total for source in validation) else None
    run.schedule = make_schedule(settings, run.source.total, run.schedule) if run.validation is not None else None


def make_schedule(settings: Settings, batches: float, before: ValidationSchedule | None) -> ValidationSchedule:
    """When to validate, from ``val_check_interval`` and ``check_val_every_n_epoch``."""
    interval, every = settings.val_check_interval, settings.check_val_every_n_epoch
    if not isinstance(interval, (int, float)):
        return before or ValidationSchedule(math.inf, every, every=interval)
    if isinstance(interval, float):
        if interval == 1.0:
            return ValidationSchedule(math.inf, every)
        if batches == math.inf:
            raise ConfigurationError(
                f"val_check_interval={interval} is a fraction of an epoch, but the training loader has no length. "
                "Give a number of batches."
            )
        return ValidationSchedule(max(1, int(batches * interval)), every)
    if every is not None and interval > batches:
        raise ConfigurationError(
            f"val_check_interval={interval} is more than the {int(batches)} training batches of an epoch, so validation would "
            "never run. Lower it, or set check_val_every_n_epoch=None to count batches across epochs."
        )
    return ValidationSchedule(interval, every)


def new_outlet(loggers: Sequence[Any], progress: Progress | None = None) -> Outlet:
    """Fresh metrics, and counters unless there are some."""
    return Outlet(loggers, Metrics(), progress or Progress())
