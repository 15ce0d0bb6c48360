"""What a module consists of: a table of its layers, with parameters, sizes and floating point operations."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from leyden.errors import reject

_MEGABYTE = 1e6
_UNITS = ("", "K", "M", "B", "T")


@dataclass(frozen=True)
class LayerSummary:
    """One row of a summary.

    Attributes:
        name: the qualified name in the module, ``""`` for parameters that belong to no submodule.
        type: the class's name.
        params: number of parameter elements, each shared tensor once; uninitialised ones count nothing.
        is_uninitialised: whether some parameters wait for the first batch to get their shape.
        is_training: whether the layer is in train mode.
        in_size: shapes of the inputs, ``None`` if it was not run.
        out_size: shapes of the outputs, ``None`` if it was not run.
        flops: floating point operations of one forward with the example input, ``None`` if it was not run.
    """

    name: str
    type: str
    params: int
    is_uninitialised: bool
    is_training: bool
    in_size: Any = None
    out_size: Any = None
    flops: int | None = None


@dataclass(frozen=True)
class ModelSummary:
    """What `summarize` found. ``str(summary)`` is a plain table.

    Attributes:
        rows: one for each submodule down to ``max_depth``, in order of definition.
        total_parameters: number of parameter elements, each shared tensor once.
        trainable_parameters: those that require a gradient.
        model_size: size of the parameters in MB (10^6 bytes), without buffers.
        modules_in_train_mode: number of submodules, at any depth, in train mode.
        modules_in_eval_mode: number of submodules, at any depth, in eval mode.
        total_flops: floating point operations of one forward with the example input, a multiplication and
            an addition counting as two; ``None`` without an example input.
        has_uninitialised: whether some parameters wait for the first batch; totals are then lower bounds.
    """

    rows: list[LayerSummary]
    total_parameters: int
    trainable_parameters: int
    model_size: float
    modules_in_train_mode: int
    modules_in_eval_mode: int
    total_flops: int | None
    has_uninitialised: bool

    @property
    def non_trainable_parameters(self) -> int:
        """Number of parameter elements that require no gradient."""
        return self.total_parameters - self.trainable_parameters

    def columns(self) -> list[str]:
        """The headings of `cells`; sizes and operations only if the module was run."""
        base = ["", "Name", "Type", "Params", "Mode"]
        return base if self.total_flops is None else [*base, "FLOPs", "In sizes", "Out sizes"]

    def cells(self) -> list[list[str]]:
        """The rows as text, below `columns`."""
        table = []
        for index, row in enumerate(self.rows):
            params = human_number(row.params)
            if row.is_uninitialised:
                params = f"{params} + ?" if row.params else "?"
            mode = "train" if row.is_training else "eval"
            cells = [str(index), row.name or "(own)", row.type, params, mode]
            if self.total_flops is not None:
                cells += [human_number(row.flops), _size_text(row.in_size), _size_text(row.out_size)]
            table.append(cells)
        return table

    def totals(self) -> list[tuple[str, str]]:
        """The lines below the table: a figure and what it counts."""
        least = " (without uninitialised ones)" if self.has_uninitialised else ""
        totals = [
            (human_number(self.trainable_parameters), f"Trainable params{least}"),
            (human_number(self.non_trainable_parameters), "Non-trainable params"),
            (human_number(self.total_parameters), f"Total params{least}"),
            (f"{self.model_size:,.3f}", "Size of the params (MB)"),
            (str(self.modules_in_train_mode), "Modules in train mode"),
            (str(self.modules_in_eval_mode), "Modules in eval mode"),
        ]
        if self.total_flops is not None:
            totals.append((human_number(self.total_flops), "FLOPs of one forward"))
        return totals

    def __str__(self) -> str:
        lines = text_table(self.columns(), self.cells()) if self.rows else []
        width = max((len(line) for line in lines), default=40)
        return "\n".join([*lines, "-" * width, *(f"{figure:<10}{what}" for figure, what in self.totals())])


def summarize(module: nn.Module, max_depth: int = 1, example_input: Any = None) -> ModelSummary:
    """Count the parameters of a module and its submodules, and run it once if there is an example input.

    The run is in eval mode and without gradients. Modes, buffers and the random state are then what they
    were before. It is left out while parameters are uninitialised, which a run would change, and when they
    are sharded over processes, because a run would need all of them.

    Args:
        module: the module; its ``example_input_array`` is used if ``example_input`` is not given.
        max_depth: how many levels of submodules have a row; 0 for totals only, -1 for all.
        example_input: a tensor, a tuple of positional arguments, or a dict of named ones.

    Raises:
        ConfigurationError: if ``max_depth`` is below -1.
    """
    if max_depth < -1:
        reject("max_depth", max_depth, "-1 for all levels, 0 for totals only, or a number of levels")
    parameters = list(module.parameters())
    sized = [parameter for parameter in parameters if not is_lazy(parameter)]
    has_uninitialised = len(sized) < len(parameters)
    layers = _layers(module, max_depth)
    example = getattr(module, "example_input_array", None) if example_input is None else example_input
    modes = [layer.training for layer in module.modules() if layer is not module]
    traces: dict[str, _Trace] = {}
    total_flops = None
    if example is not None and not has_uninitialised and not any(_is_sharded(parameter) for parameter in parameters):
        traces, total_flops = _run(module, layers, example)
    return ModelSummary(
        rows=[_row(name, layer, traces.get(name)) for name, layer in layers.items()],
        total_parameters=sum(parameter.numel() for parameter in sized),
        trainable_parameters=sum(parameter.numel() for parameter in sized if parameter.requires_grad),
        model_size=sum(parameter.numel() * parameter.element_size() for parameter in sized) / _MEGABYTE,
        modules_in_train_mode=sum(modes),
        modules_in_eval_mode=len(modes) - sum(modes),
        total_flops=total_flops,
        has_uninitialised=has_uninitialised,
    )


def _layers(module: nn.Module, max_depth: int) -> dict[str, nn.Module]:
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if name and (max_depth == -1 or name.count(".") < max_depth)
    }
    if max_depth != 0 and next(module.parameters(recurse=False), None) is not None:
        layers[""] = module
    return layers


def _row(name: str, layer: nn.Module, trace: _Trace | None) -> LayerSummary:
    # The row without a name is for the module's own parameters.
    parameters = list(layer.parameters(recurse=bool(name)))
    sized = [parameter for parameter in parameters if not is_lazy(parameter)]
    return LayerSummary(
        name=name,
        type=type(layer).__name__ if name else "Parameter",
        params=sum(parameter.numel() for parameter in sized),
        is_uninitialised=len(sized) < len(parameters),
        is_training=layer.training,
        in_size=trace.in_size if trace is not None else None,
        out_size=trace.out_size if trace is not None else None,
        flops=trace.flops if trace is not None and trace.was_called else None,
    )


def _is_sharded(parameter: torch.Tensor) -> bool:
    # Importing DTensor costs; whoever shards has imported it.
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(parameter, tensors.DTensor)


@dataclass
class _Trace:
    """What was seen of one layer: shapes of its first call, operations of all calls."""

    flops: int = 0
    in_size: Any = None
    out_size: Any = None
    was_called: bool = False
    flops_before: list[int] = field(default_factory=list)


def _run(module: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> tuple[dict[str, _Trace], int]:
    """Run the module once; return what was seen of each layer, and the operations of all."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    traces = {name: _Trace() for name in layers if name}
    with ExitStack() as stack, restored_afterwards(module), torch.no_grad():
        for name, trace in traces.items():
            # A scripted module takes no hooks.
            if not isinstance(layers[name], torch.jit.ScriptModule):
                for hook in _watch(layers[name], trace, counter.get_total_flops):
                    stack.callback(hook.remove)
        module.eval()
        with _explained(), _uncompiled(), counter:
            positional, named = example_arguments(module, example)
            module(*positional, **named)
    return traces, counter.get_total_flops()


