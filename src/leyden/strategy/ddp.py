"""DistributedDataParallel: each rank holds the whole module, gradients are averaged in the backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from leyden.errors import did_you_mean, reject
from leyden.strategy.distributed import DistributedStrategy

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.settings import Settings

CommHook = Callable[[Any, Any], Any]
COMM_HOOKS = ("bf16_compress", "fp16_compress", "powerSGD")
# its name from torch 2.13 on, and before
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
_BUCKET_BYTES = 25 << 20  # torch's own default for DDP


class DDPStrategy(DistributedStrategy):
    """`torch.nn.parallel.DistributedDataParallel` around the training step.

    In manual optimization, where a step may run several backward passes over parts of the module, the gradients of an optimizer
    are averaged when it steps instead.

    Args:
        find_unused_parameters: look in each step for parameters that had no part in the loss. Costs a walk over the graph.
        static_graph: the same parameters have a part in each step: lets torch find the unused ones once, and allows
            re-entrant checkpointing.
        gradient_as_bucket_view: gradients share memory with what is sent (default): saves a copy of them.
        bucket_cap_mb: size of what is sent at once, in MiB; None for torch's default.
        broadcast_buffers: give all ranks the buffers of rank 0, such as BatchNorm's statistics, at each forward pass.
        comm_hook: how gradients are sent: "bf16_compress" (half of the bytes), "fp16_compress", "powerSGD", or a function
            ``hook(state, bucket) -> Future`` for ``register_comm_hook``.
        comm_state: the hook's state; None for the process group (for "powerSGD": its default state of rank 1).
        **options: of `DistributedStrategy`.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """

    wrap_by: Callable[[nn.Module, list[int] | None], Any] | None = None
    """What wraps the training step in place of torch's DDP, in the same manner."""

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        comm_hook: str | CommHook | None = None,
        comm_state: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if isinstance(comm_hook, str) and comm_hook not in COMM_HOOKS:
            known = f"{', '.join(map(repr, COMM_HOOKS))}, a function or None"
            reject("comm_hook", comm_hook, known, did_you_mean(comm_hook, COMM_HOOKS))
        self.find_unused_parameters = find_unused_parameters
        self.static_graph = static_graph
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.bucket_cap_mb = bucket_cap_mb
        self.broadcast_buffers = broadcast_buffers
        self.comm_hook = comm_hook
        self.comm_state = comm_state
        self._ddp: DistributedDataParallel | None = None
        self._step: _Step | None = None

    def prepare_module(self, module: LightningModule, settings: Settings) -> None:
        """Bring the module to the device, with the weights of rank 0: ranks may have drawn others."""
        super().prepare_module(module, settings)
        send(tensor for tensor in (*module.parameters(), *module.buffers()) if not is_lazy(tensor))

    def send_buffers(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0, which are those of a checkpoint."""
        if self.broadcast_buffers:
            send(module.buffers())

    def wrap_training_step(self, module: LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return DDP around the step, which is wrapped anew when parameters are frozen or unfrozen."""
        self._ddp = self._step = None
        if not module.automatic_optimization:
            return step
        self._step = _Step(module, step)
        self._parameters = list(module.parameters())
        self._wrap()
        return lambda *args: step(*args) if self._ddp is None else self._ddp(*args)

    def _wrap(self) -> None:
        """Let DDP reduce the gradients of the parameters that are trained now; it asks which these are only when it is made."""
        self._ddp = None
        self._trained = [parameter.requires_grad for parameter in self._parameters]
        if not any(self._trained):
            return
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        if self.wrap_by is not None:
            assert self._step is not None
            self._ddp = self.wrap_by(self._step, device_ids)
            return
        buffers: dict[str, Any] = {} if self.broadcast_buffers else {_SYNC_BUFFERS: False}
        ddp = DistributedDataParallel(
            self._step,
            device_ids=device_ids,
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            gradient_as_bucket_view=self.gradient_as_bucket_view,
            bucket_cap_mb=self.bucket_cap_mb,
            **buffers,
        )
        self._register_comm_hook(ddp)
        self._ddp = ddp

    def gradient_sync(self) -> Callable[[bool], None] | None:
        """Tell DDP whether the next backward pass ends a window of accumulated batches: what its ``no_sync`` does."""
        if self._step is None:
            return None

        def sync(last: bool) -> None:
            if [parameter.requires_grad for parameter in self._parameters] != self._trained:
                self._wrap()
            if self._ddp is not None:
                self._ddp.require_backward_grad_sync = last

        return sync

    def reduce_gradients(self, optimizer: Optimizer) -> None:
        """Average the gradients of one optimizer, in buckets."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        average_gradients([parameter for parameter in parameters if parameter.requires_grad], self.world_size)

    def _register_comm_hook(self, ddp: DistributedDataParallel) -> None:
        hook, state = self.comm_hook, self.comm_state
        if hook is None:
            return
        if isinstance(hook, str):
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

            if hook == "powerSGD":
                state = state or powerSGD_hook.PowerSGDState(process_group=None, matrix_approximation_rank=1)
                hook = powerSGD_hook.powerSGD_hook
            else:
                hook = getattr(default_hooks, f"{hook}_hook")
        # torch reads a hook's annotations, and refuses those that are strings; it knows bf16_compress by its name, and refuses
        # it on the CPU, where gloo can send it as well
        ddp.register_comm_hook(state, lambda state, bucket: hook(state, bucket))


class _Step(nn.Module):
    """What DDP wraps: its forward pass is the training step, its parameters are the user's module's."""

    def __init__(self, module: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._step = step
        self.training = module.training  # without telling the submodules

    def forward(self, *args: Any) -> Any:
        return self._step(*args)


def send(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values of rank 0, in place."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Average gradients over the ranks; a rank whose parameter has no gradient counts as zeros if another's has one.

    Args:
        parameters: the same on each rank, in the same order.
        world_size: how many ranks.
    """
    kinds = torch.tensor([_kind(parameter) for parameter in parameters], dtype=torch.int32)
    if parameters and parameters[0].is_cuda:
        kinds = kinds.to(parameters[0].device)
    dist.all_reduce(kinds, dist.ReduceOp.MAX)
    gradients = []
    for parameter, kind in zip(parameters, kinds.tolist(), strict=True):
        if kind != _NONE and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        if kind == _SPARSE and gradient is not None:  # rows differ by rank
            total = (gradient if gradient.is_sparse else gradient.to_sparse(1)).coalesce()
            dist.all_reduce(total)
            parameter.grad = total / world_size
        elif gradient is not None:
            gradients.append(gradient)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world_size
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


_NONE, _DENSE, _SPARSE = range(3)


def _kind(parameter: nn.Parameter) -> int:
    return _NONE if parameter.grad is None else _SPARSE if parameter.grad.is_sparse else _DENSE


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Gradients of one dtype, up to 25 MiB, in order."""
    buckets: list[list[Tensor]] = []
    size = 0
    for gradient in gradients:
        if not buckets or buckets[-1][0].dtype != gradient.dtype or size + gradient.nbytes > _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    return buckets
