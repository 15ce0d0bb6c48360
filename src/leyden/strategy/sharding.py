"""What strategies that shard parameters share: steps count as forward passes of the module, and how whole tensors are cut.

Sharded parameters are torch's DTensors. torch.distributed.fsdp and torch.distributed.tensor are imported where they are used:
they take half a second.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden.errors import ConfigurationError
from leyden.optimizers import parameters_of
from leyden.shards import cut_like, is_sharded
from leyden.strategy.distributed import DistributedStrategy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from leyden.module import LightningModule

_CALL = "_call_step"


class ShardedStrategy(DistributedStrategy):
    """A strategy whose ranks hold parts of parameters: all of them take part in each forward pass and each checkpoint."""

    communicates_in_forward = True
    shards_state = True
    no_sync_accumulation = True
    _roots: Sequence[Any] = ()

    def evaluation_context(self, inference_mode: bool) -> AbstractContextManager[Any]:
        """`torch.no_grad`: parameters that are gathered in inference mode could not be trained on later."""
        return torch.no_grad()

    def wrap_training_step(self, module: LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
        """Let the step count as a forward pass of the module, so that its own parameters are gathered before it."""
        self._roots = roots_of(module)
        return as_forward(module, step)

    def wrap_evaluation_step(self, module: LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
        """As for training; afterwards the module holds its parts again, since no backward pass sees to it."""
        roots = roots_of(module)
        if not roots:
            return step
        call = as_forward(module, step)

        def evaluated(*args: Any) -> Any:
            try:
                return call(*args)
            finally:
                for root in roots:
                    root.reshard()

        return evaluated

    def send_buffers(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0, such as BatchNorm's statistics."""
        if self.world_size > 1:
            send_from_first([buffer for buffer in module.buffers() if not is_sharded(buffer)])

    def gradient_sync(self) -> Callable[[bool], None] | None:
        """Reduce gradients in the last backward pass of a window only, unless ``no_sync_accumulation`` is False."""
        roots = self._roots
        if not roots or not self.no_sync_accumulation:
            return None

        def sync(last: bool) -> None:
            for root in roots:
                root.set_requires_gradient_sync(last)

        return sync

    def load_module(self, module: nn.Module, state_dict: dict[str, Any], strict: bool) -> None:
        """Give each rank its part of the weights, which may be whole or sharded in any way."""
        own = module.state_dict()
        cut = {name: cut_like(value, own.get(name)) for name, value in state_dict.items()}
        module.load_state_dict(cut, strict=strict)

    def cut_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """The part of an optimizer's state, whole or sharded in any way, that belongs to this rank's parameters."""
        parameters = dict(enumerate(parameters_of(optimizer)))
        cut = {
            index: {key: cut_like(value, parameters.get(index)) for key, value in own.items()}
            for index, own in state["state"].items()
        }
        return {**state, "state": cut}

    def cut_gradients(self, optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The same for gradients of a window that was begun."""
        return [cut_like(each, own) for each, own in zip(gradients, parameters_of(optimizer), strict=True)]

    @abstractmethod
    def build(self) -> None:
        """Make the device mesh."""


def as_forward(module: nn.Module, step: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls ``step`` as a forward pass of a sharded module; ``step`` itself if the module is not sharded."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if not isinstance(module, FSDPModule):
        return step
    if _CALL not in vars(module):
        # one method for all steps: they stay the user's, whom hooks are looked up at
        module.__dict__[_CALL] = _call
        register_fsdp_forward_method(module, _CALL)
    return partial(getattr(module, _CALL), step)


def _call(step: Callable[..., Any], *args: Any) -> Any:
    return step(*args)


def roots_of(module: nn.Module) -> list[Any]:
    """The outermost modules that `fully_shard` was called on."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        return [module]
    return [root for child in module.children() for root in roots_of(child)]


def shard_rest(
    module: LightningModule,
    shard: Callable[[nn.Module], None],
    is_done: Callable[[nn.Parameter], bool] = is_sharded,
) -> None:
    """Shard what is not sharded yet: in the module itself, or below it in manual optimization.

    A step of manual optimization has several forward and backward passes, so that it cannot be one forward pass of the
    module; each of the module's children is one of its own then.

    Raises:
        ConfigurationError: for parameters of the module itself in manual optimization.
    """
    if module.automatic_optimization:
        shard(module)
        return
    for part in _with_forward(module, is_done):
        if any(not is_done(parameter) for parameter in part.parameters()):
            shard(part)


def _with_forward(module: nn.Module, is_done: Callable[[nn.Parameter], bool]) -> Iterator[nn.Module]:
    """The nearest modules below that have a forward method; lists and dicts of modules have none."""
    if any(not is_done(parameter) for parameter in module.parameters(recurse=False)):
        names = ", ".join(name for name, _ in module.named_parameters(recurse=False))
        raise ConfigurationError(
            f"automatic_optimization = False: {type(module).__name__} has parameters of its own ({names}). Sharded parameters "
            "are gathered when a module is called, and in manual optimization training_step is no such call. Put them into a "
            "submodule, and call that."
        )
    for child in module.children():
        if type(child).forward is nn.Module.forward or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _with_forward(child, is_done)
        else:
            yield child


def send_from_first(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Give every rank of a group the values of its first one."""
    with torch.no_grad():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), group=group, group_src=0)


def make_mesh(device: torch.device, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Arrange all ranks in a grid, those next to each other in the last dimension."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, shape, mesh_dim_names=names)
