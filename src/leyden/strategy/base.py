"""What the engine asks of a strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from leyden.module import LightningModule
    from leyden.run import Evaluation, Run
    from leyden.settings import Settings
    from leyden.strategy.environments import Place


@dataclass(frozen=True)
class Layout:
    """Where the ranks of a run are to be.

    Attributes:
        devices: those of this machine, one for each of its ranks.
        num_nodes: how many machines.
        place: who this process is, if somebody has started the ranks already; None if they are to be started, or if there is
            only one.
    """

    devices: tuple[torch.device, ...]
    num_nodes: int = 1
    place: Place | None = None

    @property
    def world_size(self) -> int:
        """Ranks on all machines."""
        return self.place.world_size if self.place is not None else len(self.devices) * self.num_nodes

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        local_rank = self.place.local_rank if self.place is not None else 0
        return self.devices[min(local_rank, len(self.devices) - 1)]


class Strategy(ABC):
    """How the ranks of a run share its work: who they are, how they talk, what becomes of the module. A rank is a process.

    One object belongs to one `Trainer`, which calls `settle` when it is made and `connect` when a verb begins.

    Attributes:
        world_size: how many ranks there are.
        global_rank: the number of this one.
        local_rank: its number on its machine.
        node_rank: the number of its machine.
        device: where its steps run.
        start_method: how ranks are started that nobody has started: "script" runs the program again in each, "spawn" and
            "fork" call the verb in new processes; None if there is nothing to start.
        in_step: whether ranks wait for each other in each step, so that what one of them asks for can be agreed on there.
        communicates_in_forward: whether a forward pass needs all ranks, as where parameters are sharded.
        shares_weights: whether ranks train one and the same memory.
        shards_state: whether each rank holds a part of the module, so that all of them write a checkpoint together.
        host_group: the process group by which the hosts talk, on the CPU; None before `connect`, and for one process.
        device_mesh: torch's `DeviceMesh`, of strategies that divide parameters over one.
    """

    world_size: int = 1
    global_rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    device: torch.device
    start_method: str | None = None
    in_step: bool = True
    communicates_in_forward: bool = False
    shares_weights: bool = False
    shards_state: bool = False
    host_group: ProcessGroup | None = None
    device_mesh: Any = None

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes logs and files."""
        return self.global_rank == 0

    @property
    def root_device(self) -> torch.device:
        """The device of this process, under the name that programs know."""
        return self.device

    @property
    def data_world_size(self) -> int:
        """Over how many ranks the samples are divided."""
        return self.world_size

    @property
    def data_rank(self) -> int:
        """The number of this rank among those; ranks that compute one sample together have the same."""
        return self.global_rank

    # Its life

    @abstractmethod
    def settle(self, layout: Layout) -> None:
        """Learn which ranks there are, without talking to them."""

    def before_start(self, module: LightningModule, settings: Settings) -> None:
        """Prepare the module in the process that starts the ranks as new processes for one verb."""

    def connect(self) -> None:
        """Join the other ranks, unless that is done."""

    def fail(self, error: BaseException) -> BaseException | None:
        """Tell the other ranks that this one ends with an error, and talk to nobody any more.

        Returns:
            What to raise instead, if this rank only ends because another one failed first.
        """
        return None

    @property
    def has_failed(self) -> bool:
        """Whether a rank is known to have failed, so that this run is coming to its end."""
        return False

    def leave(self) -> None:
        """Part from the other ranks at the end of a process, which has done its work."""

    def interrupted_run(self) -> str | None:
        """The run that this `fit` is to go on with, if the launcher has started all ranks again since; None if not."""
        return None

    def share_run_id(self, run_id: str) -> str:
        """Give every rank the run's id, and note it for the case that the launcher starts all ranks again."""
        return run_id

    # The module

    def model_context(self, module: LightningModule) -> AbstractContextManager[Any]:
        """What ``module.configure_model`` is called in."""
        return nullcontext()

    def prepare_module(self, module: LightningModule, settings: Settings) -> None:
        """Bring the module to the device, in place."""
        if settings.sync_batchnorm:
            from leyden.strategy.sync_batchnorm import synchronise_batchnorm

            synchronise_batchnorm(module, settings, self.data_world_size, self.device)
        module.to(self.device)

    def send_buffers(self, module: nn.Module) -> None:
        """Give every rank the same buffers before an evaluation, where each has updated its own."""

    def wrap_training_step(self, module: LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return what the loop calls for ``step``, once the weights are in place."""
        return step

    def wire(self, run: Run, settings: Settings, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Change what the loop calls, where an engine of its own does the step; return the optimizers that the run is to have."""
        return optimizers

    def wire_evaluation(self, evaluation: Evaluation) -> None:
        """Change what the loop calls in a validation, test or prediction."""

    def wrap_evaluation_step(self, module: LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return what validation, test and prediction call for ``step``."""
        return step

    def evaluation_context(self, inference_mode: bool) -> AbstractContextManager[Any]:
        """The context without gradients that validation, test and prediction run in.

        Args:
            inference_mode: the Trainer's.
        """
        return torch.inference_mode() if inference_mode else torch.no_grad()

    def gradient_sync(self) -> Callable[[bool], None] | None:
        """What is told before each micro-batch whether its backward pass reduces the gradients; None if nothing need be told."""
        return None

    def reduce_gradients(self, optimizer: Optimizer) -> None:
        """Average an optimizer's gradients over the ranks, where backward has not done it: in manual optimization."""

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        """Return the module's ``state_dict`` for a checkpoint; with some strategies a collective."""
        return module.state_dict()

    def load_module(self, module: nn.Module, state_dict: dict[str, Any], strict: bool) -> None:
        """Give the module the weights of a checkpoint.

        Raises:
            RuntimeError: torch's, if names or shapes do not fit.
        """
        module.load_state_dict(state_dict, strict=strict)

    def cut_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Return what of an optimizer's state in a checkpoint belongs to this rank."""
        return state

    def cut_gradients(self, optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return what of an optimizer's gradients in a checkpoint belongs to this rank."""
        return gradients

    # How ranks talk; all ranks must make the same calls in the same order

    @abstractmethod
    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank is here."""

    @abstractmethod
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object that rank ``src`` passed in. It is pickled on the way."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        """Return the tensors of all ranks, which have one shape, stacked in a new first dimension of ``world_size``.

        Args:
            tensor: on this rank's device.
            sync_grads: whether gradients flow back to the rank that a part came from.
        """

    @abstractmethod
    def reduce(self, tensor: Tensor, reduce_op: str = "mean") -> Tensor:
        """Return the "mean", "sum", "min" or "max" over all ranks, element by element, on every rank."""

    @abstractmethod
    def gather_objects(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks, by rank, on every rank. They are pickled on the way."""

    def gather_data_ranks(self, obj: Any) -> list[Any]:
        """Return the objects of the ranks that the data is divided over, one of each ``data_rank``, in order."""
        gathered = self.gather_objects((self.data_rank, obj))
        return [each for _, each in sorted(dict(reversed(gathered)).items())]

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all ranks say yes, or any of them."""
        said = self.gather_objects(bool(decision))
        return False not in said if all else True in said

    @abstractmethod
    def highest(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest over all ranks of each of ``numbers``, on the host: a device is not waited for."""
