"""Metric objects over ranks: their states on the way to the others, and how `compute` sees those of all.

Torchmetrics' own synchronisation is not used here. It gathers each state by itself, needs all ranks to ask for the same metrics
in the same order, and takes a state of a rank without data for one of another shape or dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leyden.metrics_state import capture_metric_objects, is_metric, mapped, merged_object, set_state


def counted_updates(metric: Any) -> tuple[int, ...]:
    """How often a metric object and those inside of it were updated; nothing if it does not count."""
    own = getattr(metric, "update_count", None)
    if own is None:
        return ()
    inside = metric.modules() if isinstance(metric, nn.Module) else ()
    return (own, *(part.update_count for part in inside if is_metric(part)))


def sent_states(metric: Any) -> dict[str, Any]:
    """The states of a metric object and of those inside of it, by their dotted names, on the CPU: one copy for each dtype."""
    if not isinstance(metric, nn.Module):
        return {}
    objects: dict[str, Any] = capture_metric_objects(metric)["objects"]
    states = {name: {**own, "beside": {}} for name, own in objects.items()}
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor.detach())
        return tensor

    mapped(states, note)
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.dtype, tensor.device), []).append(index)
    for indices in groups.values():
        held = [tensors[index] for index in indices]
        flat = torch.cat([tensor.reshape(-1) for tensor in held]).cpu()
        for index, part in zip(indices, torch.split(flat, [tensor.numel() for tensor in held]), strict=True):
            tensors[index] = part.reshape(tensors[index].shape).clone()  # of a view, pickle would send all of ``flat``
    copies = iter(tensors)
    on_cpu: dict[str, Any] = mapped(states, lambda _: next(copies))
    return on_cpu


@contextmanager
def with_states_of_all(metric: Any, ranks: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Let a metric object have the states of all ranks within the ``with``; afterwards it has its own again.

    Args:
        metric: may be any object; only those of torchmetrics, itself or inside of it, are touched.
        ranks: from `sent_states`, in rank order.
    """
    inside = metric.named_modules() if isinstance(metric, nn.Module) else ()
    parts: list[tuple[str, Any]] = [(name, part) for name, part in inside if is_metric(part)]
    kept = []
    try:
        for name, part in parts:
            own = (*part.metric_state, "_update_count", "distributed_available_fn")
            kept.append((part, {each: getattr(part, each) for each in own}))
            part.distributed_available_fn = _alone
            part._computed = None  # there is no public way to have it compute again
            states = [rank[name] for rank in ranks if name in rank]
            if states:
                for key, value in merged_object(states, part._reductions).items():
                    set_state(part, key, value)
                part._update_count = sum(state["updates"] for state in states)
        yield
    finally:
        for part, values in kept:
            for each, value in values.items():
                setattr(part, each, value)


def copied_states(module: nn.Module) -> dict[str, Any]:
    """Copies of the states of all metric objects in the module, for `leyden.metrics_state.restore_metric_objects`."""
    state: dict[str, Any] = mapped(capture_metric_objects(module), lambda tensor: tensor.detach().clone())
    return state


def _alone() -> bool:
    return False
