"""The event table (names, order, arguments) and the one look-up of who overrides what.

`resolve` runs once per verb. What nobody overrides is not in the table that the loop walks, so it costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import CodeType
from typing import Any

from leyden.errors import HookError, did_you_mean

Hook = Callable[..., Any]

BATCH = ("batch", "batch_idx")
OUTPUTS = ("outputs", "batch", "batch_idx")


@dataclass(frozen=True)
class Event:
    """One place in the lifecycle.

    Attributes:
        arguments: what the module's hook is called with; a callback's gets ``trainer, pl_module`` before them.
        module_only: whether callbacks are not asked.
        per_dataloader: whether ``dataloader_idx`` follows when there are several loaders.
    """

    arguments: tuple[str, ...] = ()
    module_only: bool = False
    per_dataloader: bool = False


def _evaluation_events(stage: str) -> dict[str, Event]:
    return {
        f"on_{stage}_model_eval": Event(module_only=True),
        f"on_{stage}_start": Event(),
        f"on_{stage}_epoch_start": Event(),
        f"on_{stage}_batch_start": Event(BATCH, per_dataloader=True),
        f"on_{stage}_batch_end": Event(OUTPUTS, per_dataloader=True),
        f"on_{stage}_epoch_end": Event(),
        f"on_{stage}_end": Event(),
        f"on_{stage}_model_train": Event(module_only=True),
    }


EVENTS: dict[str, Event] = {
    "on_fit_start": Event(),
    "on_sanity_check_start": Event(),
    "on_sanity_check_end": Event(),
    "on_train_start": Event(),
    "on_train_epoch_start": Event(),
    "on_train_batch_start": Event(BATCH),
    "on_before_zero_grad": Event(("optimizer",)),
    "on_before_backward": Event(("loss",)),
    "on_after_backward": Event(),
    "on_before_optimizer_step": Event(("optimizer",)),
    "on_train_batch_end": Event(OUTPUTS),
    "on_validation_model_zero_grad": Event(module_only=True),
    **_evaluation_events("validation"),
    "on_train_epoch_end": Event(),
    "on_train_end": Event(),
    "on_fit_end": Event(),
    **_evaluation_events("test"),
    **_evaluation_events("predict"),
}
"""Every event that the loop fires, in the order of the lifecycle."""

_SINGLE_HOOKS: dict[str, tuple[str, ...]] = {
    "backward": ("loss",),
    "optimizer_step": ("epoch", "batch_idx", "optimizer", "optimizer_closure"),
    "optimizer_zero_grad": ("epoch", "batch_idx", "optimizer"),
    "lr_scheduler_step": ("scheduler", "metric"),
    "configure_gradient_clipping": ("optimizer", "gradient_clip_val", "gradient_clip_algorithm"),
    "configure_optimizers": (),
    "configure_callbacks": (),
    "configure_model": (),
    "setup": ("stage",),
    "teardown": ("stage",),
    "prepare_data": (),
    "train_dataloader": (),
    "val_dataloader": (),
    "test_dataloader": (),
    "predict_dataloader": (),
    "on_save_checkpoint": ("checkpoint",),
    "on_load_checkpoint": ("checkpoint",),
    "transfer_batch_to_device": ("batch", "device", "dataloader_idx"),
    "on_before_batch_transfer": ("batch", "dataloader_idx"),
    "on_after_batch_transfer": ("batch", "dataloader_idx"),
}
_DATA_HOOKS: dict[str, tuple[str, ...]] = {
    **{name: _SINGLE_HOOKS[name] for name in (
        "setup", "teardown", "prepare_data",
        "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader",
        "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
    )},
    "on_exception": ("exception",),
}  # fmt: skip
_CALLBACK_HOOKS: dict[str, tuple[str, ...]] = {
    "setup": ("stage",),
    "teardown": ("stage",),
    "on_exception": ("exception",),
    "on_save_checkpoint": ("checkpoint",),
    "on_load_checkpoint": ("checkpoint",),
}

_MEANT: dict[str, str] = {
    "configure_optimizer": "configure_optimizers",
    "configure_optimisers": "configure_optimizers",
    "train_step": "training_step",
    "val_step": "validation_step",
    "valid_step": "validation_step",
    "pred_step": "predict_step",
    "prediction_step": "predict_step",
    "train_loader": "train_dataloader",
    "val_loader": "val_dataloader",
    "valid_dataloader": "val_dataloader",
    "validation_dataloader": "val_dataloader",
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end",
    "test_epoch_end": "on_test_epoch_end",
    "on_training_epoch_end": "on_train_epoch_end",
    "on_val_start": "on_validation_start",
    "on_val_end": "on_validation_end",
    "on_val_epoch_start": "on_validation_epoch_start",
    "on_val_epoch_end": "on_validation_epoch_end",
    "on_val_batch_start": "on_validation_batch_start",
    "on_val_batch_end": "on_validation_batch_end",
    "val_epoch_end": "on_validation_epoch_end",
    "valid_epoch_end": "on_validation_epoch_end",
    "validation_epochs_end": "on_validation_epoch_end",
    "val_end": "on_validation_epoch_end",
    "valid_end": "on_validation_epoch_end",
    "validation_steps": "validation_step",
    "training_steps": "training_step",
    "on_epochs_start": "on_train_epoch_start",
    "on_epochs_end": "on_train_epoch_end",
    "training_step_end": "on_train_batch_end",
    "validation_step_end": "on_validation_batch_end",
    "validation_end": "on_validation_epoch_end",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
}
"""Names that are often written, or were right once, and the hook that is meant."""


FORMER_MODULE_HOOKS = frozenset({
    "training_end", "training_step_end", "training_epoch_end", "validation_end", "validation_step_end", "validation_epoch_end",
    "test_end", "test_step_end", "test_epoch_end", "on_epoch_start", "on_epoch_end", "on_batch_start", "on_batch_end",
    "on_pre_performance_check", "on_post_performance_check", "on_pretrain_routine_start", "on_pretrain_routine_end",
    "tng_dataloader", "tbptt_split_batch", "configure_apex", "configure_ddp", "init_ddp_connection",
    "get_progress_bar_dict", "get_tqdm_dict",
})  # fmt: skip
"""Hooks of a module that were right once; `leyden.compat` calls them at their places."""
FORMER_CALLBACK_HOOKS = frozenset({
    "on_init_start", "on_init_end", "on_epoch_start", "on_epoch_end", "on_batch_start", "on_batch_end", "on_keyboard_interrupt",
    "on_pretrain_routine_start", "on_pretrain_routine_end",
})  # fmt: skip
"""Likewise for callbacks."""


class Worn(partial[Any]):
    """A hook of today, among an object's own attributes, that calls one of former days: ``former``."""

    former: Hook | None = None


