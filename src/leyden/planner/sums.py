"""The sums: from a model, its traced steps and its optimizers to what each rank holds and sends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from leyden.errors import ConfigurationError
from leyden.planner.copies import FakeModel, Parts, fake_copy
from leyden.planner.plan import MemoryPlan, RankPlan
from leyden.planner.states import Optimizers, State
from leyden.planner.step import Loss, Step, trace_step, without_a_step
from leyden.precision import Precision
from leyden.summary import human_number


@dataclass
class _Peak:
    """The fullest moments of a traced step."""

    activations: int
    casts: int
    buffers: int
    peak: float


class Planner:
    """A model, its traced steps, and what follows from them for each strategy.

    Args:
        module: whose layers are there.
        optimizer: as of `leyden.plan_memory`.
        precision: what parameters are held and computed in.
        device: whose operations are traced.
        parts: names of what is gathered, or checkpointed, together.
        plan: of tensor parallelism; None to find one.
        reduce_dtype: what FSDP sends gradients in; None for what leyden's does.

    Attributes:
        notes: what is to be said below the table.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Any,
        precision: Precision,
        device: torch.device,
        parts: Parts,
        plan: Mapping[str, str] | None,
        reduce_dtype: torch.dtype | None,
    ) -> None:
        self._module, self._precision, self._device, self._parts, self._plan = module, precision, device, parts, plan
        self._model = fake_copy(module, device, precision.parameter_dtype)
        self._gathered = self._model if precision.compute_dtype is None else self._low_copy()
        self._reduce_size = 4 if reduce_dtype is None else reduce_dtype.itemsize
        if reduce_dtype is None and precision.parameter_dtype is torch.float64:
            self._reduce_size = 8
        self._optimizers = Optimizers(optimizer, self._model)
        self._divided = without_a_step(self._model, parts.blocks, plan)
        self._step: Step | None = None
        self._low_step: Step | None = None  # with the weights that FSDP's mixed precision gathers
        self._whole_state: State | None = None
        self.notes: list[str] = []

    def _low_copy(self) -> FakeModel:
        return fake_copy(self._module, self._device, self._precision.compute_dtype, sharded=True)

    def trace(self, batch: Any, strategies: Sequence[str], loss: Loss | None, checkpoint: bool) -> None:
        """Take a step; where the model cannot run without numbers, say so and go on without activations."""
        options: dict[str, Any] = {
            "parts": self._parts,
            "plan": self._plan,
            "loss": loss,
            "activation_checkpointing": checkpoint,
            "cast_batch": self._precision.parameter_dtype,
            "reduce_size": self._reduce_size,
        }
        precision, kind = self._precision, self._device.type
        try:
            step = None
            if precision.compute_dtype is not None and "fsdp" in strategies:
                step = self._low_step = trace_step(self._low_copy(), batch, precision.step_context(kind), **options)
            if step is None or set(strategies) != {"fsdp"}:
                model = fake_copy(self._module, self._device, precision.parameter_dtype)
                step = trace_step(model, batch, precision.step_context(kind), **options)
            self._step, self._divided = step, step.divided
            if step.numbers_read:
                self.notes.append("Numbers that the step reads with .item() were taken for 1.")
        except Exception as error:  # noqa: BLE001 a plan without activations is better than none, and says why
            why = str(error).strip().splitlines()
            self.notes.append(
                "Activations are not in the peak: the step could not be run without numbers "
                f"({type(error).__name__}: {why[0] if why else ''})."
            )

    def plan(self, rows: list[RankPlan], checkpoint: bool) -> MemoryPlan:
        """Put title and notes to the rows."""
        parameters = list(self._module.parameters())
        count = human_number(sum(parameter.numel() for parameter in parameters))
        optimizer = " and ".join(self._optimizers.names) or "no optimizer"
        default = " (default)" if self._optimizers.default else ""
        title = f"{type(self._module).__name__}: {count} parameters, {self._precision.name}, {optimizer}{default}"
        if checkpoint:
            title += ", activation checkpointing"
        if any(row.strategy == "tensor_parallel" for row in rows):
            shown = [row for row in rows if row.strategy == "tensor_parallel"]
            self.notes.append(self._tensor_parallel_note(shown[0]))
        if any(row.strategy == "fsdp" for row in rows):
            self.notes.append(f"fsdp: {len(self._parts.units)} units, and what is in none of them.")
        if self._step is not None and any(isinstance(part, nn.RNNBase) for part in self._module.modules()):
            self.notes.append("What the kernels of recurrent layers keep is not known: activations are more than that.")
        if self._step is not None and self._device.type == "cpu":
            self.notes.append("Traced with the operations of the CPU; a GPU's differ in places, see docs/scaling.md.")
        flops = None if self._step is None else self._step.flops
        return MemoryPlan(title, rows, self.notes, flops, self._divided.columns, self._divided.rows)

    def row(self, strategy: str, size: int, bucket_view: bool) -> RankPlan:
        """What one rank holds under a strategy."""
        shape = self._shape(strategy, size)
        parameters = self._model.parameters()
        weights = sum(math.prod(shape(each)) * each.element_size() for each in parameters)
        weights += sum(buffer.nbytes for buffer in self._model.module.buffers())
        gradients = sum(math.prod(shape(each)) * each.element_size() for each in parameters if each.requires_grad)
        state = self._state(strategy, shape)
        if strategy == "fsdp":
            peak = self._fsdp_peak(gradients)
        else:
            peak = self._whole_peak(strategy, size, gradients, bucket_view)
        kept, passing = (0, 0) if state is None else (state.kept, state.passing)
        buckets = gradients if strategy == "ddp" and not bucket_view else 0
        constant = weights + kept + buckets
        traced = self._low_step if strategy == "fsdp" and self._low_step is not None else self._step
        return RankPlan(
            strategy=strategy,
            world_size=size,
            parameters=weights,
            gradients=gradients,
            optimizer_state=None if state is None else kept,
            casts=peak.casts,
            activations=None if traced is None else peak.activations,
            buffers=peak.buffers + buckets,
            total=constant + max(math.ceil(peak.peak), gradients + passing),
            communication=self._communication(strategy, size),
        )

    def _state(self, strategy: str, shape: Callable[[nn.Parameter], tuple[int, ...]]) -> State | None:
        if strategy in ("single", "ddp") and self._whole_state is not None:
            return self._whole_state
        try:
            state = self._optimizers.state(shape, lambda parameter: parameter.dtype)
            if strategy in ("single", "ddp"):
                self._whole_state = state
            return state
        except ConfigurationError:
            raise
        except Exception as error:  # noqa: BLE001 as above
            note = f"The optimizer's state is not in the peak: {type(error).__name__}: {str(error).splitlines()[0]}"
            if note not in self.notes:
                self.notes.append(note)
            return None

    def _shape(self, strategy: str, size: int) -> Callable[[nn.Parameter], tuple[int, ...]]:
        if strategy == "fsdp":
            return lambda parameter: _divide(parameter.shape, 0, size)
        if strategy != "tensor_parallel":
            return lambda parameter: tuple(parameter.shape)
        dimensions: dict[int, int] = {}
        for names, dimension in ((self._divided.columns, 0), (self._divided.rows, 1)):
            for name in names:
                for key, parameter in self._model.module.get_submodule(name).named_parameters(recurse=False):
                    if dimension == 0 or key != "bias":
                        dimensions[id(parameter)] = dimension
        return lambda parameter: _divide(parameter.shape, dimensions.get(id(parameter)), size)

    def _whole_peak(self, strategy: str, size: int, gradients: int, bucket_view: bool) -> _Peak:
        moments = self._step.moments if self._step is not None else []
        part = size if strategy == "tensor_parallel" else 1
        activations = max((moment.other + moment.divided / part for moment in moments), default=0)
        casts = max((moment.casts + moment.divided_casts / part for moment in moments), default=0)
        # Gradients that are views of DDP's buckets live on from step to step.
        stays = strategy == "ddp" and bucket_view
        peak = max(
            (
                moment.other
                + moment.casts
                + (gradients if stays else moment.gradients)
                + (moment.divided + moment.divided_casts + (0 if stays else moment.divided_gradients)) / part
                for moment in moments
            ),
            default=gradients,
        )
        return _Peak(math.ceil(activations), math.ceil(casts), 0, peak)

    def _fsdp_peak(self, gradients: int) -> _Peak:
        step = self._low_step or self._step
        if step is None:
            without = self._fsdp_buffers_without_a_step()
            return _Peak(0, 0, without, gradients + without)
        trained = max((moment.gradients + moment.divided_gradients for moment in step.moments), default=0) or 1
        activations = casts = buffers = 0
        peak = 0.0
        for moment in step.moments:
            other, cast = moment.other + moment.divided, moment.casts + moment.divided_casts
            closed = moment.gradients + moment.divided_gradients - moment.open_gradients
            buffer = moment.unsharded + moment.gathered + moment.open_gradients + moment.reduced
            activations, casts, buffers = max(activations, other), max(casts, cast), max(buffers, buffer)
            peak = max(peak, other + cast + buffer + closed / trained * gradients)
        return _Peak(activations, casts, buffers, peak)

    def _fsdp_units(self) -> list[tuple[int, int, int]]:
        """Of each unit, and last of what is in none: bytes of parameters, of their gradients, and of these when reduced."""
        taken: set[int] = set()
        found = []
        for name in [*self._parts.units, ""]:
            part = self._gathered.module.get_submodule(name)
            own = [each for each in part.parameters() if id(each) not in taken]
            taken.update(map(id, own))
            trained = [each for each in own if each.requires_grad]
            reduced = self._reduce_size * sum(each.numel() for each in trained)
            found.append((sum(each.nbytes for each in own), sum(each.nbytes for each in trained), reduced))
        return found

    def _fsdp_buffers_without_a_step(self) -> int:
        *units, root = self._fsdp_units()
        # While a unit goes backward, the next one is gathered ahead, and gradients are copied to be reduced.
        largest = max((2 * gathered + trained + reduced for gathered, trained, reduced in units), default=0)
        return root[0] + max(largest, root[1] + root[2])

    def _communication(self, strategy: str, size: int) -> int | None:
        share = (size - 1) / size
        if strategy == "single":
            return 0
        if strategy == "ddp":
            trained = sum(each.nbytes for each in self._model.parameters() if each.requires_grad)
            return math.ceil(2 * share * trained)
        if strategy == "fsdp":
            units = self._fsdp_units()
            # What is in no unit stays gathered from the forward pass to the end of the backward pass.
            gathered = 2 * sum(unit[0] for unit in units) - units[-1][0]
            return math.ceil(share * (gathered + sum(unit[2] for unit in units)))
        return None if self._divided.reduced is None else math.ceil(2 * share * self._divided.reduced)

    def _tensor_parallel_note(self, row: RankPlan) -> str:
        if not self._divided.columns and not self._divided.rows:
            return "tensor_parallel: no linear layer in a list of blocks, so nothing is divided; give tensor_parallel_plan."
        shown = f"{_kinds(self._divided.columns)} by columns"
        if self._divided.rows:
            shown += f", {_kinds(self._divided.rows)} by rows"
        how = (
            "asked for" if self._plan is not None else "found" if self._step is not None else "a guess, without a batch"
        )
        return f"tensor_parallel: {shown} ({how})."


def _divide(shape: Sequence[int], dimension: int | None, size: int) -> tuple[int, ...]:
    # The first rank has the largest part: chunks are rounded up.
    if dimension is None or len(shape) <= dimension:
        return tuple(shape)
    return tuple(math.ceil(length / size) if index == dimension else length for index, length in enumerate(shape))


def _kinds(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
