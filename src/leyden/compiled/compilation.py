"""What of a run is compiled: the whole step, its forward pass, or the submodules; always, or if that is faster."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from leyden.compiled.backend import Compiler
from leyden.compiled.forward import ForwardStep
from leyden.compiled.graph import Clip
from leyden.compiled.shapes import Shapes
from leyden.compiled.step import CompiledStep
from leyden.errors import warn
from leyden.run import Mode, Run
from leyden.settings import Settings

_HOOKS_WITHIN = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
_OWN_WITHIN = ("backward", "optimizer_zero_grad", "configure_gradient_clipping")

WARM_UP_STEPS = 3
"""Steps before `MeasuredCompilation` looks at the clock: the first ones fill caches."""
MEASURED_STEPS = 10
"""Steps of each kind whose median decides."""
WORTH_COMPILING_S = 60.0
"""A run that would end sooner in eager is not compiled: most models take longer than that to compile, or a good part of it."""


class Compilation:
    """``compile=True``: compiles as much of a step as can be.

    Args:
        run: otherwise ready.
        settings: of the Trainer.
        owns: whether the module overrides a hook.
        is_profiled: whether a profiler wants to see the parts of a step.

    Attributes:
        what: is compiled, in words: "the whole step", "forward and backward", "the submodules"; "nothing" before `begin`.
        reason: why it is not the whole step.
    """

    def __init__(self, run: Run, settings: Settings, owns: Callable[[str], bool], is_profiled: bool) -> None:
        self._run = run
        self._settings = settings
        self._eager_step = run.training_step
        self._obstacle = obstacle(run, settings, owns, is_profiled)
        self._compiler = Compiler(run.device, lambda seconds: run.account.add("compilation", seconds))
        self._step: CompiledStep | None = None
        self._children: list[nn.Module] = []
        self._shapes = Shapes()
        self._given_up: str | None = None  # why, if there were graphs of the whole step before
        self._entirely = False  # whether nothing else was compiled instead
        self._difference: float | None = None  # to eager, once nothing is compiled any more
        self.what, self.reason = "nothing", ""

    def begin(self) -> None:
        """Compile the whole step, or what can be compiled."""
        settings, run = self._settings, self._run
        if run.mode is not Mode.AUTOMATIC:
            self._compile_children()
        elif self._obstacle is not None:
            self._compile_forward(self._obstacle)
        elif self._given_up is not None:
            self._fall_back(self._given_up, True, self._entirely)
        else:
            clip = None
            if settings.gradient_clip_val is not None:
                clip = Clip(float(settings.gradient_clip_val), settings.gradient_clip_algorithm or "norm")
            self.what = "the whole step"
            self._step = CompiledStep(run, clip, self._compiler, self._shapes, self._fall_back)

    def is_ready(self) -> bool:
        """Whether the next batch is for `train_on`."""
        return self._step is not None and self._step.is_ready()

    def train_on(self, batch: Any, batch_idx: int) -> bool:
        """Train on a batch by a graph; whether that was possible, else nothing has happened. Sets `output`."""
        assert self._step is not None
        return self._step.train_on(batch, batch_idx)

    @property
    def output(self) -> Any:
        """What callbacks get of the batch."""
        assert self._step is not None
        return self._step.output

    def undo(self) -> None:
        """Leave nothing compiled behind."""
        self._run.training_step = self._eager_step
        if self._step is not None:
            self._difference, self._step = self._step.largest_difference, None
        for child in self._children:
            child._compiled_call_impl = None
        self._children = []

    @property
    def trains_compiled(self) -> bool:
        """Whether something of the next batch runs compiled."""
        return self.what != "nothing" and (self._step is None or self._run.progress.global_step > 0)

    @property
    def compilations(self) -> int:
        """How many graphs were compiled so far."""
        return self._compiler.graphs

    def line(self) -> tuple[str, str]:
        """A setting and what became of it, for `Trainer.explain`."""
        setting = f"compile={self._settings.compile!r}"
        if self.what == "nothing" and self.reason:
            return setting, f"nothing is compiled: {self.reason}; all of it is eager"
        what = f"{self.what} {'is' if self.what in ('the whole step', 'nothing') else 'are'}"
        if not self._compiler.graphs:
            return setting, f"{what} to be compiled" if self.what != "nothing" else "nothing is compiled yet"
        count = "1 graph" if self._compiler.graphs == 1 else f"{self._compiler.graphs} graphs"
        took = f" in {self._compiler.seconds:.1f} s" if self._compiler.seconds else ""
        done = f"{what} compiled: {count}{took}"
        difference = self._difference if self._step is None else self._step.largest_difference
        if difference is not None:
            done += f", at most {difference:.0e} from eager when first used"
        return setting, f"{done}; not the whole step: {self.reason}" if self.reason else done

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint needs to make the same steps."""
        return {"shapes": self._shapes.state(), "given_up": self._given_up, "entirely": self._entirely}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._shapes.load(state.get("shapes", []))
        self._given_up, self._entirely = state.get("given_up"), bool(state.get("entirely"))
        if self._given_up is not None and self._step is not None:
            self._fall_back(self._given_up, True, self._entirely)

    def _compile_forward(self, reason: str, lasting: bool = False) -> None:
        self.what, self.reason, self._step = "forward and backward", reason, None
        self._given_up = reason if lasting else None
        warn(
            "compile",
            f"The whole step cannot be one graph: {reason}. Forward and backward pass are compiled without the rest.",
        )
        self._run.training_step = ForwardStep(self._run, self._compiler, self._shapes, self._give_up)

    def _fall_back(self, reason: str, lasting: bool, entirely: bool) -> None:
        self._step = None
        if entirely:
            self._given_up, self._entirely = reason, True
            self._give_up(reason)
        else:
            self._compile_forward(reason, lasting)

    def _give_up(self, reason: str) -> None:
        self.what, self.reason = "nothing", reason
        warn("compile", f"training_step cannot be compiled: {reason}. It runs in eager.")
        self._run.training_step = self._eager_step

    def _compile_children(self) -> None:
        run = self._run
        children = [child for child in run.module.children() if any(True for _ in child.parameters())]
        self._children = [child for child in children if child._compiled_call_impl is None]  # else the user compiles it
        names = ", ".join(type(child).__name__ for child in self._children)
        self.what, self.reason = "the submodules", f"the step is made by {run.mode.value}"
        warn("compile", f"The whole step cannot be one graph: {self.reason}. Compiled are the submodules: {names}.")
        self._compiler.on_failure = self._give_up
        for child in self._children:
            # what nn.Module.compile does leaves out the modules of torch itself
            child._compiled_call_impl = self._compiler.compile_in_parts(_caller_of(child))


