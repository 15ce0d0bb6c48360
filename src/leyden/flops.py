"""Floating point operations of real work, counted while it runs: nothing is computed twice, no random number is drawn."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from leyden.data.transfer import batch_size_of
from leyden.errors import MetricError, reject

Flops = float | Callable[[Any], float] | Literal[False] | None
Formula = Callable[..., int]


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating point operations of what runs inside of it, in the forward pass and in the backward pass.

    The operations run as they are, by torch's own kernels, so that results, gradients and random numbers stay the same. A
    multiplication and an addition count as two. Matrix products, convolutions, attention and recurrent layers count; what
    is done element by element counts nothing, as is the custom where utilisation is compared. The formulas are those of
    `torch.utils.flop_counter`, but for attention, whose backward pass counts twice its forward pass, without the scores that a
    fused kernel computes again; for the weights of convolutions in groups; and for recurrent layers, which it has none for.
    Unlike `torch.utils.flop_counter.FlopCounterMode` this runs only one branch of a ``torch.cond``, and counts none.

    Attributes:
        flops: counted so far.
        paused: whether nothing is counted now.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.paused = False
        self._formulas = _formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count it."""
        kwargs = kwargs or {}
        formula = self._formulas.get(getattr(func, "overloadpacket", func))
        if formula is None and isinstance(func, torch._ops.OpOverload):
            # In inference mode an operation such as `linear` arrives whole; its parts have the formulas.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if formula is not None and not self.paused:
            try:
                self.flops += formula(*args, **kwargs, out_val=output)
            except Exception:  # noqa: BLE001 a formula that does not know some shape must not end a run
                return output
        return output


@cache
def _formulas() -> dict[Any, Formula]:
    from torch.utils.flop_counter import flop_registry  # costs; few runs count

    aten = torch.ops.aten
    attention = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    own: dict[Any, Formula] = {
        aten.convolution_backward: _convolution_backward,
        aten._cudnn_rnn: _cudnn_rnn,
        aten._cudnn_rnn_backward: lambda *args, **_: 2 * _cudnn_rnn(*args),
        aten.mkldnn_rnn_layer: _mkldnn_rnn,
        aten.mkldnn_rnn_layer_backward: lambda *args, **_: 2 * _mkldnn_rnn(*args),
    }
    for name in attention:
        own[getattr(aten, f"_scaled_dot_product_{name}")] = _attention
        own[getattr(aten, f"_scaled_dot_product_{name}_backward")] = lambda _, *args, **__: 2 * _attention(*args)
    return {**flop_registry, **own}


