"""A plan on paper: what training a model takes in memory and sends between ranks, without using either."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from leyden.errors import did_you_mean, reject
from leyden.planner.copies import check, parts_of, with_layers
from leyden.planner.plan import GIB, MemoryPlan, RankPlan
from leyden.planner.step import Loss
from leyden.planner.sums import Planner
from leyden.precision import Precision, resolve_precision

__all__ = ["MemoryPlan", "RankPlan", "plan_memory"]

STRATEGIES = ("single", "ddp", "fsdp", "tensor_parallel")


def plan_memory(
    model: nn.Module,
    *,
    optimizer: Any = None,
    precision: str | int | Precision = "32-true",
    batch: Any = None,
    devices: int | Sequence[int] = 8,
    strategies: Sequence[str] = STRATEGIES,
    device_memory_gib: float | None = None,
    reserve_gib: float = 2.0,
    activation_checkpointing: bool = False,
    bandwidth_gb_per_s: float | None = None,
    units: Sequence[type[nn.Module]] | None = None,
    tensor_parallel_plan: Mapping[str, str] | None = None,
    gradient_as_bucket_view: bool = True,
    reduce_dtype: torch.dtype | None = None,
    loss: Loss | None = None,
    device_type: str | None = None,
    verbose: bool = True,
) -> MemoryPlan:
    """Say what training takes on each rank, in memory and in communication, and print it as a table.

    Nothing is computed and no memory is used: a copy of the model, made of fake tensors, takes one step. docs/scaling.md says
    what each column means, how it was checked, and what is not in it.

    Args:
        model: on any device, the meta device included. A `LightningModule` without parameters has its ``configure_model``
            called, in a copy on the meta device. It is not changed.
        optimizer: a name in ``torch.optim`` such as "adamw"; a class, or a function of the parameters, that gives an optimizer;
            an optimizer over the model's parameters, or several. Default: the module's ``configure_optimizers``, or AdamW.
        precision: as of the Trainer.
        batch: of one rank; tensors of any device, the meta device included. A `LightningModule` has its ``training_step``
            called with it; another module is called with a tensor, with the members of a tuple, or by the names of a dict.
            A tuple of numbers is the shape of one tensor of floating-point numbers, a list of such tuples are several. Without it
            activations are left out.
        devices: number of ranks, or several numbers.
        strategies: of "single", "ddp", "fsdp" and "tensor_parallel".
        device_memory_gib: of one device, in GiB; without it the plan does not say what fits.
        reserve_gib: of it, what is kept for what is not counted: the device's context, libraries, fragmentation.
        activation_checkpointing: whether each block keeps its inputs only, and runs again in the backward pass.
        bandwidth_gb_per_s: what one rank can send while it receives as much, in 10^9 bytes per second; for the seconds.
        units: classes of the parts that FSDP gathers one at a time, and that are blocks. Default: units are what
            `FSDPStrategy` takes by itself, members of lists of modules with a million parameters or more; blocks are the
            members of each outermost ``ModuleList``, ``ModuleDict`` and ``Sequential`` that has several with parameters.
        tensor_parallel_plan: patterns of names of layers, with "columns" or "rows". Default: every ``nn.Linear`` in a block, by
            columns if every rank has its input whole, by rows if the input is divided.
        gradient_as_bucket_view: DDP's option; True is leyden's default, False torch's.
        reduce_dtype: what FSDP sends gradients in. Default: as leyden's, at least fp32.
        loss: a function of the module and the batch. Default: what ``training_step`` returns; or the model's output, its
            attribute ``loss``, or the sum of all that it returns.
        device_type: "cpu" or "cuda": whose operations are traced. Default: "cuda" if there is such a device, else "cpu".
        verbose: print the table.

    Returns:
        The plan, whose rows have all figures in bytes.

    Raises:
        ConfigurationError: for arguments that are not valid, parameters that have no shape yet or are divided already.
    """
    sizes = _sizes(devices, strategies)
    kind = resolve_precision(precision)
    device = _device(device_type)
    whole, built = with_layers(model, kind.parameter_dtype)
    check(whole)
    parts = parts_of(whole, units)
    planner = Planner(whole, optimizer, kind, device, parts, tensor_parallel_plan, reduce_dtype)
    planner.notes += ["configure_model was called, on the meta device."] if built else []
    if batch is None:
        planner.notes.append("No batch was given: activations are not in the peak.")
    else:
        planner.trace(_batch(batch), strategies, loss, activation_checkpointing)
    rows = [planner.row(strategy, size, gradient_as_bucket_view) for strategy in strategies for size in sizes[strategy]]
    if device_memory_gib is not None:
        room = (device_memory_gib - reserve_gib) * GIB
        rows = [replace(row, fits=_fits(row, room)) for row in rows]
        planner.notes.append(
            f"fits: into {device_memory_gib:g} GiB, {reserve_gib:g} GiB of them kept for what is not counted."
        )
    if bandwidth_gb_per_s is not None:
        rows = [
            replace(row, seconds=None if row.communication is None else row.communication / (bandwidth_gb_per_s * 1e9))
            for row in rows
        ]
        planner.notes.append(f"seconds: to send that at {bandwidth_gb_per_s:g} GB/s, if nothing hides it.")
    plan = replace(planner.plan(rows, activation_checkpointing), device_memory_gib=device_memory_gib)
    if verbose:
        _print(plan)
    return plan


def _sizes(devices: int | Sequence[int], strategies: Sequence[str]) -> dict[str, list[int]]:
    given = [devices] if isinstance(devices, int) else list(devices)
    if not given or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in given):
        reject("devices", devices, "a number of ranks, or several, each at least 1")
    if isinstance(strategies, str) or not strategies:
        reject("strategies", strategies, f"some of {', '.join(map(repr, STRATEGIES))}, in a list or tuple")
    for strategy in strategies:
        if strategy not in STRATEGIES:
            reject("strategies", strategy, ", ".join(map(repr, STRATEGIES)), did_you_mean(str(strategy), STRATEGIES))
    several = [size for size in given if size > 1]
    return {strategy: [1] if strategy == "single" else several for strategy in strategies}


def _device(device_type: str | None) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if device_type is None:
        device_type = "cuda" if has_cuda else "cpu"
    if device_type not in ("cpu", "cuda"):
        reject("device_type", device_type, "'cpu' or 'cuda'")
    if device_type == "cuda" and not has_cuda:
        # autograd aborts the whole process where it meets a device that torch was built without
        reject("device_type", device_type, "'cpu' where there is no CUDA device")
    return torch.device(device_type)


def _batch(batch: Any) -> Any:
    def is_shape(value: Any) -> bool:
        return isinstance(value, tuple) and bool(value) and all(isinstance(size, int) for size in value)

    if is_shape(batch):
        return torch.empty(batch, device="meta")
    if isinstance(batch, list) and batch and all(is_shape(each) for each in batch):
        return tuple(torch.empty(each, device="meta") for each in batch)
    return batch


def _fits(row: RankPlan, room: float) -> bool | None:
    if row.total > room:
        return False
    return None if row.activations is None or row.optimizer_state is None else True


def _print(plan: MemoryPlan) -> None:
    if sys.stdout.isatty():
        import rich

        rich.print(plan)
    else:
        print(plan)