def _caller_of(module: nn.Module) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    return call


class MeasuredCompilation:
    """``compile="auto"``: the first steps are eager, then come compiled ones, and the faster way is kept.

    Measured is the time from one step to the next, with waiting for data and callbacks, so that compilation is not kept where
    something else is the bottleneck. The choice is part of a checkpoint; a run that goes on from one that was written before
    the choice measures anew.

    Args:
        inner: what is compiled, if it is.
        run: whose steps.
        clock: returns seconds.
    """

    def __init__(self, inner: Compilation, run: Run, clock: Callable[[], float] = time.perf_counter) -> None:
        self._inner = inner
        self._run = run
        self._clock = clock
        self._times: dict[str, list[float]] = {"eager": [], "compiled": []}
        self._phase = "eager"
        self._to_skip = WARM_UP_STEPS
        self._last: float | None = None
        self._graphs = 0
        self.kept: str | None = None
        self.why = "the first steps are measured"

    def is_ready(self) -> bool:
        """Whether the next batch is for `train_on`."""
        if self.kept is None and self._run.progress.micro_batch == 0:
            self._measure()
        return self._inner.is_ready()

    def train_on(self, batch: Any, batch_idx: int) -> bool:
        """See `Compilation.train_on`."""
        return self._inner.train_on(batch, batch_idx)

    @property
    def output(self) -> Any:
        """See `Compilation.output`."""
        return self._inner.output

    @property
    def trains_compiled(self) -> bool:
        """See `Compilation.trains_compiled`."""
        return self._inner.trains_compiled

    def undo(self) -> None:
        """See `Compilation.undo`."""
        self._inner.undo()

    def line(self) -> tuple[str, str]:
        """See `Compilation.line`."""
        setting, what = self._inner.line()
        return setting, f"{self.why}; {what}" if self.kept == "compiled" else self.why

    def state_dict(self) -> dict[str, Any]:
        """See `Compilation.state_dict`."""
        return {**self._inner.state_dict(), "kept": self.kept, "why": self.why}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Compilation.load_state_dict`."""
        self._inner.load_state_dict(state)
        if state.get("kept") is not None:
            self.kept, self.why = state["kept"], state["why"]
            if self.kept == "compiled":
                self._inner.begin()

    def _measure(self) -> None:
        """Note the time since the last step, and decide once there are enough."""
        if self._run.device.type == "cuda":
            torch.cuda.synchronize()
        now, last = self._clock(), self._last
        self._last = now
        if self._inner.compilations != self._graphs:
            self._graphs, self._to_skip = self._inner.compilations, WARM_UP_STEPS
        if last is None:
            return
        if self._to_skip:
            self._to_skip -= 1
            return
        times = self._times[self._phase]
        times.append(now - last)
        if len(times) < MEASURED_STEPS:
            return
        if self._phase == "eager":
            self._end_of_eager(statistics.median(times))
        else:
            self._choose()

    def _end_of_eager(self, seconds: float) -> None:
        rest = seconds * steps_left(self._run)
        if rest < WORTH_COMPILING_S:
            self.kept, self.why = (
                "eager",
                f"{_milliseconds(seconds)} per step: the {rest:.0f} s left do not pay for compiling",
            )
            return
        self._phase, self._to_skip = "compiled", WARM_UP_STEPS
        self._inner.begin()

    def _choose(self) -> None:
        eager, compiled = (statistics.median(self._times[kind]) for kind in ("eager", "compiled"))
        self.kept = "compiled" if compiled < eager else "eager"
        self.why = f"{_milliseconds(eager)} per step in eager, {_milliseconds(compiled)} compiled: {self.kept} is kept"
        if self.kept == "eager":
            self._inner.undo()


def make_compilation(
    run: Run, settings: Settings, owns: Callable[[str], bool], is_profiled: bool
) -> Compilation | MeasuredCompilation:
    """What the Trainer's ``compile`` asks for."""
    compilation = Compilation(run, settings, owns, is_profiled)
    if settings.compile == "auto":
        return MeasuredCompilation(compilation, run)
    compilation.begin()
    return compilation


def obstacle(run: Run, settings: Settings, owns: Callable[[str], bool], is_profiled: bool) -> str | None:
    """What keeps the whole step from being one graph, in words that end a sentence; None if nothing is known to."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return f"torch {torch.__version__} cannot trace a backward pass, as 2.13 can"
    if run.strategy.world_size > 1:
        return "several processes exchange gradients in the middle of it"
    for name, off in (("nan_policy", None), ("oom_policy", "raise"), ("detect_anomaly", False)):
        if getattr(settings, name) != off:
            return f"{name}={getattr(settings, name)!r} looks at it in the middle"
    for name in _HOOKS_WITHIN:
        if getattr(run.hooks, name):
            return f"{name} is called in the middle of it"
    for name in _OWN_WITHIN:
        if owns(name):
            return f"the module overrides {name}"
    if is_profiled:
        return "the profiler measures its parts"
    if not isinstance(run.step_context, (torch.autocast, nullcontext)):
        return f"precision={settings.precision.name!r} changes torch's default dtype during it"
    return None


def steps_left(run: Run) -> float:
    """Optimizer steps until the end of the run, as far as that is known; inf if it has none."""
    progress = run.progress
    left = math.inf
    if run.max_epochs != -1 and run.source.total != math.inf:
        per_epoch = math.ceil(run.source.total / run.accumulate)
        left = per_epoch * (run.max_epochs - progress.epoch) - progress.batch / run.accumulate
    return left if run.max_steps == -1 else min(left, run.max_steps - progress.global_step)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
