"""From a Trainer's settings and the user's module to a `Run`: every decision of a run is made here, once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden.callbacks.callback import Callback
from leyden.data.loader import Move, Source
from leyden.data.transfer import DeviceMove, move_to_device
from leyden.datamodule import LightningDataModule
from leyden.errors import ConfigurationError, HookError, NonFiniteError, warn
from leyden.former import is_former
from leyden.fused import KernelChoice, choose_kernels
from leyden.hooks import (
    FORMER_CALLBACK_HOOKS,
    FORMER_MODULE_HOOKS,
    Resolver,
    overridden,
    step_arity,
)
from leyden.metrics import Metrics
from leyden.module import LightningModule
from leyden.optimizers import LightningOptimizer, clip_gradients, needs_closure, normalize_optimizers, zero_grad_of
from leyden.policies import apply_policies
from leyden.precision import LossScaler, Precision
from leyden.profilers.wiring import hooks_of, profile_evaluation, profile_run, wraps
from leyden.progress import Progress
from leyden.run import Evaluation, Mode, Outlet, Run, Status, ValidationSchedule, one_optimizer
from leyden.settings import Settings

if TYPE_CHECKING:
    from leyden.compat.dress import Dress
    from leyden.profilers import Profiler
    from leyden.sources import Sources
    from leyden.strategy import Strategy
    from leyden.trainer import Trainer

STEP_OF = {"validation": "validation_step", "test": "test_step", "predict": "predict_step"}


def dressed(trainer: Trainer, module: LightningModule, callbacks: Sequence[Callback]) -> Dress | None:
    """Give what speaks the API of 2020 the hooks of today, by `leyden.compat`; None if nothing does."""
    of_2020 = is_former(module, LightningModule, FORMER_MODULE_HOOKS) or trainer.truncated_bptt_steps is not None
    if not of_2020 and not any(is_former(callback, Callback, FORMER_CALLBACK_HOOKS) for callback in callbacks):
        return None
    from leyden.compat.dress import Dress

    return Dress(trainer, module, callbacks, trainer.truncated_bptt_steps)


def join_formerly(module: LightningModule, strategy: Strategy) -> None:
    """Let a module of 2020 that joins the ranks, or wraps itself for them, do so in its own way."""
    if strategy.world_size > 1 and is_former(module, LightningModule, FORMER_MODULE_HOOKS):
        from leyden.compat.dress import join_ranks

        join_ranks(module, strategy)


def make_resolver(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    callbacks: Sequence[Callback],
    dress: Dress | None = None,
) -> Resolver:
    """The look-up of who overrides what; refuses hooks that are misspelt or cannot be called."""
    resolver = Resolver(trainer, module, callbacks, LightningModule, Callback, hooks_of(trainer.profiler))
    resolver.check(datamodule, LightningDataModule)
    if dress is not None:
        dress.greet()
        resolver.takes_turns, resolver.is_dressed = dress.takes_turns, True
    return resolver


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
        return DeviceMove(device, dtype)

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


@dataclass(frozen=True)
class Parts:
    """What the decisions of one verb are made from.

    Attributes:
        module: the user's.
        resolver: who overrides what.
        settings: the Trainer's.
        status: where the stage is shown.
        outlet: counters, metrics, and where values leave for the loggers.
        device: where steps run.
        move: brings batches there; None if there is nothing to do.
        profiler: what measures; the null profiler wraps nothing.
        strategy: how ranks share the work.
    """

    module: LightningModule
    resolver: Resolver
    settings: Settings
    status: Status
    outlet: Outlet
    device: torch.device
    move: Move | None
    profiler: Profiler
    strategy: Strategy

    def own(self, name: str) -> Any:
        """The module's override of a hook, bound; None if it has none."""
        return getattr(self.module, name) if overridden(self.module, name, LightningModule) else None


