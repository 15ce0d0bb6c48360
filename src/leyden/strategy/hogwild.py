"""Hogwild: ranks train one set of parameters in shared memory, without locks and without waiting for each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from leyden.errors import ConfigurationError, reject
from leyden.precision import default_dtype
from leyden.strategy.base import Layout
from leyden.strategy.distributed import DistributedStrategy

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.run import Evaluation, Run
    from leyden.settings import Settings

_METHODS = ("fork", "spawn", "forkserver")


class HogwildStrategy(DistributedStrategy):
    """Lock-free asynchronous training on the CPU: for models whose batches change few of the weights each.

    The parameters and buffers of the module lie in memory that all ranks share. Each rank reads its own part of the data,
    computes gradients of the weights as they are at that moment, and steps an optimizer of its own, while others do the same. A
    write may overwrite another's: the result differs from run to run, and there is no gradient to send.

    - The batch size is a rank's: each of its batches is a step, so N ranks make N times the steps of one with N times the batch.
      `global_step`, ``max_steps`` and schedulers count the steps of one rank.
    - Ranks wait for each other before validation, at the end of an epoch and at checkpoints, so that weights stand still there.
    - Buffers are shared too: BatchNorm's statistics are written by all ranks, as its weights are.
    - Optimizers' state, such as momentum, is each rank's own. A checkpoint has that of rank 0, with which all of them go on.
    - After a failure the module has the weights as they were when the ranks ended.

    Args:
        start_method: "fork" (default), "spawn" or "forkserver". Ranks must be made from the process that has the module, so there
            is no "script", and no torchrun.
        timeout: how long a rank waits where all of them meet.
        log_dir: see `DistributedStrategy`.

    Raises:
        ConfigurationError: for other start methods; and in the Trainer for ranks that were started by a launcher, several
            machines, or devices that are not the CPU.

    Source: Niu, Recht, Ré, Wright, 2011, https://arxiv.org/abs/1106.5730
    """

    in_step = False
    shares_weights = True

    def __init__(
        self, *, start_method: str = "fork", timeout: timedelta = timedelta(minutes=30), log_dir: str | None = None
    ) -> None:
        if start_method not in _METHODS:
            known = (
                f"{', '.join(map(repr, _METHODS))}; the memory that Hogwild's ranks share must come from one process"
            )
            reject("start_method", start_method, known)
        super().__init__(start_method=start_method, timeout=timeout, log_dir=log_dir)

    def settle(self, layout: Layout) -> None:
        """See `Strategy.settle`.

        Raises:
            ConfigurationError: if these ranks cannot share memory.
        """
        if layout.place is not None and self.layout is None and layout.world_size > 1:
            raise ConfigurationError(
                "strategy='hogwild' cannot use ranks that a launcher has started, because the weights lie in memory of the "
                "process that starts them. Run the script without torchrun or srun, with devices=N."
            )
        if layout.num_nodes > 1:
            reject("num_nodes", layout.num_nodes, "1 with strategy='hogwild': machines do not share memory")
        if layout.device.type != "cpu":
            reject("accelerator", layout.device.type, "'cpu' with strategy='hogwild'")
        super().settle(layout)

    def connect(self) -> None:
        """See `Strategy.connect`. One rank alone has nobody to meet."""
        if self.world_size > 1:
            super().connect()

    def before_start(self, module: LightningModule, settings: Settings) -> None:
        """Bring the module into shared memory, in its final form.

        Raises:
            ConfigurationError: for settings that Hogwild cannot follow, and parameters that do not exist yet.
        """
        _refuse(settings)
        with default_dtype(settings.precision.parameter_dtype):
            module.configure_model()
        settings.precision.convert_module(module)
        for name, parameter in module.named_parameters():
            if is_lazy(parameter):
                raise ConfigurationError(
                    f"{name} has no shape before its first batch, so it cannot lie in shared memory. Give the layer its sizes, "
                    "or call the module once before fit."
                )
            parameter.grad = None  # each rank has gradients of its own
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data.share_memory_()  # type: ignore[no-untyped-call]

    def prepare_module(self, module: LightningModule, settings: Settings) -> None:
        """Check that the module still lies in shared memory.

        Raises:
            ConfigurationError: naming a parameter that does not.
        """
        for name, parameter in module.named_parameters() if self.world_size > 1 else ():
            if not parameter.is_shared():  # type: ignore[no-untyped-call]
                raise ConfigurationError(
                    f"{name} was made in the ranks, in setup() or by a callback, so they do not share it. Make it in __init__ or "
                    "configure_model, which is called before the ranks are started, and again in them: it must leave what is "
                    "there."
                )

    def wrap_training_step(self, module: LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``step``."""
        return step

    def wire(self, run: Run, settings: Settings, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Have ranks wait for each other at an epoch's end, so that its hooks see weights that stand still."""
        if self.world_size > 1:
            run.hooks.on_train_epoch_end = (self.barrier, *run.hooks.on_train_epoch_end)
        return optimizers

    def wire_evaluation(self, evaluation: Evaluation) -> None:
        """Have ranks wait for each other before an evaluation, so that it sees weights that stand still."""
        evaluation.hooks.start = (self.barrier, *evaluation.hooks.start)

    def load_module(self, module: nn.Module, state_dict: dict[str, Any], strict: bool) -> None:
        """See `Strategy.load_module`. Nobody goes on before all have written the same values."""
        super().load_module(module, state_dict, strict)
        self.barrier("load_module")


def _refuse(settings: Settings) -> None:
    """Refuse what makes ranks wait for each other, or would leave weights half-way."""
    for name, value, why in (
        (
            "sync_batchnorm",
            settings.sync_batchnorm,
            "ranks do not meet in a step; BatchNorm's statistics are shared as they are",
        ),
        ("nan_policy", settings.nan_policy, "ranks would compare in each step"),
        ("max_restarts", settings.max_restarts, "the weights are shared with the ranks that failed"),
        ("compile", settings.compile, "a graph has weights of its own"),
    ):
        if value:
            raise ConfigurationError(f"{name}={value!r} does not go with strategy='hogwild': {why}. Leave it out.")
