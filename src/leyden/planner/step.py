"""One training step of a fake model: what lives at its fullest moment, and what ranks would send."""

from __future__ import annotations

import contextlib
import fnmatch
import random
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from leyden.errors import ConfigurationError, LeydenWarning, reject
from leyden.flops import FlopCounter
from leyden.planner.copies import FakeModel, Parts
from leyden.planner.ledger import Kind, Ledger, Moment
from leyden.planner.sharded import ShardedUnits
from leyden.summary import example_arguments

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Divided:
    """How tensor parallelism would divide a model's layers.

    Attributes:
        columns: names of layers whose outputs are divided: dimension 0 of the weight, and the bias.
        rows: names of layers whose inputs are divided: dimension 1 of the weight; their outputs are added up over the ranks.
        reduced: bytes that are added up over the ranks in a step, forward and backward; None if no step was traced.
    """

    columns: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    reduced: int | None = None


@dataclass
class Step:
    """What a traced step has found.

    Attributes:
        moments: bytes by kind after each operation of the forward and the backward pass.
        divided: the layers of tensor parallelism.
        flops: floating point operations of the step.
        numbers_read: how many numbers were read and taken for 1.
    """

    moments: list[Moment]
    divided: Divided
    flops: int
    numbers_read: int


class Layers:
    """Finds out, while a model runs, which linear layers tensor parallelism would divide by columns and which by rows.

    A layer whose input every rank has whole is divided by columns; one whose input is divided already, by rows.

    Args:
        ledger: knows which activations are divided.
        model: the fake model.
        blocks: only linear layers inside of these parts are divided.
        plan: patterns of names, ``"columns"`` or ``"rows"`` each; None to find out.
    """

    def __init__(self, ledger: Ledger, model: FakeModel, blocks: list[str], plan: Mapping[str, str] | None) -> None:
        self._ledger = ledger
        self._roles: dict[str, str] = {} if plan is None else planned(model.module, plan)
        self._asked = plan is None
        self._inputs: list[weakref.ref[Any]] = []  # weakly: what is kept would be counted
        self.found = Divided(reduced=0)
        for name, part in model.module.named_modules():
            inside = isinstance(part, nn.Linear) and any(
                name == block or name.startswith(f"{block}.") for block in blocks
            )
            if name in self._roles or (self._asked and inside):
                part.register_forward_pre_hook(lambda layer, args, name=name: self._before(name, layer, args))
                part.register_forward_hook(lambda _, __, output, name=name: self._after(name, output))

    def _before(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        given = args[0]
        role = self._roles.setdefault(name, "rows" if self._ledger.is_divided(given) else "columns")
        names = self.found.columns if role == "columns" else self.found.rows
        if name not in names:
            names.append(name)
            for parameter_name, parameter in layer.named_parameters(recurse=False):
                if role == "columns" or parameter_name != "bias":
                    self._ledger.enter(parameter, Kind.DIVIDED_WEIGHT)
        # q, k and v read the same input, whose gradients are added up together
        storage = given.untyped_storage()
        if role == "columns" and given.requires_grad and not any(each() is storage for each in self._inputs):
            self._inputs.append(weakref.ref(storage))
            given.register_hook(lambda gradient: self._add(gradient.nbytes))

    def _after(self, name: str, output: Tensor) -> None:
        if self._roles[name] == "rows":
            self._ledger.enter(output, Kind.OTHER)
            self._add(output.nbytes)

    def _add(self, count: int) -> None:
        self.found.reduced = (self.found.reduced or 0) + count


def planned(module: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """The layers that the patterns of a tensor-parallel plan mean, with the role of each.

    Raises:
        ConfigurationError: for a role that is none, or a pattern that no layer with a weight of two dimensions has.
    """
    roles: dict[str, str] = {}
    for pattern, role in plan.items():
        if role not in ("columns", "rows"):
            reject(f"tensor_parallel_plan[{pattern!r}]", role, "'columns' or 'rows'")
        names = [
            name
            for name, part in module.named_modules()
            if fnmatch.fnmatchcase(name, pattern) and getattr(getattr(part, "weight", None), "ndim", 0) == 2
        ]
        if not names:
            raise ConfigurationError(
                f"tensor_parallel_plan: no layer with a weight of two dimensions is called {pattern!r}."
            )
        roles.update(dict.fromkeys(names, role))
    return roles


def without_a_step(model: FakeModel, blocks: list[str], plan: Mapping[str, str] | None) -> Divided:
    """How layers would be divided as far as their names tell; without a plan, each linear layer in a block by columns."""
    if plan is None:
        names = [
            name
            for name, part in model.module.named_modules()
            if isinstance(part, nn.Linear) and any(name == block or name.startswith(f"{block}.") for block in blocks)
        ]
        return Divided(columns=names)
    roles = planned(model.module, plan)
    columns, rows = ([name for name, role in roles.items() if role == wanted] for wanted in ("columns", "rows"))
    return Divided(columns, rows)


class _Counter(FlopCounter):  # type: ignore[no-untyped-call]
    """Lets a fake tensor say where it claims to be, which has no parts to be counted."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count it."""
        if func is torch.ops.prim.device.default:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def trace_step(
    model: FakeModel,
    batch: Any,
    context: AbstractContextManager[Any],
    *,
    parts: Parts,
    plan: Mapping[str, str] | None = None,
    loss: Loss | None = None,
    activation_checkpointing: bool = False,
    cast_batch: torch.dtype | None = None,
    reduce_size: int = 4,
) -> Step:
    """Run forward and backward of a fake model once.

    Args:
        model: which is used up: hooks are added to its module.
        batch: tensors of any device, in any structure.
        context: of the forward pass: autocast.
        parts: what is gathered, checkpointed and looked into for layers to divide.
        plan: of tensor parallelism.
        loss: a function of the module and the batch; None for ``training_step``, or a sum over the module's outputs.
        activation_checkpointing: whether the blocks keep only their inputs, and are run again in the backward pass.
        cast_batch: what the batch's floating-point tensors are cast to; None leaves them.
        reduce_size: bytes of an element of a gradient when FSDP reduces it.

    Raises:
        Exception: whatever a model raises that cannot run without numbers.
    """
    module = model.module
    ledger, counter = Ledger(), _Counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_undisturbed())
        stack.enter_context(_WholeOperations())
        stack.enter_context(model.mode)
        batch = tree_map(lambda leaf: _fake(leaf, model.device, cast_batch), batch)
        stack.enter_context(ledger)
        stack.enter_context(counter)
        for weight in (*module.parameters(), *module.buffers()):
            ledger.enter(weight, Kind.WEIGHT)
        for tensor in tree_leaves(batch):
            if isinstance(tensor, Tensor):
                ledger.enter(tensor, Kind.OTHER)
        if activation_checkpointing:
            _checkpoint(module, parts.blocks)
        layers = Layers(ledger, model, parts.blocks, plan)
        sharded = ShardedUnits(ledger, module, parts.units, reduce_size)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda each: sharded.accumulated(each, ledger.accumulated(each))
                )
        module.train()
        sharded.begin()
        with context:
            value = _loss(module, batch, loss)
        sharded.end_forward(value)
        value.backward()  # type: ignore[no-untyped-call]
        sharded.end()
    return Step(ledger.moments, layers.found, counter.flops, ledger.numbers_read)