def _watch(layer: nn.Module, trace: _Trace, flops_so_far: Callable[[], int]) -> list[RemovableHandle]:
    def before(_: nn.Module, __: Any) -> None:
        trace.flops_before.append(flops_so_far())

    def after(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        started = trace.flops_before.pop()
        # A layer that calls itself is counted once, by its outermost call.
        if not trace.flops_before:
            trace.flops += flops_so_far() - started
        if not trace.was_called:
            inputs = [*args, *kwargs.values()]
            trace.in_size = _shapes(inputs[0] if len(inputs) == 1 else inputs)
            trace.out_size = _shapes(output)
            trace.was_called = True

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, with_kwargs=True)]


@contextmanager
def _uncompiled() -> Iterator[None]:
    # Importing dynamo costs seconds; whoever compiled something has imported it.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # The operation counter hooks all modules for this one run, which torch warns of in each compiled one.
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
        yield


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(
            "The module was run with its example input, for the summary. Mend or remove `example_input_array`; "
            "without it, sizes and operations are left out."
        )
        raise


@contextmanager
def restored_afterwards(module: nn.Module) -> Iterator[None]:
    """Put modes, buffers and the random state of torch, python and numpy back when the block ends."""
    modes = [(layer, layer.training) for layer in module.modules()]
    buffers = [
        (layer, name, buffer, buffer.clone())
        for layer in module.modules()
        if not isinstance(layer, torch.jit.ScriptModule)
        for name, buffer in layer.named_buffers(recurse=False, remove_duplicate=False)
        if not is_lazy(buffer)
    ]
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    python_state = random.getstate()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training
        with torch.no_grad():
            for layer, name, buffer, copy in buffers:
                layer._buffers[name] = buffer
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def example_arguments(module: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn an example input into positional and named arguments, on the module's device and in its precision.

    Args:
        module: the module that will be called.
        example: a tuple or list of positional arguments, a dict of named ones, or the only argument.
    """
    device = next((parameter.device for parameter in module.parameters()), None)
    floating = (parameter.dtype for parameter in module.parameters() if parameter.dtype.is_floating_point)
    dtype = next((kind for kind in floating if kind.itemsize >= 2), None)

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(move(item) for item in value))
        if isinstance(value, (tuple, list)):
            return type(value)(move(item) for item in value)
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        return value

    moved = move(example)
    if isinstance(moved, dict):
        return (), moved
    return (tuple(moved), {}) if isinstance(moved, (tuple, list)) else ((moved,), {})


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    if isinstance(value, (tuple, list)):
        shapes = [_shapes(item) for item in value]
        return shapes[0] if len(shapes) == 1 else shapes
    if isinstance(value, Mapping):
        return {key: _shapes(item) for key, item in value.items()}
    return "?"


def _size_text(size: Any) -> str:
    return "-" if size is None else str(size).replace("'", "")


def human_number(number: int | None) -> str:
    """``1.2 M`` for 1234567; whole numbers below a thousand as they are, ``-`` for ``None``."""
    if number is None:
        return "-"
    value, unit = float(number), 0
    # 999.96 would be shown as 1000.0.
    while value >= 999.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:,.1f} {_UNITS[unit]}" if unit else str(number)


def text_table(columns: list[str], cells: list[list[str]]) -> list[str]:
    """Lay out a table in plain ASCII: headings, a rule, one line for each row."""
    table = [columns, *cells]
    widths = [max(len(row[index]) for row in table) for index in range(len(columns))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]
