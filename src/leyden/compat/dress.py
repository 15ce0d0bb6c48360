"""Modules of 2020, dressed in the hooks of today while a Trainer runs them.

A dressed module has hooks of today among its own attributes, where the engine finds them before those of its class. They call
what the user wrote at the places where it was called then. At the end of the run they are taken off again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from leyden.callbacks.callback import Callback
from leyden.compat.calls import Hook, adapted, arguments_of, fits, names_of, needs, spelled, takes
from leyden.compat.once import tell
from leyden.compat.places import EPOCH_ENDS, PLACES, SINGLE, TODAY
from leyden.compat.results import Results, kept
from leyden.compat.turns import Turns, split_batch
from leyden.errors import ConfigurationError, HookError
from leyden.former import are_former, former_hooks
from leyden.hooks import (
    EVENTS,
    FORMER_CALLBACK_HOOKS,
    FORMER_MODULE_HOOKS,
    Worn,
    location,
    overridden,
)
from leyden.module import LightningModule
from leyden.optimizers import needs_closure
from leyden.strategy import Strategy
from leyden.strategy.ddp import DDPStrategy

if TYPE_CHECKING:
    from leyden.trainer import Trainer

_INDEX = {"optimizer_idx", "optimizer_i", "opt_idx"}
_NOTHING = object()
_greeted: WeakKeyDictionary[object, set[tuple[int, str]]] = WeakKeyDictionary()


class Dress:
    """The hooks of today on a module of 2020 and on callbacks of then.

    Args:
        trainer: who runs it.
        module: the user's.
        callbacks: those of the run.
        bptt_steps: the Trainer's ``truncated_bptt_steps``.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, callbacks: Sequence[Callback], bptt_steps: int | None = None
    ) -> None:
        self._trainer, self._module = trainer, module
        self._before_it: list[tuple[object, str, Any]] = []
        for owner in (module, *callbacks):  # another Trainer within this module's run dresses it anew
            for name, value in list(vars(owner).items()):
                if isinstance(value, Worn):
                    self._set(owner, name, _NOTHING)
        self._bptt_steps = bptt_steps or getattr(module, "truncated_bptt_steps", None) or None
        self._former = former_hooks(module, LightningModule, FORMER_MODULE_HOOKS)
        self._results = Results(module, everything=bool(self._former))
        self._greetings: list[Hook] = []
        self._was_automatic = module.automatic_optimization
        self._step = module.training_step
        self._step_takes = takes(self._step)
        self._several = self._collects = False
        self._zero_grad = self._own("optimizer_zero_grad")
        step = self._own("optimizer_step")
        # Of 0.7, if it knows whose turn it is: gradients are there when it is called. That of today computes them in its closure.
        self._former_step = step if step is not None and _INDEX & {*names_of(step)} else None
        self._frequencies: list[int] = []
        self._trained: list[list[Any]] = []
        self._last: dict[int, tuple[int, int]] = {}
        self._turns: Turns | None = None
        self._check_epoch_ends()
        try:
            self._put_on(callbacks)
        except BaseException:
            self.undo()
            raise

    def _put_on(self, callbacks: Sequence[Callback]) -> None:
        module, trainer = self._module, self._trainer
        for name in self._former:
            tell(f"{type(module).__name__}.{name}", TODAY[name])
        self._dress_moments(module, self._former, ())
        self._dress_training()
        for stage in EPOCH_ENDS:
            self._dress_evaluation(stage)
        if "tng_dataloader" in self._former and self._own("train_dataloader") is None:
            loader = self._module.tng_dataloader
            self._wear("train_dataloader", loader, of=loader)  # type: ignore[arg-type]  # a hook of then
        for callback in callbacks:
            self._dress_callback(callback)
        if self._collects:
            self._before("on_train_epoch_start", self._begin_epoch, of=None)
        for name, value in {
            "use_amp": trainer.precision not in ("32-true", "64-true"),
            "use_ddp": trainer.world_size > 1,
            "use_dp": False,
            "datamodule": trainer.datamodule,
        }.items():
            if not hasattr(module, name):
                self._set(module, name, value)

    def undo(self) -> None:
        """Leave module and callbacks as the user made them."""
        for owner, name, before in reversed(self._before_it):
            if before is _NOTHING:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = before
        self._before_it.clear()

    @property
    def by_turns(self) -> bool:
        """Whether a batch is several steps, so that the module steps by itself."""
        return self._turns is not None

    def greet(self) -> None:
        """Call what callbacks of 2020 have for the moment when a Trainer is made; once."""
        for hook in self._greetings:
            owner = hook.__self__  # type: ignore[attr-defined]  # bound
            if (id(self._trainer), hook.__name__) not in (told := _greeted.setdefault(owner, set())):
                told.add((id(self._trainer), hook.__name__))
                hook(self._trainer)

    def _set(self, owner: object, name: str, value: Any) -> None:
        """Set, or take away, one of an object's own attributes, until `undo`."""
        own = vars(owner)
        self._before_it.append((owner, name, own.get(name, _NOTHING)))
        if value is _NOTHING:
            own.pop(name)
        else:
            own[name] = value

    def _wear(self, name: str, hook: Hook, of: Hook | None, owner: object = None) -> None:
        """Put a hook on; ``of`` is what the user wrote, for those who ask where it is."""
        worn = Worn(hook)
        worn.former = of
        self._set(self._module if owner is None else owner, name, worn)

    def _own(self, name: str) -> Hook | None:
        """What the user has under a name, or what is worn there; None if that is nothing."""
        if name in FORMER_MODULE_HOOKS:
            return getattr(self._module, name) if name in self._former else None
        return getattr(self._module, name) if overridden(self._module, name, LightningModule) else None

    def _first_of(self, *names: str) -> Hook | None:
        return next((hook for hook in map(self._own, names) if hook is not None), None)

    def _before(self, name: str, first: Hook, of: Hook | None) -> None:
        """Have ``first`` called before the user's own hook of that name."""
        self._wear(name, _one_after_the_other(first, self._own(name)), of)

    # Moments of a run, of modules and callbacks

    def _dress_moments(self, owner: Any, former: Sequence[str], before: tuple[str, ...]) -> None:
        """Give an owner's hooks of then their places, and those of today with other parameters what they ask for."""
        base = LightningModule if owner is self._module else Callback
        for name, event in EVENTS.items():
            today = (*before, *event.arguments)
            if not overridden(owner, name, base) or (event.module_only and base is Callback):
                continue
            hook = getattr(owner, name)
            if not fits(hook, today) or are_former(name, names_of(hook), before):
                tell(spelled(owner, name, hook), f"{name}({', '.join(today)})")
                self._collects = self._collects or (name == "on_train_epoch_end" and "outputs" in names_of(hook))
                last = ("dataloader_idx",) if event.per_dataloader else ()
                more = self._of_epoch if name == "on_train_epoch_end" else self._turn
                self._wear(name, adapted(hook, (*today, *last), more), hook, owner)
        for name, places in PLACES.items():
            for place in places if name in former else ():
                then = adapted(getattr(owner, name), (*before, *EVENTS[place].arguments))
                now = getattr(owner, place) if overridden(owner, place, base) else None
                starts = name.endswith(("_start", "pre_performance_check"))
                order = (then, now) if starts else (now, then)
                self._wear(place, _one_after_the_other(*order), getattr(owner, name), owner)

    def _dress_callback(self, callback: Callback) -> None:
        former = former_hooks(callback, Callback, FORMER_CALLBACK_HOOKS)
        for name in former:
            places = PLACES.get(name, ())
            today = [f"{place}({', '.join(('trainer', 'pl_module', *EVENTS[place].arguments))})" for place in places]
            tell(f"{type(callback).__name__}.{name}", " and ".join(today) or TODAY[name])
        self._dress_moments(callback, former, ("trainer", "pl_module"))
        self._greetings += [getattr(callback, name) for name in ("on_init_start", "on_init_end") if name in former]
        save = callback.on_save_checkpoint
        if overridden(callback, "on_save_checkpoint", Callback) and takes(save) == 2:
            self._dress_state(callback, save, callback.on_load_checkpoint)
        if "on_keyboard_interrupt" in former:
            told = callback.on_keyboard_interrupt  # type: ignore[attr-defined]  # a hook of then
            own = callback.on_exception if overridden(callback, "on_exception", Callback) else None
            self._wear(
                "on_exception", _one_after_the_other(functools.partial(_if_interrupted, told), own), told, callback
            )

    def _dress_state(self, callback: Callback, save: Hook, load: Hook) -> None:
        """Keep what ``on_save_checkpoint(trainer, pl_module)`` returned: the callback's state, for `on_load_checkpoint`."""
        trainer, module = self._trainer, self._module
        tell(
            f"{type(callback).__name__}.on_save_checkpoint(trainer, pl_module), which returns a state",
            "state_dict(self), and load_state_dict(self, state) for on_load_checkpoint",
        )
        self._wear("state_dict", lambda: save(trainer, module) or {}, save, callback)
        self._wear("on_save_checkpoint", _nothing, save, callback)
        if overridden(callback, "on_load_checkpoint", Callback):
            loads = (lambda state: load(state)) if takes(load) == 1 else (lambda state: load(trainer, module, state))
            self._wear("load_state_dict", loads, load, callback)
            self._wear("on_load_checkpoint", _nothing, load, callback)

    # Training

    def _dress_training(self) -> None:
        self._wear("training_step", self._train_alone, of=self._step)
        configure = self._module.configure_optimizers
        self._wear("configure_optimizers", self._configure_optimizers(configure), of=configure)
        for name, today in SINGLE.items():
            hook = self._own(name)
            if hook is not None and (not fits(hook, today) or _INDEX & {*names_of(hook)}):
                if name != "optimizer_step":
                    tell(spelled(self._module, name, hook), f"def {name}(self, {', '.join(today)})")
                self._wear(name, adapted(hook, today, self._turn), of=hook)
        if "training_epoch_end" in self._former:
            self._collects, end = True, self._own("training_epoch_end")
            self._before("on_train_epoch_end", self._end_epoch, of=end)

    def _train_alone(self, batch: Any, batch_idx: int) -> Any:
        return self._train(batch, batch_idx)

    def _train(self, batch: Any, batch_idx: int, index: int = 0, hiddens: Any = None) -> Any:
        """One call of the user's `training_step`, with the optimizer's index and the hidden state where they belong."""
        given: tuple[Any, ...] = (batch, batch_idx)
        if self._several or (self._step_takes > 2 and self._bptt_steps is None):
            given += (index,)
        if self._bptt_steps is not None:
            given += (hiddens,)
        output = self._step(*given[: self._step_takes])
        end = self._first_of("training_step_end", "training_end")
        output = output if end is None else end(output)
        if isinstance(output, int) and output == -1:  # in 0.5: nothing to train on here
            return None
        self._results.publish(output, "training_step")
        if self._collects and output is not None:
            self._trained.extend([] for _ in range(index + 1 - len(self._trained)))
            if self._last.get(index) == (batch_idx, id(batch)):  # evaluated again, as LBFGS does
                self._trained[index].pop()
            self._last[index] = (batch_idx, id(batch))
            self._trained[index].append(kept(output if isinstance(output, dict) else {"loss": output}))
        return output

    def _begin_epoch(self) -> None:
        self._trained.clear()
        self._last.clear()

    def _of_epoch(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the steps of a training epoch returned: a list, or one for each optimizer."""
        return {
            "outputs": list(self._trained[0]) if len(self._trained) == 1 else [list(each) for each in self._trained]
        }

    def _end_epoch(self) -> None:
        end = self._own("training_epoch_end")
        assert end is not None
        self._results.publish(end(self._of_epoch()["outputs"]), "training_epoch_end")

    def _configure_optimizers(self, configure: Hook) -> Hook:
        def configure_optimizers() -> Any:
            returned = configure()
            forms = returned if isinstance(returned, (list, tuple)) else ()
            self._frequencies = [
                int(form["frequency"]) for form in forms if isinstance(form, dict) and "frequency" in form
            ]
            return _watching_val_loss(returned)

        return configure_optimizers

    def takes_turns(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether one batch is several steps, or a step of 2020; then `training_step` is dressed to step by itself."""
        self._several = len(optimizers) > 1
        if not self._was_automatic or not (self._several or self._bptt_steps or self._former_step):
            return False
        self._check_turns()
        again = [type(each).__name__ for each in optimizers if needs_closure(each)]
        if again and self._trainer.accumulate_grad_batches > 1:
            raise ConfigurationError(
                f"accumulate_grad_batches={self._trainer.accumulate_grad_batches} does not go with {again[0]} among several "
                "optimizers: it evaluates the loss again, and the window's other batches are gone. Leave one of the two out."
            )
        if self._former_step is not None:
            tell(
                spelled(self._module, "optimizer_step", self._former_step),
                "def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure), which calls "
                "optimizer.step(closure=optimizer_closure)",
            )
        self._turns = Turns(
            self._module,
            self._train,
            self._former_step,
            self._zero_grad,
            self._frequencies if len(self._frequencies) > 1 else (),
            self._bptt_steps,
            self._own("tbptt_split_batch") or split_batch,
        )
        self._wear("training_step", self._turns.step, of=self._step)
        self._set(self._module, "automatic_optimization", False)
        return True

    def _check_epoch_ends(self) -> None:
        kind = type(self._module).__name__
        for names in (*EPOCH_ENDS.values(), ("training_epoch_end",)):
            present = [name for name in names if name in self._former]
            if len(present) > 1:
                raise HookError(
                    f"{kind} has both {' and '.join(present)}, which are one hook under two names. Keep one."
                )
            for hook in map(self._own, present):
                if hook is not None and (takes(hook) < 1 or needs(hook) > 1):
                    raise HookError(
                        f"{spelled(self._module, present[0], hook)} ({location(hook)}) cannot be called with the list of what "
                        f"the steps returned. Write it as def {present[0]}(self, outputs)."
                    )

    def _check_turns(self) -> None:
        kind = type(self._module).__name__
        wanted = [*(["optimizer_idx"] if self._several else []), *(["hiddens"] if self._bptt_steps else [])]
        if self._step_takes < 2 + len(wanted):
            because = (
                "configure_optimizers returned several optimizers" if self._several else "truncated_bptt_steps is set"
            )
            raise HookError(
                f"{because}, but {kind}.training_step({', '.join(names_of(self._step))}) ({location(self._step)}) has no place "
                f"for {' and '.join(wanted)}. Write it as def training_step(self, batch, batch_idx, {', '.join(wanted)}), or set "
                "self.automatic_optimization = False in __init__ and step the optimizers in it."
            )
        if self._several:
            tell(
                f"{kind}.training_step(batch, batch_idx, optimizer_idx)",
                "self.automatic_optimization = False in __init__, and opt.minimize(loss) for each of self.optimizers()",
            )
        if self._bptt_steps and self._trainer.truncated_bptt_steps is None:
            tell(
                "truncated_bptt_steps",
                "automatic_optimization = False, and a loop over parts of the batch in training_step",
            )

    def _turn(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """What hooks of 2020 are given beside the arguments of today: whose turn it is."""
        run = self._module._run
        if run is None or not run.handles:
            return {"trainer": self._trainer}
        index = self._turns.index if self._turns is not None else 0
        mine = getattr(known.get("scheduler"), "optimizer", None)
        for number, handle in enumerate(run.handles):
            index = number if mine is not None and handle.optimizer is mine else index
        own = {"trainer": self._trainer, "optimizer": run.handles[index], "optimizer_idx": index}
        return {**own, "use_amp": run.scaler is not None}

    # Evaluation

    def _dress_evaluation(self, stage: str) -> None:
        step, after, end = (
            self._own(f"{stage}_step"),
            self._own(f"{stage}_step_end"),
            self._first_of(*EPOCH_ENDS[stage]),
        )
        if step is None or (after is None and end is None):
            return
        collected: dict[int, list[Any]] = {}

        @functools.wraps(step)
        def collecting(*given: Any) -> Any:
            output = step(*given)
            output = output if after is None else after(output)
            if end is not None and output is not None:
                dataloader_idx = given[2] if len(given) > 2 else 0
                collected.setdefault(dataloader_idx, []).append(kept(output))
            return output

        self._wear(f"{stage}_step", collecting, of=step)
        if end is not None:
            self._before(f"on_{stage}_epoch_start", lambda: collected.clear(), of=end)
            self._before(f"on_{stage}_epoch_end", lambda: self._end_evaluation(stage, end, collected), of=end)

    def _end_evaluation(self, stage: str, end: Hook, collected: dict[int, list[Any]]) -> None:
        loaders = max(len(self._trainer._counts(stage)), max(collected, default=0) + 1)
        outputs: list[Any] = [collected.get(index, []) for index in range(loaders)]
        collected.clear()
        self._results.publish(end(outputs[0] if len(outputs) == 1 else outputs), end.__name__)


def _watching_val_loss(returned: Any) -> Any:
    """``([optimizers], [schedulers])`` with "val_loss" for a `ReduceLROnPlateau` that says nothing: the default of then."""
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], (list, tuple))):
        return returned
    plateaus = [each for each in returned[1] if isinstance(each, ReduceLROnPlateau)]
    if not plateaus:
        return returned
    tell("[optimizer], [ReduceLROnPlateau(optimizer)]", "[optimizer], [{'scheduler': …, 'monitor': 'val_loss'}]")
    schedulers = [{"scheduler": each, "monitor": "val_loss"} if each in plateaus else each for each in returned[1]]
    return returned[0], schedulers