def _loss(module: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    if loss is not None:
        value: Any = loss(module, batch)
    elif callable(getattr(module, "training_step", None)):
        value = module.training_step(batch, 0)  # type: ignore[operator]
        value = value["loss"] if isinstance(value, Mapping) else value
    else:
        positional, named = example_arguments(module, batch)
        output = module(*positional, **named)
        value = getattr(output, "loss", None)
        if value is None:
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
            value = leaves[0] if len(leaves) == 1 and leaves[0].ndim == 0 else sum(leaf.sum() for leaf in leaves)
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise ConfigurationError(f"the step gave {type(value).__name__} {value!r} and no loss to go backward from")
    return value


def _fake(leaf: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    kind = dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype
    return torch.empty(leaf.shape, dtype=kind, device=device, requires_grad=leaf.requires_grad)


def _checkpoint(module: nn.Module, blocks: list[str]) -> None:
    from torch.utils.checkpoint import checkpoint

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        # there is no random state to keep: nothing is drawn
        return lambda *args, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    for name in blocks:
        part = module.get_submodule(name)
        part.forward = again(part.forward)


class _WholeOperations(TorchFunctionMode):
    """Keeps the backward passes of SiLU and Mish whole, as they are on every device but for fake tensors.

    For those torch takes them apart, into operations with four tensors more.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call one function of torch's."""
        if func in (nn.functional.silu, nn.functional.mish) and len(args) == 1 and not (kwargs or {}).get("inplace"):
            return _Whole.apply(func, *args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, func: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return func(given)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, torch.empty_like(ctx.saved_tensors[0])


@contextlib.contextmanager
def _undisturbed() -> Any:
    """Keep the random state, and what a step tells without a Trainer, from whoever asked for a plan."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore", LeydenWarning)
            yield
    finally:
        random.setstate(state)
