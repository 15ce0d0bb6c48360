"""Where compilation enters a run, and what keeps a whole step from being one graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from leyden.compiled.backend import Compiler
from leyden.compiled.graph import Clip
from leyden.compiled.step import CompiledStep, compile_children, compile_forward
from leyden.run import Mode, Run
from leyden.settings import Settings

_HOOKS_WITHIN = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
_OWN_WITHIN = ("backward", "optimizer_zero_grad", "configure_gradient_clipping")


def compile_run(run: Run, settings: Settings, owns: Callable[[str], bool], is_profiled: bool) -> None:
    """Let a run's steps be compiled, as far as they can be.

    Args:
        run: otherwise ready.
        settings: of the Trainer; ``compile`` is True or "auto".
        owns: whether the module overrides a hook.
        is_profiled: whether a profiler wants to see the parts of a step.
    """
    compiler = Compiler(run.device, lambda seconds: run.account.add("compilation", seconds))
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        compile_forward(run, compiler, f"torch {torch.__version__} does not trace a backward pass; 2.13 does")
        return
    if run.mode is not Mode.AUTOMATIC:
        compile_children(run, compiler)
        return
    reason = obstacle(run, settings, owns, is_profiled)
    if reason is not None:
        compile_forward(run, compiler, reason)
        return
    clip = None
    if settings.gradient_clip_val is not None:
        clip = Clip(float(settings.gradient_clip_val), settings.gradient_clip_algorithm or "norm")
    run.compiled = CompiledStep(run, clip, compiler)


def obstacle(run: Run, settings: Settings, owns: Callable[[str], bool], is_profiled: bool) -> str | None:
    """What needs a place between the parts of a step, in words that end a sentence; None if nothing does."""
    for name in _HOOKS_WITHIN:
        if getattr(run.hooks, name):
            return f"{name} is called in the middle of it"
    for name in _OWN_WITHIN:
        if owns(name):
            return f"the module overrides {name}"
    for name, off in (("nan_policy", None), ("oom_policy", "raise"), ("detect_anomaly", False)):
        if getattr(settings, name) != off:
            return f"{name}={getattr(settings, name)!r} looks at it in the middle"
    if is_profiled:
        return "the profiler measures its parts"
    if not isinstance(run.step_context, (torch.autocast, nullcontext)):
        return "the precision changes the default dtype" if settings.precision.parameter_dtype else "of its precision"
    return None