def _convolution_backward(gradient: Any, inputs: Any, weight: Any, *rest: Any, **_: Any) -> int:
    # Each gradient costs what the forward pass does; torch's formula for that of the weights does not know groups.
    _bias_sizes, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = rest
    points = math.prod((inputs if transposed else gradient).shape[2:])
    return int(2 * inputs.shape[0] * points * weight.numel() * sum(wanted[:2]))


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # Scores and their product with the values. A causal mask is not taken into account, as in the PaLM paper's utilisation
    # (https://arxiv.org/abs/2204.02311, appendix B).
    return int(2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _cudnn_rnn(inputs: Any, weights: Any, *_: Any, **__: Any) -> int:
    # Every element of every matrix meets each position once, in all layers and directions; biases are vectors.
    return int(2 * math.prod(inputs.shape[:-1]) * sum(weight.numel() for weight in weights if weight.dim() == 2))


def _mkldnn_rnn(inputs: Any, input_weight: Any, hidden_weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(inputs.shape[:-1]) * (input_weight.numel() + hidden_weight.numel()))


class Load(NamedTuple):
    """What one batch amounts to.

    Attributes:
        samples: how many samples it holds.
        tokens: how many tokens or other items, if somebody counts them.
        flops: floating point operations of its forward and backward pass, if they are known.
    """

    samples: int
    tokens: int | None = None
    flops: float | None = None


class Workload:
    """Finds out what batches amount to.

    Args:
        batch_size_fn: samples of a batch; default: `leyden.data.batch_size_of`.
        length_fn: tokens, or other items, of a whole batch; None counts none.
        flops: floating point operations of a training batch, forward and backward: a number, a function of the batch,
            None to take the module's ``flops_per_batch`` or else to count them while the first batch is trained on, or False
            to do without. What was counted is converted to other batches by their tokens, or else by their samples.

    Attributes:
        counts_next: whether the operations of the next batch are to be counted.
        why_not: why operations cannot be counted, to be told to users; an empty string if they can.
        flops_per_unit: counted operations per token, or per sample where tokens are not counted; None if nothing was.

    Raises:
        ConfigurationError: for arguments of another kind.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        flops: Flops = None,
    ) -> None:
        for name, value in (("batch_size_fn", batch_size_fn), ("length_fn", length_fn)):
            if value is not None and not callable(value):
                reject(name, value, "a function of the batch that returns a number, or None")
        given = isinstance(flops, int | float) and not isinstance(flops, bool)
        if not (flops is None or flops is False or callable(flops) or (given and flops > 0)):
            reject("flops", flops, "a number > 0, a function of the batch, None to count them, or False to do without")
        self._batch_size_fn = batch_size_fn
        self._length_fn = length_fn
        self._flops = flops
        self._module: Any = None
        self._asks_module = False
        self._looked = False
        self._counter: FlopCounter | None = None
        self._hooks: list[RemovableHandle] = []
        self.counts_next = False
        self.why_not = ""
        self.flops_per_unit: float | None = None

    def prepare(self, module: nn.Module) -> None:
        """Decide whether the operations of the first batch are to be counted.

        Args:
            module: what will be trained.
        """
        self._module, self.why_not = module, ""
        # asked for here, because a module takes long to say that it has no such attribute
        self._asks_module = self._flops is None and getattr(module, "flops_per_batch", None) is not None
        self.counts_next = self._flops is None and not self._asks_module and self.flops_per_unit is None

    def before_batch(self, is_graph: bool = False) -> None:
        """Begin to count a batch, if `counts_next` says so and it can be done.

        Args:
            is_graph: whether the batch will be trained on by a graph of the whole step, ``Trainer(compile=...)``.
        """
        self.abandon()  # of a batch that a hook has skipped
        if not self.counts_next or self._module is None:
            return
        if is_graph or is_compiled(self._module):
            self.counts_next = False
            self.why_not = (
                "not counted: the first batch is compiled, and counting would run it uncompiled; pass flops=, or give the "
                "module an attribute flops_per_batch"
            )
            return
        counter = self._counter = FlopCounter()

        def pause(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # An optimizer that is given a closure trains in its step; the products of others (Muon) are not the model's.
            counter.paused = kwargs.get("closure", args[1] if len(args) > 1 else None) is None

        def go_on(*_: Any) -> None:
            counter.paused = False

        self._hooks = [register_optimizer_step_pre_hook(pause), register_optimizer_step_post_hook(go_on)]
        counter.__enter__()  # type: ignore[no-untyped-call]

    def after_batch(self, batch: Any, trained: bool = True) -> Load:
        """Say what a batch amounts to, and end counting it.

        Args:
            batch: as the step was given it.
            trained: whether it was trained on; else its operations are not known.
        """
        counted = 0 if self._counter is None else self.abandon()
        samples = self._samples(batch)
        tokens = None if self._length_fn is None else int(self._length_fn(batch))
        units = samples if tokens is None else tokens
        if counted and units and trained:
            self.flops_per_unit, self.counts_next = counted / units, False
        return Load(samples, tokens, self._flops_of(batch, units) if trained else None)

    def abandon(self) -> int:
        """End counting, whatever became of the batch; return what was counted."""
        counter, self._counter = self._counter, None
        while self._hooks:
            self._hooks.pop().remove()
        if counter is None:
            return 0
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return counter.flops

    def _samples(self, batch: Any) -> int:
        if self._batch_size_fn is not None:
            return int(self._batch_size_fn(batch))
        first = batch[0] if type(batch) in (list, tuple) and batch else batch
        if self._looked and isinstance(first, Tensor) and first.dim():
            return first.shape[0]  # what batch_size_of would say, which has looked for contradictions once
        try:
            self._looked = True
            return batch_size_of(batch)
        except MetricError as error:
            raise MetricError(
                f"Cannot find the number of samples in a batch of type {type(batch).__name__}. Pass batch_size_fn=, a "
                "function of the batch."
            ) from error

    def _flops_of(self, batch: Any, units: int) -> float | None:
        if self._flops is False:
            return None
        if callable(self._flops):
            return float(self._flops(batch))
        if self._flops is not None:
            return float(self._flops)
        if self._asks_module:
            return float(self._module.flops_per_batch)
        return None if self.flops_per_unit is None else self.flops_per_unit * units


def begins_as_graph(trainer: Any) -> bool:
    """Whether ``Trainer(compile=...)`` trains on the next batch by graphs.

    Where the whole step becomes a graph, the optimizer's first step is eager; where only parts of it do, no batch is.
    """
    return trainer.compilation is not None and trainer.compilation.trains_compiled


def is_compiled(module: nn.Module) -> bool:
    """Whether the module, or a part of it, was given to `torch.compile`."""
    dynamo = sys.modules.get("torch._dynamo")  # whoever compiled something has imported it, which costs seconds
    if dynamo is None:
        return False
    return any(
        isinstance(part, dynamo.OptimizedModule) or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Any], loss_fn: Callable[[Any], Tensor] | None = None
) -> int:
    """Count the floating point operations of one forward pass, and of the backward pass if there is a loss.

    On the meta device, where nothing is computed, this costs next to nothing.

    Args:
        model: accepted for compatibility; what ``forward_fn`` runs is what counts.
        forward_fn: runs the model.
        loss_fn: makes of its result a loss, whose ``backward`` is then counted as well.
    """
    with FlopCounter() as counter:
        output = forward_fn()
        if loss_fn is not None:
            loss_fn(output).backward()  # type: ignore[no-untyped-call]
    total: int = counter.flops
    return total