@dataclass
class HookTable:
    """For each event the bound hooks to call, in order; an empty tuple where nobody listens."""

    on_fit_start: tuple[Hook, ...] = ()
    on_sanity_check_start: tuple[Hook, ...] = ()
    on_sanity_check_end: tuple[Hook, ...] = ()
    on_train_start: tuple[Hook, ...] = ()
    on_train_epoch_start: tuple[Hook, ...] = ()
    on_train_batch_start: tuple[Hook, ...] = ()
    on_before_zero_grad: tuple[Hook, ...] = ()
    on_before_backward: tuple[Hook, ...] = ()
    on_after_backward: tuple[Hook, ...] = ()
    on_before_optimizer_step: tuple[Hook, ...] = ()
    on_train_batch_end: tuple[Hook, ...] = ()
    on_train_epoch_end: tuple[Hook, ...] = ()
    on_train_epoch_end_monitors: tuple[Hook, ...] = ()
    on_train_end: tuple[Hook, ...] = ()
    on_fit_end: tuple[Hook, ...] = ()
    on_validation_model_zero_grad: tuple[Hook, ...] = ()


@dataclass
class EvaluationHooks:
    """The hooks of one kind of evaluation: validation, test or predict."""

    model_eval: tuple[Hook, ...] = ()
    start: tuple[Hook, ...] = ()
    epoch_start: tuple[Hook, ...] = ()
    batch_start: tuple[Hook, ...] = ()
    batch_end: tuple[Hook, ...] = ()
    epoch_end: tuple[Hook, ...] = ()
    end: tuple[Hook, ...] = ()
    model_train: tuple[Hook, ...] = ()


