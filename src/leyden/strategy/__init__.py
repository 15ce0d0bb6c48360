"""How a run is spread over processes, and how they are started and found."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leyden.device import DeviceChoice, resolve_device
from leyden.errors import did_you_mean, reject, warn
from leyden.strategy.base import Layout, Strategy
from leyden.strategy.environments import Place, advice, at_prompt, check_place, find_place
from leyden.strategy.single import SingleDevice

if TYPE_CHECKING:
    from leyden.strategy.cluster import ClusterEnvironment

__all__ = ["Layout", "SingleDevice", "Strategy", "find_place", "gathered"]

# by name: the module, its class, and arguments
STRATEGIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "single_device": ("single", "SingleDevice", {}),
    "ddp": ("ddp", "DDPStrategy", {}),
    "ddp_spawn": ("ddp", "DDPStrategy", {"start_method": "spawn"}),
    "ddp_fork": ("ddp", "DDPStrategy", {"start_method": "fork"}),
    "ddp_notebook": ("ddp", "DDPStrategy", {"start_method": "fork"}),
    "hogwild": ("hogwild", "HogwildStrategy", {}),
    "deepspeed": ("deepspeed", "DeepSpeedStrategy", {}),
    "ddp_find_unused_parameters_true": ("ddp", "DDPStrategy", {"find_unused_parameters": True}),
    "fsdp": ("fsdp", "FSDPStrategy", {}),
    "fsdp_cpu_offload": ("fsdp", "FSDPStrategy", {"cpu_offload": True}),
    "model_parallel": ("model_parallel", "ModelParallelStrategy", {}),
}
_EXPORTS = {name: module for module, name, _ in STRATEGIES.values()}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def gathered(strategy: Strategy, data: Any, sync_grads: bool) -> Any:
    """`Strategy.all_gather` for every tensor in dicts, lists and tuples; what is no tensor stays as it is."""
    if isinstance(data, Mapping):
        return {key: gathered(strategy, value, sync_grads) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        parts = [gathered(strategy, value, sync_grads) for value in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    return strategy.all_gather(data, sync_grads) if isinstance(data, Tensor) else data


def resolve_ranks(
    accelerator: object,
    devices: object,
    strategy: object,
    num_nodes: int,
    environment: ClusterEnvironment | None = None,
) -> tuple[DeviceChoice, Strategy]:
    """From the Trainer's arguments and the environment: the devices of this machine, and the strategy for its ranks.

    Args:
        accelerator: the Trainer's, as the next three.
        devices: see `resolve_device`.
        strategy: see `resolve_strategy`.
        num_nodes: how many machines.
        environment: the launcher that the user named; None to look for one.

    Raises:
        ConfigurationError: see `resolve_device` and `resolve_strategy`.
    """
    place = find_place() if environment is None else environment.place()
    alone = advice() if place is None and environment is None else None
    if alone is not None and strategy != "single_device":
        warn("alone", alone)
    choice = resolve_device(accelerator, devices, place.local_world_size if place is not None else None)
    return choice, resolve_strategy(strategy, choice, num_nodes, place)


def resolve_strategy(strategy: object, choice: DeviceChoice, num_nodes: int, place: Place | None) -> Strategy:
    """Turn the Trainer's ``strategy`` argument into a `Strategy` that knows its ranks.

    Args:
        strategy: a name, or an object; "auto" is one device, or "ddp" where there are several ranks.
        choice: the devices of this machine.
        num_nodes: how many machines.
        place: who this process is, if ranks have been started already.

    Raises:
        ConfigurationError: for a name that is not known, a strategy that cannot have so many ranks, and where the environment
            says something else than the arguments.
    """
    layout = Layout(choice.devices, num_nodes, place)
    name = strategy
    if strategy == "auto":
        name = "ddp" if layout.world_size > 1 else "single_device"
    if isinstance(name, str) and name in STRATEGIES:
        module, kind, arguments = STRATEGIES[name]
        found: Strategy = getattr(importlib.import_module(f"{__name__}.{module}"), kind)(**arguments)
    elif isinstance(name, Strategy):
        found = name
    else:
        known = ["auto", *STRATEGIES]
        reject(
            "strategy",
            strategy,
            f"{', '.join(map(repr, known))}, or a leyden.strategy.Strategy",
            did_you_mean(str(strategy), known),
        )
    if isinstance(found, SingleDevice):
        if place is None and layout.world_size > 1:
            several = f"devices={len(choice.devices)}, num_nodes={num_nodes}"
            reject("strategy", strategy, f"one for several ranks, such as 'ddp', because of {several}")
        found.settle(replace(layout, num_nodes=1))
        return found
    if place is not None:
        check_place(place, choice.given, num_nodes)
        found.start_method = None
    elif layout.world_size == 1:
        found.start_method = None
    elif found.start_method is None:
        found.start_method = "fork" if at_prompt() else "script"
    found.settle(layout)
    return found
