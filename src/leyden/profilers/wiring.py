"""Where a profiler enters a run: callables are wrapped before the first batch, and only if there is a profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from leyden.callbacks.callback import Callback
from leyden.hooks import Hook
from leyden.profilers.profiler import PassThroughProfiler, Profiler

if TYPE_CHECKING:
    from leyden.run import Evaluation, Run


def measures(profiler: Profiler) -> bool:
    """Whether there is anything to wire."""
    return not isinstance(profiler, PassThroughProfiler)


def wraps(profiler: Profiler) -> bool:
    """Whether the parts of a step are to be wrapped, and not only whole batches."""
    return measures(profiler) and profiler.wants_actions


def listens(profiler: Profiler) -> bool:
    """Whether the beginning of batches matters to this profiler."""
    return type(profiler).begin_batch is not Profiler.begin_batch


def finish(profiler: Profiler, verb: str) -> None:
    """End a verb's measurement and report it."""
    while profiler.wired:
        profiler.wired.pop().remove()  # the user may go on to use the optimizers
    profiler.teardown(verb)
    profiler.describe()


def hooks_of(profiler: Profiler) -> Callable[[Any, str, Hook], Hook] | None:
    """What a `Resolver` wraps each hook in: given its owner, its name and the hook. None wraps nothing."""
    if not wraps(profiler):
        return None
    return lambda owner, name, hook: profiled(profiler, action_name(owner, name), hook)


def batches_of(profiler: Profiler) -> Callable[[Iterator[Any]], Iterator[Any]] | None:
    """What a loader's iterator is wrapped in. None wraps nothing."""
    if not wraps(profiler):
        return None
    return lambda iterator: ProfiledBatches(iterator, profiler)


def profile_run(run: Run, profiler: Profiler) -> None:
    """Measure the training step, backward, the optimizers, batches on their way to the device, and whole batches."""
    if not measures(profiler):
        return
    module, hooks = run.module, run.hooks
    profiler.begin(module)
    if listens(profiler):
        hooks.on_train_batch_start = (lambda batch, *_: profiler.begin_batch(batch), *hooks.on_train_batch_start)
    hooks.on_train_batch_end = (*hooks.on_train_batch_end, lambda _, batch, *__: profiler.end_batch(batch))
    if not wraps(profiler):
        return
    run.training_step = profiled(profiler, action_name(module, "training_step"), run.training_step)
    run.backward = profiled(profiler, "backward", run.backward)
    run.move = profiled(profiler, "batch_to_device", run.move) if run.move is not None else None
    for name in ("optimizer_step", "lr_scheduler_step"):
        place = f"own_{name.removeprefix('lr_')}"
        if getattr(run, place) is not None:
            setattr(run, place, profiled(profiler, action_name(module, name), getattr(run, place)))
    for handle in run.handles:
        # torch's own hooks: they see the step wherever it is called from, the loop, a scaler or the user
        profiler.wired.append(handle.optimizer.register_step_pre_hook(lambda *_: profiler.start("optimizer_step")))
        profiler.wired.append(handle.optimizer.register_step_post_hook(lambda *_: profiler.stop("optimizer_step")))


def profile_evaluation(run: Evaluation, profiler: Profiler) -> None:
    """Measure the whole evaluation, its step, and batches on their way to the device."""
    if not measures(profiler):
        return
    hooks, action = run.hooks, "sanity_check" if run.status.sanity else run.stage
    hooks.model_eval = (lambda: profiler.start(action), *hooks.model_eval)
    hooks.end = (*hooks.end, lambda: profiler.stop(action))
    if run.status.verb != "fit":
        profiler.begin(run.module)
        if listens(profiler):
            hooks.batch_start = (lambda batch, *_: profiler.begin_batch(batch), *hooks.batch_start)
        hooks.batch_end = (*hooks.batch_end, lambda _, batch, *__: profiler.end_batch(batch))
    if wraps(profiler):
        run.step = profiled(profiler, action_name(run.module, f"{run.stage}_step"), run.step)
        run.move = profiled(profiler, "batch_to_device", run.move) if run.move is not None else None


def action_name(owner: Any, name: str) -> str:
    """``[Callback]Ema.on_train_start``, ``[LightningModule]Net.training_step``."""
    kind = "Callback" if isinstance(owner, Callback) else "LightningModule"
    return f"[{kind}]{type(owner).__name__}.{name}"


def profiled(profiler: Profiler, action: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, measured as ``action``."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        profiler.start(action)
        try:
            return function(*args, **kwargs)
        finally:
            profiler.stop(action)

    return measured


class ProfiledBatches:
    """A loader's iterator whose every ``next`` is measured as ``next_batch``, the one that finds the end as well."""

    def __init__(self, iterator: Iterator[Any], profiler: Profiler) -> None:
        self._next = profiled(profiler, "next_batch", iterator.__next__)
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        try:
            return self._next()
        except StopIteration:
            self._ended = True
            raise