class Resolver:
    """Finds who overrides what, on the class and on the instance, and binds it.

    Args:
        trainer: passed to callbacks as their first argument.
        module: the user's LightningModule.
        callbacks: in the order in which they are called.
        module_base: the class whose hooks count as not overridden.
        callback_base: likewise for callbacks.
        around: what each hook is wrapped in, given its owner and name, when a profiler watches.

    Attributes:
        takes_turns: whether the module's step is one that is called for each of several optimizers, as in 2020.
        is_dressed: whether hooks of former days are called by such of today.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        callbacks: Sequence[Any],
        module_base: type,
        callback_base: type,
        around: Callable[[Any, str, Hook], Hook] | None = None,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.callbacks = callbacks
        self.module_base = module_base
        self.callback_base = callback_base
        self.around = around or (lambda owner, name, hook: hook)
        self.takes_turns: Callable[[Sequence[Any]], bool] = lambda optimizers: False
        self.is_dressed = False

    def table(self) -> HookTable:
        """Resolve the events of training."""
        table = HookTable()
        for place in fields(table):
            if place.name in EVENTS:
                setattr(table, place.name, self.event(place.name))
        early = tuple(callback for callback in self.callbacks if not callback.monitors_epoch)
        late = tuple(callback for callback in self.callbacks if callback.monitors_epoch)
        table.on_train_epoch_end = self.event("on_train_epoch_end", callbacks=early)
        table.on_train_epoch_end_monitors = self.event("on_train_epoch_end", callbacks=late, ask_module=False)
        return table

    def evaluation(self, stage: str, several_dataloaders: bool) -> EvaluationHooks:
        """Resolve the events of ``stage``: validation, test or predict."""
        return EvaluationHooks(
            **{
                place.name: self.event(f"on_{stage}_{place.name}", several_dataloaders)
                for place in fields(EvaluationHooks)
            }
        )

    def event(
        self,
        name: str,
        several_dataloaders: bool = False,
        callbacks: Sequence[Any] | None = None,
        ask_module: bool = True,
    ) -> tuple[Hook, ...]:
        """Return the hooks of one event in the order in which they are called: callbacks, then the module."""
        event = EVENTS[name]
        arguments = event.arguments
        if event.per_dataloader and several_dataloaders:
            arguments = (*arguments, "dataloader_idx")
        found: list[Hook] = []
        if not event.module_only:
            for callback in self.callbacks if callbacks is None else callbacks:
                if overridden(callback, name, self.callback_base):
                    hook = getattr(callback, name)
                    check_signature(callback, name, ("trainer", "pl_module", *arguments))
                    found.append(self.around(callback, name, partial(hook, self.trainer, self.module)))
        if ask_module and (event.module_only or overridden(self.module, name, self.module_base)):
            check_signature(self.module, name, arguments)
            found.append(self.around(self.module, name, getattr(self.module, name)))
        return tuple(found)

    def check(self, datamodule: Any = None, datamodule_base: type | None = None) -> None:
        """Refuse misspelt hook names and signatures that cannot be called, before the first batch.

        Raises:
            HookError: naming the object, the file and line, and what the hook is called with.
        """
        check_names(self.module, self.module_base, FORMER_MODULE_HOOKS)
        for name, arguments in _SINGLE_HOOKS.items():
            if overridden(self.module, name, self.module_base):
                check_signature(self.module, name, arguments)
        for callback in self.callbacks:
            check_names(callback, self.callback_base, FORMER_CALLBACK_HOOKS)
            for name, arguments in _CALLBACK_HOOKS.items():
                if overridden(callback, name, self.callback_base):
                    check_signature(callback, name, ("trainer", "pl_module", *arguments))
        if datamodule is not None and datamodule_base is not None:
            check_names(datamodule, datamodule_base)
            for name, arguments in _DATA_HOOKS.items():
                if overridden(datamodule, name, datamodule_base):
                    check_signature(datamodule, name, arguments)


def overridden(owner: Any, name: str, base: type) -> bool:
    """Whether ``owner`` has its own ``name``: by its class, or patched onto the instance."""
    if name in getattr(owner, "__dict__", {}):
        return True
    own = getattr(type(owner), name, None)
    return own is not None and own is not getattr(base, name, None)


def location(hook: Hook) -> str:
    """``file:line`` of a hook's code, or an empty string for what has none, as builtins."""
    if isinstance(hook, Worn):
        hook = hook.former or hook
    code = getattr(inspect.unwrap(getattr(hook, "__func__", hook)), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


def check_signature(owner: Any, name: str, arguments: Sequence[str]) -> None:
    """Refuse a hook that cannot be called with ``arguments``.

    Raises:
        HookError: naming both signatures.
    """
    hook = getattr(owner, name)
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):
        return  # a builtin tells nothing about its parameters
    try:
        signature.bind(*arguments)
    except TypeError as error:
        place = location(hook)
        raise HookError(
            f"{type(owner).__name__}.{name}{signature}{f' ({place})' if place else ''} cannot be called as "
            f"{name}({', '.join(arguments)}): {error}. Write it as def {name}(self{''.join(f', {a}' for a in arguments)})."
        ) from None


