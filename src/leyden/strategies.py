"""The strategies as objects, for ``Trainer(strategy=DDPStrategy(find_unused_parameters=True))``; see `leyden.strategy`.

Those in here take the arguments of Lightning's as well: ``FSDPStrategy(auto_wrap_policy={Block})``.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

from leyden.errors import no_such_name
from leyden.strategy import ddp, fsdp, model_parallel
from leyden.strategy.base import Strategy
from leyden.strategy.deepspeed import DeepSpeedStrategy
from leyden.strategy.distributed import DistributedStrategy as ParallelStrategy
from leyden.strategy.hogwild import HogwildStrategy
from leyden.strategy.single import SingleDevice as SingleDeviceStrategy

__all__ = [
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "HogwildStrategy",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "Strategy",
]

_ABSENT = {
    "SingleDeviceXLAStrategy": "one TPU core is SingleDeviceStrategy, with accelerator='tpu'",
    "XLAStrategy": "several TPU cores are not supported yet; see docs/tpu.md",
    "StrategyRegistry": "strategy='…' takes the names that an unknown name's error lists",
    "DataParallelStrategy": "one process with several GPUs was slower than DDP; use strategy='ddp'",
    "DDPSpawnStrategy": "write DDPStrategy(start_method='spawn')",
}


def __getattr__(name: str) -> object:
    return no_such_name(__name__, name, _ABSENT)


class _StandsFor(ABCMeta):
    """``isinstance(trainer.strategy, DDPStrategy)`` holds for the Trainer's own, which strategy="ddp" has made, as well."""

    def __instancecheck__(cls, instance: Any) -> bool:
        is_here = cls.__module__ == __name__
        return isinstance(instance, cls.__bases__[0]) if is_here else super().__instancecheck__(instance)


class DDPStrategy(ddp.DDPStrategy, metaclass=_StandsFor):
    """`leyden.strategy.ddp.DDPStrategy`, whose ``comm_hook`` may be called ``ddp_comm_hook``."""

    def __init__(self, **options: Any) -> None:
        from leyden.compat.strategy_arguments import for_ddp

        super().__init__(**for_ddp(options))


class FSDPStrategy(fsdp.FSDPStrategy, metaclass=_StandsFor):
    """`leyden.strategy.fsdp.FSDPStrategy`, whose ``wrap_policy`` may be called ``auto_wrap_policy``, and so on.

    ``sharding_strategy``, ``activation_checkpointing_policy``, ``cpu_offload`` and ``mixed_precision`` may be what FSDP's first
    version has.
    """

    def __init__(self, **options: Any) -> None:
        from leyden.compat.strategy_arguments import for_fsdp

        super().__init__(**for_fsdp(options))


class ModelParallelStrategy(model_parallel.ModelParallelStrategy, metaclass=_StandsFor):
    """`leyden.strategy.model_parallel.ModelParallelStrategy`."""

    def __init__(self, **options: Any) -> None:
        from leyden.compat.strategy_arguments import for_model_parallel

        super().__init__(**for_model_parallel(options))