def make_run(parts: Parts, reload_loaders: Callable[[Run], None]) -> Run:
    """Build the optimizers and resolve every hook of `fit`. The loaders come later: `attach_sources`."""
    module, settings, outlet = parts.module, parts.settings, parts.outlet
    precision: Precision = settings.precision
    found = normalize_optimizers(module.configure_optimizers())
    by_hand = not module.automatic_optimization
    mode, optimizer = _choose_mode(parts, found.optimizers)
    scaler = precision.grad_scaler(parts.device.type)
    hooks = parts.resolver.table()
    if settings.detect_anomaly:
        hooks.on_before_backward = (partial(_refuse_non_finite, outlet.progress), *hooks.on_before_backward)
    run = Run(
        module=module,
        status=parts.status,
        progress=outlet.progress,
        metrics=outlet.metrics,
        hooks=hooks,
        step_context=precision.step_context(parts.device.type),
        backward_context=precision.backward_context(parts.device.type),
        scaler=LossScaler(scaler) if scaler is not None else None,
        device=parts.device,
        mode=mode,
        training_step=parts.strategy.wrap_training_step(module, module.training_step),
        arity=step_arity(module, "training_step", False),
        optimizer=optimizer,
        handles=[],
        schedulers=found.schedulers,
        reevaluates=optimizer is not None and needs_closure(optimizer),
        backward=_backward_of(module, settings, outlet.progress, scaler is not None),
        zero_grad=zero_grad_of(optimizer) if optimizer is not None else _nothing,
        clip=None if by_hand else _make_clip(module, settings),
        own_optimizer_step=parts.own("optimizer_step") if mode is Mode.CLOSURE else None,
        own_scheduler_step=parts.own("lr_scheduler_step"),
        wants_outputs=bool(hooks.on_train_batch_end),
        max_epochs=-1 if settings.max_epochs is None else settings.max_epochs,
        min_epochs=settings.min_epochs or 0,
        max_steps=settings.max_steps,
        min_steps=settings.min_steps or 0,
        accumulate=settings.accumulate_grad_batches,
        log_every_n_steps=settings.log_every_n_steps or 0,
        outlet=outlet,
        reload_loaders=reload_loaders,
        move=parts.move,
        strategy=parts.strategy,
        steps_schedulers=not by_hand,
    )
    optimizers = _join_ranks(run, parts, found.optimizers)
    own_zero_grad = parts.own("optimizer_zero_grad")
    if optimizer is not None and own_zero_grad is not None:
        run.zero_grad = lambda: own_zero_grad(run.progress.epoch, run.progress.batch, optimizer)
    apply_policies(run, settings, parts.resolver.trainer, parts.resolver.callbacks)
    run.handles = _make_handles(run, optimizers)
    run.kernels = _choose_kernels(parts, run, optimizers)
    _compile(run, parts)
    profile_run(run, parts.profiler)
    run.account.compiles = settings.compile is not False
    return run


def _compile(run: Run, parts: Parts) -> None:
    settings = parts.settings
    if settings.compile and parts.resolver.is_dressed:
        warn(
            "compile-former",
            f"compile={settings.compile!r}: the run stays in eager, because its hooks are of former days.",
        )
    elif settings.compile:
        from leyden.compiled import make_compilation  # torch's compiler takes a second to import

        owns = partial(overridden, parts.module, base=LightningModule)
        run.compiled = make_compilation(run, settings, owns, wraps(parts.profiler))


def _join_ranks(run: Run, parts: Parts, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
    """Let the ranks, if there are several, act together; return the optimizers that the run is to have."""
    if parts.strategy.world_size > 1:
        _let_ranks_agree(run, parts)
    return parts.strategy.wire(run, parts.settings, optimizers)


def _let_ranks_agree(run: Run, parts: Parts) -> None:
    run.agreement = parts.resolver.trainer.make_agreement()
    run.sync_gradients = parts.strategy.gradient_sync()
    run.agrees_on_skipping = parts.strategy.in_step and any(
        not getattr(hook, "__module__", "").startswith("leyden.") for hook in run.hooks.on_train_batch_start
    )


def _choose_mode(parts: Parts, optimizers: Sequence[Optimizer]) -> tuple[Mode, Optimizer | None]:
    """Who steps the optimizer, and which one it is if that is the loop."""
    if not optimizers:
        warn("no-optimizer", "configure_optimizers returned None: training_step runs, but nothing is optimized.")
    if parts.resolver.takes_turns(optimizers):  # a step of 2020, which is called for each of several optimizers
        return Mode.MANUAL, None
    if not parts.module.automatic_optimization:
        _refuse_engine_settings(parts.settings)
        return Mode.MANUAL, None
    if not optimizers:
        return Mode.MANUAL, None
    optimizer = one_optimizer(optimizers)
    if needs_closure(optimizer) and parts.settings.precision.scales_loss:
        raise ConfigurationError(
            f"precision={parts.settings.precision.name!r} scales the loss, which {type(optimizer).__name__} cannot be used with, "
            "because it evaluates the loss several times per step. Use 'bf16-mixed' or '32-true'."
        )
    steps_itself = parts.own("optimizer_step") is not None or needs_closure(optimizer)
    return (Mode.CLOSURE if steps_itself else Mode.AUTOMATIC), optimizer


def _make_handles(run: Run, optimizers: Sequence[Optimizer]) -> list[LightningOptimizer]:
    first = [run.guard.look] if run.guard is not None else []
    before_step = (*first, *run.hooks.on_before_optimizer_step, *([run.clip] if run.clip is not None else []))
    return [
        LightningOptimizer(
            optimizer=each,
            others=[other for other in optimizers if other is not each],
            scaler=run.scaler,
            before_step=before_step,
            after_step=run.count_step,
            backward=run.manual_backward,
            reduce=run.strategy.reduce_gradients if run.agreement is not None and run.mode is Mode.MANUAL else None,
        )
        for each in optimizers
    ]


def _choose_kernels(parts: Parts, run: Run, optimizers: Sequence[Optimizer]) -> list[KernelChoice]:
    hooks = run.hooks.on_after_backward or run.hooks.on_before_optimizer_step
    own = parts.own("backward") or parts.own("configure_gradient_clipping")
    return choose_kernels(
        optimizers,
        parts.module,
        wanted=parts.settings.fused_optimizer,
        scales_loss=run.scaler is not None,
        hand_made=run.mode is not Mode.AUTOMATIC or bool(hooks) or own is not None,
    )


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
            f"The loss is {loss.item()} in {progress.where()}. Look for a division by zero, a log or root of something ≤ 0, "
            "an overflow in fp16, or a learning rate that is too high."
        )


