"""FSDP: parameters, gradients and optimizer state are divided among the ranks, through torch's `fully_shard`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from leyden.errors import ConfigurationError, reject
from leyden.shards import is_sharded
from leyden.strategy.base import Layout
from leyden.strategy.sharding import ShardedStrategy, make_mesh, shard_rest
from leyden.strategy.sync_batchnorm import synchronise_batchnorm
from leyden.strategy.units import NORMALIZATIONS, Settling, by_size, choice_of, choose_units, post_order

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from leyden.module import LightningModule
    from leyden.precision import Precision
    from leyden.settings import Settings


class FSDPStrategy(ShardedStrategy):
    """`torch.distributed.fsdp.fully_shard` on parts of the module, and on the module itself for what is left.

    The module stays the user's own, without a wrapper around it; afterwards its parameters are DTensors. It is divided in
    `prepare_module`, unit by unit, so that no rank ever holds all of what `configure_model` builds on the meta device.

    Args:
        wrap_policy: which modules are units, gathered for their forward pass and freed after it: a set of classes, a function
            of a module, "auto" for the layers of a million parameters and more in lists of modules, or None for one unit.
        mixed_precision: a `torch.distributed.fsdp.MixedPrecisionPolicy`; None follows the Trainer's precision: under
            "bf16-mixed" and "16-mixed" parameters are gathered in 16 bits (those of normalization layers in 32) and gradients
            are reduced in fp32, under "bf16-true" and "16-true" gradients are reduced in fp32.
        cpu_offload: keep parameters, gradients and optimizer state in the memory of the host, and step there.
        reshard_after_forward: free a unit after its forward pass and gather it again for the backward pass; False saves the
            second gathering and needs more memory; a number gathers from so many ranks only.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them: True for the units,
            a set of classes, or a function of a module.
        device_mesh: (replicas, shards): divide among groups of ``shards`` ranks each, and average over ``replicas`` of them
            (HSDP); or a `torch.distributed.device_mesh.DeviceMesh` of one or two dimensions.
        no_sync_accumulation: reduce gradients once per window of accumulated batches (default), for which each rank keeps whole
            gradients; False reduces them in each backward pass, and keeps parts.
        **options: of `DistributedStrategy`.

    Raises:
        ConfigurationError: an argument is not one of the above.

    Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """

    def __init__(
        self,
        *,
        wrap_policy: Any = None,
        mixed_precision: MixedPrecisionPolicy | None = None,
        cpu_offload: bool = False,
        reshard_after_forward: bool | int = True,
        activation_checkpointing: Any = None,
        device_mesh: DeviceMesh | tuple[int, int] | None = None,
        no_sync_accumulation: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, value in (("cpu_offload", cpu_offload), ("no_sync_accumulation", no_sync_accumulation)):
            if not isinstance(value, bool):
                reject(name, value, "True or False")
        if isinstance(device_mesh, tuple) and not (
            len(device_mesh) == 2 and all(type(size) is int and size > 0 for size in device_mesh)
        ):
            reject("device_mesh", device_mesh, "(replicas, shards), a DeviceMesh, or None")
        self.wrap_policy = choice_of("wrap_policy", wrap_policy, (None, "auto"))
        self.mixed_precision = mixed_precision
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.activation_checkpointing = choice_of(
            "activation_checkpointing", activation_checkpointing or None, (None, True)
        )
        self.device_mesh: Any = device_mesh
        self.no_sync_accumulation = no_sync_accumulation
        if self.activation_checkpointing is True and wrap_policy is None:
            raise ConfigurationError(
                "activation_checkpointing=True checkpoints the units, and wrap_policy=None makes none. Give wrap_policy, or the "
                "classes to checkpoint."
            )

    def settle(self, layout: Layout) -> None:
        """See `Strategy.settle`."""
        super().settle(layout)
        mesh = self.device_mesh
        if isinstance(mesh, tuple) and mesh[0] * mesh[1] != self.world_size:
            raise ConfigurationError(
                f"FSDPStrategy(device_mesh={mesh}) is for {mesh[0] * mesh[1]} ranks, and there are {self.world_size}."
            )
        if self.cpu_offload and self.device.type == "cuda" and self.process_group_backend is None:
            self.process_group_backend = "cpu:gloo,cuda:nccl"  # gradients are clipped where they are

    def build(self) -> None:
        """Make the device mesh."""
        if self.device_mesh is None:
            self.device_mesh = make_mesh(self.device, (self.world_size,), ("shard",))
        elif isinstance(self.device_mesh, tuple):
            self.device_mesh = make_mesh(self.device, self.device_mesh, ("replicate", "shard"))

    # The module

    def model_context(self, module: LightningModule) -> AbstractContextManager[Any]:
        """New modules come on the meta device: without memory."""
        return torch.device("meta")

    def prepare_module(self, module: LightningModule, settings: Settings) -> None:
        """Make what is on the meta device, give all ranks the weights of rank 0, and keep this rank's part: unit by unit.

        Raises:
            ConfigurationError: for a module that cannot be divided, or that has no values.
        """
        if all(is_sharded(each) for each in module.parameters()) and any(True for _ in module.parameters()):
            return  # in an earlier verb
        synchronise_batchnorm(module, settings, self.world_size, self.device)
        choice = by_size(module) if self.wrap_policy == "auto" else self.wrap_policy
        units, why_not = choose_units(module, choice) if choice is not None else ([], [])
        settings.reasons += [("wrap_policy", line) for line in why_not]
        if choice is not None and not units:
            settings.reasons.append(("wrap_policy", "no module was chosen, so the whole module is one unit"))
        checkpointed = self.activation_checkpointing
        if checkpointed is not None:
            _checkpoint_activations(units if checkpointed is True else filter(checkpointed, list(module.modules())))
        settling, shard = Settling(module, self.device), self._sharding(settings.precision)
        known = set(map(id, units))
        for part in post_order(module):
            settling.settle(part)
            if id(part) in known:
                settling.finish(part)
                # torch's own None frees all but the outermost unit, which would be gathered again at once
                shard(part, None if self.reshard_after_forward is True else self.reshard_after_forward)
        settling.finish(module)
        shard_rest(module, lambda unit: shard(unit, None))

    def _sharding(self, precision: Precision) -> Callable[[nn.Module, bool | int | None], None]:
        """What shards one unit, after those inside of it."""
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            FSDPModule,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        policy = self.mixed_precision
        follows = policy is None and precision.compute_dtype is not None
        if follows:
            # autocast, which the step runs in, casts the inputs
            policy = MixedPrecisionPolicy(precision.compute_dtype, torch.float32, None, cast_forward_inputs=False)
        elif policy is None and precision.parameter_dtype in (torch.float16, torch.bfloat16):
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        elif policy is None:
            policy = MixedPrecisionPolicy()
        on_cuda = self.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_cuda) if self.cpu_offload else OffloadPolicy()
        options: dict[str, Any] = {"mesh": self.device_mesh, "offload_policy": offload}

        def shard(unit: nn.Module, reshard: bool | int | None) -> None:
            apart: list[nn.Module] = []
            if follows:
                apart = [
                    part for part in unit.modules() if isinstance(part, NORMALIZATIONS) and _has_whole_parameters(part)
                ]
            # they compute with statistics in fp32, and need their parameters so
            if apart:
                first = apart if len(apart) > 1 else apart[0]
                fully_shard(
                    first, mp_policy=replace(policy, param_dtype=None), reshard_after_forward=reshard, **options
                )
            if not isinstance(unit, FSDPModule):
                fully_shard(unit, mp_policy=policy, reshard_after_forward=reshard, **options)

        return shard


def _has_whole_parameters(module: nn.Module) -> bool:
    return any(not is_sharded(parameter) for parameter in module.parameters(recurse=False))


def _checkpoint_activations(modules: Iterable[nn.Module]) -> None:
    """Let the forward passes of modules be computed again in the backward pass; nothing if they are already."""
    from torch.utils.checkpoint import checkpoint

    for module in modules:
        if "forward" not in vars(module):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
