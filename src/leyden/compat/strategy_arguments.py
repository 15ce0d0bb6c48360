"""The arguments of Lightning's strategies, as those of leyden's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from leyden.errors import ConfigurationError, reject, warn

# None in each is Lightning's default; leyden's strategies learn the rest from the Trainer
_OF_THE_TRAINER = {
    "accelerator": "Trainer(accelerator=…)",
    "parallel_devices": "Trainer(devices=…)",
    "cluster_environment": "Trainer(plugins=[…])",
    "precision_plugin": "Trainer(precision=…) or Trainer(plugins=[…])",
    "checkpoint_io": "ModelCheckpoint(dirpath=…): checkpoints have one format",
    "ddp_comm_wrapper": "ddp_comm_hook with a function that does what the wrapped one does",
    "model_averaging_period": "gradients, which are averaged in each step",
}
# switches of FSDP's first version: the second does so by itself, or has no need of it
_WITHOUT_EFFECT = (
    "use_orig_params",
    "limit_all_gathers",
    "sync_module_states",
    "forward_prefetch",
    "backward_prefetch",
)


def for_ranks(strategy: str, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments that all strategies of several ranks share.

    Args:
        strategy: its name, for messages.
        options: as they were given.

    Raises:
        ConfigurationError: for what belongs to the Trainer.
    """
    found = dict(options)
    for name, instead in _OF_THE_TRAINER.items():
        if found.pop(name, None) is not None:
            raise ConfigurationError(f"{strategy}({name}=…) is not supported. Use {instead}.")
    if found.get("start_method") == "popen":
        found["start_method"] = "script"
    return found


def for_ddp(options: dict[str, Any]) -> dict[str, Any]:
    """See `for_ranks`; and the communication hook."""
    found = for_ranks("DDPStrategy", options)
    _rename(found, {"ddp_comm_hook": "comm_hook", "ddp_comm_state": "comm_state"})
    return found


def for_fsdp(options: dict[str, Any]) -> dict[str, Any]:
    """See `for_ranks`; and policies, precision and the way to shard, of FSDP's first version.

    Raises:
        ConfigurationError: for a way to shard that is another strategy.
    """
    found = for_ranks("FSDPStrategy", options)
    for name in _WITHOUT_EFFECT:
        found.pop(name, None)
    kinds = found.get("activation_checkpointing")
    if isinstance(kinds, (type, list)):
        found["activation_checkpointing"] = {kinds} if isinstance(kinds, type) else set(kinds)
    _rename(found, {"auto_wrap_policy": "wrap_policy", "activation_checkpointing_policy": "activation_checkpointing"})
    for name in ("wrap_policy", "activation_checkpointing"):
        if callable(found.get(name)) and not isinstance(found[name], type):
            found[name] = _of_a_module(found[name])
    offload = found.get("cpu_offload")
    if offload is not None and hasattr(offload, "offload_params"):
        found["cpu_offload"] = bool(offload.offload_params)
    precision = found.get("mixed_precision")
    if precision is not None and hasattr(precision, "buffer_dtype"):
        from torch.distributed.fsdp import MixedPrecisionPolicy

        found["mixed_precision"] = MixedPrecisionPolicy(precision.param_dtype, precision.reduce_dtype)
    if found.pop("state_dict_type", None) == "full":
        _tell_of_folders("FSDPStrategy(state_dict_type='full')")
    if "sharding_strategy" in found:
        _set_sharding(found, found.pop("sharding_strategy"))
    return found


def for_model_parallel(options: dict[str, Any]) -> dict[str, Any]:
    """See `for_ranks`."""
    found = for_ranks("ModelParallelStrategy", options)
    if found.pop("save_distributed_checkpoint", True) is False:
        _tell_of_folders("ModelParallelStrategy(save_distributed_checkpoint=False)")
    return found


def _rename(options: dict[str, Any], names: dict[str, str]) -> None:
    for former, name in names.items():
        if former in options:
            value = options.pop(former)
            if name in options:
                raise ConfigurationError(f"{former} and {name} are the same argument. Give one of the two.")
            options[name] = value


def _of_a_module(policy: Callable[..., Any]) -> Callable[..., Any]:
    """FSDP's policies are also asked whether to look into a module, and how large it is; leyden's only whether it is a unit."""
    if "recurse" not in inspect.signature(policy).parameters:
        return policy

    def is_unit(module: nn.Module) -> bool:
        size = sum(each.numel() for each in module.parameters())
        return bool(policy(module=module, recurse=False, nonwrapped_numel=size))

    return is_unit


def _set_sharding(options: dict[str, Any], given: Any) -> None:
    """Torch's `ShardingStrategy`, or its name."""
    name = getattr(given, "name", given)
    if name == "NO_SHARD":
        reject(
            "sharding_strategy",
            name,
            "'FULL_SHARD', 'SHARD_GRAD_OP' or 'HYBRID_SHARD'; without shards it is DDPStrategy",
        )
    if name in ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2") and options.get("device_mesh") is None:
        raise ConfigurationError(
            f"sharding_strategy={name!r} needs device_mesh=(replicas, shards), for instance machines and GPUs of each."
        )
    if name not in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"):
        reject("sharding_strategy", given, "'FULL_SHARD', 'SHARD_GRAD_OP' or 'HYBRID_SHARD'")
    options["reshard_after_forward"] = name in ("FULL_SHARD", "HYBRID_SHARD")


def _tell_of_folders(given: str) -> None:
    warn(
        "sharded-checkpoint",
        f"{given} has no effect: checkpoints are folders of shards; leyden.load_checkpoint joins them.",
    )