def _backward_of(
    module: LightningModule, settings: Settings, progress: Progress, scales_loss: bool
) -> Callable[..., Any]:
    """What computes gradients: torch's or the user's; with ``detect_anomaly`` one that looks at what came out."""
    backward: Callable[..., Any] = (
        module.backward if overridden(module, "backward", LightningModule) else Tensor.backward
    )
    if not settings.detect_anomaly:
        return backward

    def checked(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        try:
            backward(loss, *args, **kwargs)
        except RuntimeError as error:
            if "returned nan values" not in str(error):  # torch's anomaly detection has no exception of its own
                raise
            raise NonFiniteError(f"{error} That was in the backward pass of {progress.where()}.") from error
        if scales_loss:
            return  # an overflow is what the loss scaler looks for, and mends
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise NonFiniteError(
                    f"The gradient of {name} is not finite after the backward pass of {progress.where()}."
                )

    return checked


def make_evaluation(
    stage: str,
    parts: Parts,
    sources: Sequence[Source],
    *,
    keep_predictions: bool = False,
    record_indices: bool = False,
) -> Evaluation:
    """Resolve everything of one evaluation.

    Args:
        stage: "validation", "test" or "predict".
        parts: see `Parts`.
        sources: the loaders.
        keep_predictions: whether what steps return is kept.
        record_indices: whether sample indices are kept for prediction writers.
    """
    module = parts.module
    several = len(sources) > 1
    name = STEP_OF[stage]
    if stage != "predict" and not overridden(module, name, LightningModule):
        raise HookError(f"{type(module).__name__} has no {name}, so there is nothing to run. Define it.")
    if stage == "predict" and not (parts.own(name) or overridden(module, "forward", torch.nn.Module)):
        raise HookError(
            f"{type(module).__name__} has neither predict_step nor forward, so there is nothing to run. Define one."
        )
    arity = step_arity(module, name, several) if overridden(module, name, LightningModule) else 1
    evaluation = Evaluation(
        module=module,
        stage=stage,
        step=parts.strategy.wrap_evaluation_step(module, getattr(module, name)),
        arity=arity,
        hooks=parts.resolver.evaluation(stage, several),
        sources=sources,
        move=parts.move,
        metrics=parts.outlet.metrics,
        outlet=parts.outlet,
        status=parts.status,
        step_context=parts.settings.precision.step_context(parts.device.type),
        no_grad=partial(parts.strategy.evaluation_context, parts.settings.inference_mode),
        own_eval=overridden(module, f"on_{stage}_model_eval", LightningModule),
        own_train=overridden(module, f"on_{stage}_model_train", LightningModule),
        predictions=[[] for _ in sources] if keep_predictions else None,
        records_indices=record_indices,
        epoch_batch_indices=[[] for _ in sources],
    )
    parts.strategy.wire_evaluation(evaluation)
    if parts.strategy.communicates_in_forward:
        from leyden.keep_up import batches_in_step  # for few runs

        evaluation.in_step = partial(batches_in_step, parts.strategy)
    profile_evaluation(evaluation, parts.profiler)
    return evaluation


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
    run.validation = make(validation) if validation and any(source.most for source in validation) else None
    before = run.schedule
    run.schedule = make_schedule(settings, run.source.total, before) if run.validation is not None else None
    if run.agreement is not None and run.schedule is not None and run.schedule is not before and run.schedule.every:
        run.schedule.ask = run.agreement.add(run.schedule.owe)
    if run.restored is not None:
        run.source.take_rest(run.restored.data.get("train") or {})
        for source, rest in zip(validation, run.restored.data.get("validation", ()), strict=False):
            source.take_rest(rest)


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


def new_outlet(
    loggers: Sequence[Any], progress: Progress | None, strategy: Strategy, module: LightningModule | None = None
) -> Outlet:
    """Fresh metrics, reduced over the ranks that data is divided over, and counters unless there are some."""
    gather = strategy.gather_data_ranks if strategy.data_world_size > 1 else None
    return Outlet(loggers, Metrics(gather, module), progress or Progress())
