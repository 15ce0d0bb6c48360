"""torch's compiler, with what leyden asks of it."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from leyden.errors import warn

MANY_TIMES = 4
"""How often graphs of a run are made anew until a warning asks why."""


class Compiler:
    """Makes graphs by TorchDynamo and TorchInductor, and counts them.

    Random numbers in graphs are those that eager would draw (inductor's ``fallback_random``).

    Args:
        device: where the graphs run; on CUDA they are recorded as CUDA graphs.
        note: is told the seconds of each compilation.

    Attributes:
        graphs: how many were compiled.
        seconds: that it took.
        errors: what a compilation raises if it cannot be done.
        failure: why a part was not compiled, in words that end a sentence; None if all were.
        on_failure: is told that.
    """

    def __init__(self, device: torch.device, note: Callable[[float], None] = lambda seconds: None) -> None:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        self.errors = (TorchDynamoException, FailOnRecompileLimitHit)
        self.graphs = 0
        self.seconds = 0.0
        self.failure: str | None = None
        self.on_failure: Callable[[str], None] = lambda reason: None
        self._note = note
        self._options: dict[str, Any] = {"fallback_random": True}
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            self._options["triton.cudagraphs"] = True
        self._again = 0

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function into one graph; what cannot be one raises one of ``errors`` when it is called."""
        return torch.compile(function, fullgraph=True, backend=self.backend, options={"guard_filter_fn": keep_guards})

    def compile_in_parts(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function into as many graphs as it needs.

        A part that torch's compiler fails at runs in eager, and ``failure`` says why: an earlier part may have run already, so
        that nobody could begin anew.
        """
        return torch.compile(with_own_code(function), backend=self._backend_or_eager)

    def backend(self, graph: Any, inputs: list[Any]) -> Any:
        """Compile what TorchDynamo has captured."""
        with warnings.catch_warnings():  # of torch's to itself: its compiler uses what it deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch._inductor.compile_fx import compile_fx

            compiled = compile_fx(graph, inputs, config_patches=self._options)
        self.graphs += 1
        return compiled

    def _backend_or_eager(self, graph: Any, inputs: list[Any]) -> Any:
        from torch._dynamo.exc import RestartAnalysis

        try:
            return self.backend(graph, inputs)
        except RestartAnalysis:  # is no failure: it is traced again, in another way
            raise
        except Exception as error:  # noqa: BLE001 whatever it is, eager can do the same
            if self.failure is None:
                self.failure = f"torch's compiler failed with {type(error).__name__}: {reason_of(error)}"
                self.on_failure(self.failure)
            return graph.forward

    def keep_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Let CUDA graphs read and write these tensors where they are, instead of copies of them."""
        if self._on_cuda:
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor, guard=False)

    def begin_step(self) -> None:
        """Let CUDA graphs reuse the memory of the last step's results."""
        if self._on_cuda:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def note_seconds(self, seconds: float) -> None:
        """Note how long a compilation took."""
        self.seconds += seconds
        self._note(seconds)

    def look_at_recompilation(self) -> None:
        """Warn, once, if graphs are made again and again."""
        self._again += 1
        if self._again != MANY_TIMES:
            return
        warn(
            "recompilations",
            f"compile: {self._again} times a graph had to be made anew, this time because {_last_reason()}. A Python number "
            "that changes from step to step makes a graph for each value: make it a tensor, or leave it out of the step.",
        )


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object and a name of its own.

    torch keeps its graphs by code object, for the whole process, and has a limit for each; and by the name it remembers which
    sizes and numbers have changed, so that what it makes of a function would depend on earlier runs.
    """
    inner = getattr(function, "__func__", function)
    if not isinstance(inner, FunctionType):
        return function
    code = inner.__code__.replace(co_name=f"{inner.__code__.co_name}_{next(_NUMBERS)}")
    own = FunctionType(code, inner.__globals__, code.co_name, inner.__defaults__, inner.__closure__)
    own.__kwdefaults__ = inner.__kwdefaults__
    return MethodType(own, function.__self__) if isinstance(function, MethodType) else own


_NUMBERS = itertools.count()


def keep_guards(guards: Sequence[Any]) -> list[bool]:
    """Which of the compiler's checks before each step are needed; there are hundreds, and they are half the time of a tiny step.

    All of the user's are kept. Left out are those of names of Python, torch and leyden, and of what belongs to
    `leyden.compiled.graph.StepBody`: who changes that says so (`Update.form`), or makes a new one.
    """
    return [_is_needed(guard) for guard in guards]


def _is_needed(guard: Any) -> bool:
    name: str = guard.name
    if guard.is_global:
        value = guard.value if guard.has_value else None
        # a tensor, or a module in a global variable, is of torch too, and may be another one tomorrow
        fixed = isinstance(value, (type, FunctionType, BuiltinFunctionType))
        home = str(getattr(value, "__module__", "")).partition(".")[0]
        return guard.guard_type not in _OF_NAMES and not (fixed and home in ("torch", "leyden"))
    return not name.startswith("self") or guard.guard_type == "DUPLICATE_INPUT" or name.startswith(_WATCHED)


_OF_NAMES = ("BUILTIN_MATCH", "MODULE_MATCH", "CLASS_MATCH")
_WATCHED = (
    "self.training_step", "self.update.form", "self.update.parameters[", "self.update.frozen[", "self.update.stand_in",
    "self.has_gradient",
)  # fmt: skip


@contextmanager
def compiler_switches() -> Iterator[None]:
    """Set, for one verb, what the compiler needs to make one graph of a whole step."""
    import torch._dynamo
    import torch.compiler.config as compiler_config

    config: Any = torch._dynamo.config
    with ExitStack() as stack:
        if hasattr(config, "trace_autograd_ops"):
            stack.enter_context(config.patch(trace_autograd_ops=True))
        # a float that the step itself changes would be a variable of the graph whose changes torch 2.13 loses
        stack.enter_context(config.patch(specialize_float=True))
        # by default hooks that are added later are not noticed, and a counter of a module is a constant
        stack.enter_context(config.patch(skip_nnmodule_hook_guards=False, allow_unspec_int_on_nn_module=True))
        stack.enter_context(compiler_config.patch(dynamic_sources=",".join(_CHANGING)))  # type: ignore[attr-defined]
        yield


_CHANGING = ("L['batch_idx']", r".*\.progress\.(epoch|global_step|batch|total_batches)$")
"""Numbers that are others in each call, as torch names them: variables of a graph from the beginning."""


def is_endless(error: BaseException) -> bool:
    """Whether graphs were made again and again, so that there is no use in making other ones of the same code."""
    return type(error).__name__ == "FailOnRecompileLimitHit"


def reason_of(error: BaseException) -> str:
    """What a compilation says about why it failed, in words that end a sentence: the cause and the line of the user."""
    text = str(error)
    if is_endless(error):
        return f"it would be compiled again and again, this time because {_last_reason()}"
    if found := re.search(r"CaptureError\(['\"](.+?)['\"]\)", text):
        return found[1]
    lines = [line.strip().rstrip(".") for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and re.fullmatch(r"backend=.* raised:", lines[0]):
        lines = [f"torch's compiler failed with {lines[1]}"]
    first = lines[0] if lines else type(error).__name__
    explanation = re.search(r"Explanation: (.+?)\.?$", text, re.MULTILINE)
    places = re.findall(r'File "([^"]+)", line (\d+), in', text.partition("from user code")[2])
    own = [place for place in places if "/leyden/" not in place[0]] or places
    place = f" ({own[-1][0]}:{own[-1][1]})" if own else ""
    return f"{first}{': ' + explanation[1] if explanation else ''}{place}"


def _last_reason() -> str:
    from torch._dynamo.utils import get_compilation_metrics

    reasons = [each.recompile_reason for each in get_compilation_metrics() if each.recompile_reason]
    return reasons[-1].splitlines()[0].partition("  #")[0].strip() if reasons else "of another shape"