def step_arity(owner: Any, name: str, several_dataloaders: bool) -> int:
    """How many of ``(batch, batch_idx, dataloader_idx)`` the user's step takes.

    Raises:
        HookError: if it takes none, needs others, or lacks ``dataloader_idx`` where there are several loaders.
    """
    available = ("batch", "batch_idx", "dataloader_idx") if name != "training_step" else BATCH
    hook = getattr(owner, name)
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):
        return 2
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [parameter for parameter in signature.parameters.values() if parameter.kind in kinds]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in signature.parameters.values())
    arity = len(available) if takes_any else min(len(positional), len(available))
    if not several_dataloaders and name != "training_step":
        needed = sum(parameter.default is inspect.Parameter.empty for parameter in positional)
        arity = min(arity, 3 if needed == 3 else 2)
    elif several_dataloaders and arity < 3:
        raise HookError(
            f"There are several dataloaders, but {type(owner).__name__}.{name}{signature} ({location(hook)}) has no place for "
            f"dataloader_idx. Write it as def {name}(self, batch, batch_idx, dataloader_idx=0)."
        )
    try:
        signature.bind(*available[:arity])
        if arity == 0:
            raise TypeError("it takes no batch")
    except TypeError as error:
        raise HookError(
            f"{type(owner).__name__}.{name}{signature} ({location(hook)}) cannot be called as "
            f"{name}({', '.join(available[:2])}): {error}. Write it as def {name}(self, {', '.join(available[:2])})."
        ) from None
    return arity


def check_names(owner: Any, base: type, former: frozenset[str] = frozenset()) -> None:
    """Refuse methods whose names are nearly those of hooks that the owner does not have, and which it never calls.

    Args:
        owner: a module, a datamodule or a callback.
        base: the class whose names count as known.
        former: names that are hooks of former days, and will be called.

    Raises:
        HookError: naming the method, its place and the hook that was probably meant.
    """
    known = {name for name in dir(base) if not name.startswith("_")}
    methods = list(own_methods(type(owner), base))
    called = {other for name, method in methods for other in mentioned(method.__code__) if other != name}
    for name, method in methods:
        if name in known or name in called or name in former or name.startswith("_"):
            continue
        meant = _MEANT.get(name)
        if meant is None and _looks_like_a_hook(name):
            meant = _closest(name, known)
        if meant in known and not overridden(owner, meant, base):
            raise HookError(
                f"{type(owner).__name__}.{name} ({location(method)}) is not called by anything. Did you mean {meant!r}? "
                "If it is a helper of your own, give it a name that is further from the hook's, or a leading underscore."
            )


def own_methods(cls: type, base: type) -> Iterable[tuple[str, Any]]:
    """The methods of a class and of its parents below ``base``, by name."""
    for parent in cls.__mro__:
        if parent is base or not issubclass(parent, base):
            continue
        for name, value in vars(parent).items():
            function = inspect.unwrap(getattr(value, "fget", getattr(value, "__func__", value)) or value)
            if inspect.isfunction(function):
                yield name, function


def mentioned(code: CodeType) -> Iterable[str]:
    """Names that the code looks up, in nested functions too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from mentioned(constant)


def _looks_like_a_hook(name: str) -> bool:
    return name.startswith(("on_", "configure_")) or name.endswith(("_step", "_dataloader", "_dataloaders"))


def _closest(name: str, known: Iterable[str]) -> str | None:
    hint = did_you_mean(name, (hook for hook in known if _looks_like_a_hook(hook)))
    meant = hint.split("'")[1] if hint else None
    # Only a slip of the pen in a long name counts; `best_step` is not a misspelt `test_step`.
    return meant if meant is not None and len(name) >= 12 and _distance(name, meant) <= 2 else None


def _distance(first: str, second: str) -> int:
    """The least number of letters to insert, delete or replace that turns one word into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]
