"""`Trainer.explain`: the lifecycle of `fit` with the user's hooks in their places, and what was chosen and why."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from leyden.callbacks import Callback, GradientAccumulationScheduler
from leyden.datamodule import LightningDataModule
from leyden.defaults import with_modules_own
from leyden.fused import FUSED_KINDS
from leyden.hooks import EVENTS, Resolver, location, overridden, step_arity
from leyden.lifecycle import Line, lines_of, row
from leyden.memory import KEPT_BYTES, can_be_kept
from leyden.module import LightningModule
from leyden.profilers.profiler import PassThroughProfiler
from leyden.run import Mode
from leyden.settings import Settings

if TYPE_CHECKING:
    from leyden.compat.dress import Dress
    from leyden.run import Run
    from leyden.trainer import Trainer

_PACKAGE = str(Path(__file__).parent)


def explain(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None = None,
    dressed: Callable[..., Dress | None] = lambda *_: None,
) -> str:
    """The lifecycle of `fit` for this module: who overrides what, where, and what was chosen.

    Of the user's code only `configure_callbacks` is called, because it says whose hooks there are.

    Args:
        trainer: with its settings.
        module: whose hooks, and whose way of optimization.
        datamodule: whose hooks as well.
        dressed: gives a module of former days the hooks of today.

    Raises:
        HookError: for what `fit` would refuse: misspelt hooks, and hooks that cannot be called.
    """
    before = module._trainer
    module.trainer = trainer
    try:
        callbacks = with_modules_own(trainer.callbacks, module.configure_callbacks())
    finally:
        module.__dict__["_trainer"] = before
    dress = dressed(trainer, module, callbacks)
    try:
        return _explained(trainer, module, datamodule, callbacks)
    finally:
        if dress is not None:
            dress.undo()


def _explained(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None, callbacks: list[Callback]
) -> str:
    resolver = Resolver(trainer, module, callbacks, LightningModule, Callback)
    resolver.check(datamodule, LightningDataModule)
    resolver.table()
    step_arity(module, "training_step", False)
    if overridden(module, "validation_step", LightningModule):
        step_arity(module, "validation_step", False)
        resolver.evaluation("validation", False)
    case = _Case(trainer, module, datamodule, callbacks)
    words, holds = case.words(), case.conditions()
    body = _without_bare_colons(list(_branch(lines_of("fit", case.mode), words, holds, case.listeners)))
    settings = [f"    {name:<34}  {reason}".rstrip() for name, reason in case.choices()]
    return "\n".join([f"fit({type(module).__name__})", *indent("\n".join(body), "    ").splitlines(), "",
                      "Settings", *settings, *case.where_the_time_went()])  # fmt: skip


def _branch(
    lines: list[Line],
    words: Mapping[str, str],
    holds: Mapping[str, bool],
    listeners: Callable[[str, str], list[str]],
) -> Iterator[str]:
    """The lines that are there in this case."""
    left_out: int | None = None
    flattened: list[int] = []
    for line in lines:
        if left_out is not None and line.depth > left_out:
            continue
        left_out = None
        while flattened and line.depth <= flattened[-1]:
            flattened.pop()
        if line.when and not holds[line.when]:
            if line.flattens:
                flattened.append(line.depth)
            else:
                left_out = line.depth
            continue
        start = "    " * (line.depth - len(flattened))
        text = start + line.text.format_map(words)
        if line.hook is None:
            yield text
        elif who := listeners(line.hook, line.group):
            yield row(text, ", ".join(who))
        elif line.default and (default := line.default.format_map(words)):
            yield start + default


def _without_bare_colons(body: list[str]) -> list[str]:
    """A line whose inner lines were all left out opens nothing."""
    depths = [len(line) - len(line.lstrip()) for line in body] + [0]
    opens = [depths[index + 1] > depths[index] for index in range(len(body))]
    return [line if inner else line.removesuffix(":") for line, inner in zip(body, opens, strict=True)]


@dataclass
class _Case:
    """What `explain` is asked about."""

    trainer: Trainer
    module: LightningModule
    datamodule: LightningDataModule | None
    callbacks: list[Callback]

    def __post_init__(self) -> None:
        self.settings: Settings = self.trainer._settings
        run = self.trainer._run
        self.run: Run | None = run if run is not None and run.module is self.module else None
        self.mode = Mode.AUTOMATIC
        if self.run is not None:
            self.mode = self.run.mode
        elif not self.module.automatic_optimization:
            self.mode = Mode.MANUAL
        elif overridden(self.module, "optimizer_step", LightningModule):
            self.mode = Mode.CLOSURE

    def listeners(self, hook: str, group: str = "") -> list[str]:
        """Who overrides a hook, in the order in which they are called, and where."""
        event = EVENTS.get(hook)
        datas: list[Any] = [self.datamodule] if self.datamodule is not None else []
        datas = [part for part in datas if hook not in EVENTS and hook not in ("on_save_checkpoint", "on_load_checkpoint")
                 and hasattr(LightningDataModule, hook) and overridden(part, hook, LightningDataModule)]  # fmt: skip
        calls: list[Any] = []
        if hasattr(Callback, hook) and (event is None or not event.module_only):
            late = group == "late"
            calls = [callback for callback in self.callbacks if overridden(callback, hook, Callback)
                     and (not group or callback.monitors_epoch == late)]  # fmt: skip
        modules: list[Any] = [self.module] if overridden(self.module, hook, LightningModule) and group != "late" else []
        if hook in ("prepare_data", "setup", "teardown"):
            return [_place(owner, hook) for owner in (*datas, *calls, *modules)]
        return [_place(owner, hook) for owner in (datas or [*calls, *modules])]

    def loads(self, kind: str) -> bool:
        """Whether there surely is a loader: a hook for it, or one that was passed to the present or last `fit`."""
        known = self.trainer._sources is not None and self.run is not None and self.trainer._sources.has(kind)
        return known or bool(self.listeners(f"{kind}_dataloader"))

    def validates(self) -> bool:
        """Whether `fit` validates, as far as one can know."""
        return overridden(self.module, "validation_step", LightningModule) and self.settings.limit_val_batches != 0

    def moves(self) -> bool:
        """Whether batches are brought to a device."""
        hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        dtype = self.settings.precision.parameter_dtype
        return self.trainer.device.type != "cpu" or dtype is not None or any(map(self.listeners, hooks))

    def window_changes(self) -> bool:
        """Whether ``accumulate_grad_batches`` changes during the run."""
        return any(isinstance(callback, GradientAccumulationScheduler) for callback in self.callbacks)

    def conditions(self) -> dict[str, bool]:
        """The conditions of the template."""
        settings, sanity = self.settings, bool(self.settings.num_sanity_val_steps) and self.validates()
        loggers = bool(self.trainer.loggers)
        return {
            "accumulates": (self.window_changes() or settings.accumulate_grad_batches > 1)
            and self.mode is not Mode.MANUAL,
            "asks_now": self.validates() and not sanity,
            "automatic": self.mode is not Mode.MANUAL,
            "guards": settings.nan_policy is not None,
            "loggers": loggers,
            "logs": loggers and bool(settings.log_every_n_steps),
            "reloads": settings.reload_dataloaders_every_n_epochs > 0,
            "resumes": bool(self.listeners("on_load_checkpoint")),
            "sanity": sanity,
            "saves": bool(self.trainer.checkpoint_callbacks or self.listeners("on_save_checkpoint")),
            "scales": settings.precision.scales_loss,
            "validates": self.validates(),
        }

    def words(self) -> dict[str, str]:
        """The values in the template."""
        settings = self.settings
        steps = [f"{settings.max_steps} steps are done"] if settings.max_steps != -1 else []
        epochs = [f"max_epochs={settings.max_epochs}"] if settings.max_epochs != -1 else []
        others = [f"{name}={value}" for name, value in (("max_steps", settings.max_steps), ("max_time", settings.max_time))
                  if value not in (-1, None)]  # fmt: skip
        algorithm = settings.gradient_clip_algorithm or "norm"
        sanity = settings.num_sanity_val_steps
        return {
            "accumulate": "the batches of the step" if self.window_changes() else str(settings.accumulate_grad_batches),
            "clip": f"clip the gradients' {algorithm} to {settings.gradient_clip_val}"
            if settings.gradient_clip_val is not None
            else "",
            "device": str(self.trainer.device),
            "verb": '"fit"',
            "if_validation": "" if self.loads("val") else ", if val_dataloaders are passed",
            "end": ", ".join(epochs + others) or "should_stop",
            "log_every_n_steps": str(settings.log_every_n_steps),
            "move": f"move the batch to {self.trainer.device}" if self.moves() else "",
            "nan": {"skip": "skip the step", "rollback": "go back to the newest checkpoint"}.get(
                settings.nan_policy or "", "raise"
            ),
            "precision": str(settings.precision.name),
            "reload": str(settings.reload_dataloaders_every_n_epochs),
            "sanity": "all" if sanity == -1 else str(sanity),
            "scaled": " of the scaled loss" if settings.precision.scales_loss else "",
            "stop": " or ".join([*steps, "trainer.should_stop is set"]),
            "validation": "validate " + schedule_in_words(settings)
            + ("" if self.loads("val") else ", if val_dataloaders are passed"),
        }  # fmt: skip

    def choices(self) -> Iterator[tuple[str, str]]:
        """What was given, what was chosen, and why."""
        trainer, settings = self.trainer, self.settings
        yield from given(settings)
        yield f"device={str(trainer.device)!r}", trainer._device_choice.reason
        yield from settings.reasons
        yield from self.kernels()
        yield from self.compilation()
        yield "optimization", f"by {self.mode.value}"
        if self.run is None and self.mode is Mode.AUTOMATIC:
            yield "", "an optimizer that needs a closure, as LBFGS, makes training_step part of its step"
        stay = "stay as they are: the device is the CPU, and no transfer hook is overridden"
        yield "batches", f"are moved to {trainer.device}" if self.moves() else stay
        if trainer.device.type == "cpu" and can_be_kept():
            yield (
                "freed memory",
                f"up to {KEPT_BYTES // 2**20} MB stay with the process, for the next step; MALLOC_… variables decide otherwise",
            )
        if self.run is not None and hasattr(self.run, "source"):
            source = self.run.source
            count = "unknown in number" if source.total == math.inf else f"{int(source.total)} per epoch"
            trusted = "a length that can be trusted" if source.exact else "read ahead, to know which is the last"
            yield "training batches", f"{count}; {trusted}"
        if not self.validates():
            limited = overridden(self.module, "validation_step", LightningModule)
            yield "validation", "none: limit_val_batches=0" if limited else "none: there is no validation_step"
        yield "callbacks", ", ".join(type(callback).__name__ for callback in self.callbacks) or "none"
        yield "loggers", ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none: logger=False"
        yield "log_dir", self.log_dir()
        if not isinstance(trainer.profiler, PassThroughProfiler):
            yield "profiler", type(trainer.profiler).__name__

    def where_the_time_went(self) -> list[str]:
        """The account of the last `fit` of this module, if there was one."""
        if self.run is None or not self.run.account.steps:
            return []
        return ["", "Where the time went", *indent(str(self.run.account), "    ").splitlines()]

    def kernels(self) -> Iterator[tuple[str, str]]:
        """Whose kernels the optimizers step with: the rule, and as soon as there are optimizers, what came of it."""
        if self.run is not None:
            yield from (choice.line() for choice in self.run.kernels)
        elif self.settings.fused_optimizer:
            names = ", ".join(kind.__name__ for kind in FUSED_KINDS)
            yield "fused_optimizer=True", f"default: torch's fused kernels for {names}, where they were left open"

    def compilation(self) -> Iterator[tuple[str, str]]:
        """What is compiled: the rule, and in a run what came of it."""
        if self.run is not None and self.run.compiled is not None:
            yield self.run.compiled.line()
        elif self.settings.compile:
            when = "if that is faster" if self.settings.compile == "auto" else "from the second step on"
            yield f"compile={self.settings.compile!r}", f"given: the whole step as one graph if it can be one, {when}"

    def log_dir(self) -> str:
        """Where files go; a number that is still to be taken is left open, for reading it would take it."""
        logger = self.trainer.logger
        if logger is not None and logger.save_dir is not None and self.trainer.model is None:
            return f"{_short(os.path.join(logger.save_dir, logger.name or ''))}: a folder of its own for this run"
        return _short(self.trainer.log_dir) if self.trainer.log_dir is not None else "none: nothing is written"


def schedule_in_words(settings: Settings) -> str:
    """When validation is due, as in «after every 100 batches»."""
    interval, every = settings.val_check_interval, settings.check_val_every_n_epoch
    epochs = f", in every {every}. epoch" if every not in (None, 1) else ""
    if isinstance(interval, timedelta):
        return f"every {interval}"
    if isinstance(interval, int):
        return f"after every {interval} batches{epochs if every is not None else ', counted across epochs'}"
    if interval == 1.0:
        return "after the last batch of " + ("every epoch" if every == 1 else f"every {every}. epoch")
    return f"after every {interval:g} of an epoch{epochs}"


def given(settings: Settings) -> Iterator[tuple[str, str]]:
    """The arguments that are not what they would be by default, and were not chosen."""
    default = Settings()
    chosen = {name.partition("=")[0] for name, _ in settings.reasons}
    by_default = {name.partition("=")[0] for name, _ in default.reasons}
    for name in Settings.__dataclass_fields__:
        value = getattr(settings, name)
        if name in ("reasons", "plugins", "compile") or name in chosen:
            continue
        if name in by_default or value != getattr(default, name):
            yield f"{name}={getattr(value, 'name', value)!r}", "given"


def _place(owner: Any, hook: str) -> str:
    """``Net (model.py:12)``; a class of leyden itself by its name only."""
    place = location(getattr(owner, hook))
    return type(owner).__name__ + (f" ({_short(place)})" if place and not place.startswith(_PACKAGE) else "")


def _short(path: str) -> str:
    """The path from the working directory, if it lies below it."""
    here = os.path.join(os.getcwd(), "")
    return path.removeprefix(here)