def join_ranks(module: LightningModule, strategy: Strategy) -> None:
    """Let a module of 2020 join the ranks, or wrap what they train, in its own way.

    Args:
        module: one with `init_ddp_connection(proc_rank, world_size)` or `configure_ddp(model, device_ids)`, maybe.
        strategy: of the run, before it has joined.
    """
    former = former_hooks(module, LightningModule, FORMER_MODULE_HOOKS)
    if "configure_ddp" in former and isinstance(strategy, DDPStrategy):
        strategy.wrap_by = module.configure_ddp  # type: ignore[assignment]  # a hook of then
    if "init_ddp_connection" in former and strategy.world_size > 1 and not dist.is_initialized():
        join: Callable[..., Any] = module.init_ddp_connection  # type: ignore[assignment]  # a hook of then
        known = {
            "global_rank": strategy.global_rank,
            "world_size": strategy.world_size,
            "is_slurm_managing_tasks": False,
        }
        join(*arguments_of(join, known))


def _nothing(trainer: Any, pl_module: Any, checkpoint: Any) -> None:
    """In the place of a hook that means something else today."""


def _one_after_the_other(*hooks: Hook | None) -> Hook:
    """Hooks as one, which answers what the first of them answers that is not None."""
    present = [hook for hook in hooks if hook is not None]

    def call(*given: Any) -> Any:
        answers = [hook(*given) for hook in present]
        return next((answer for answer in answers if answer is not None), None)

    return present[0] if len(present) == 1 else call


def _if_interrupted(hook: Hook, trainer: Any, module: Any, exception: BaseException) -> None:
    if isinstance(exception, KeyboardInterrupt):
        hook(trainer, module)
