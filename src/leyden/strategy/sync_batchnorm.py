"""BatchNorm over the samples of all ranks. torch's own `SyncBatchNorm` has kernels for GPUs only; on the CPU it is done here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from leyden.settings import Settings

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronise_batchnorm(
    module: nn.Module, settings: Settings, ranks: int, device: torch.device, group: dist.ProcessGroup | None = None
) -> None:
    """Put `SyncBatchNorm` in the places of BatchNorm layers, if ``sync_batchnorm`` asks for it; parameters stay the same.

    Args:
        module: whose layers; not the module itself.
        settings: the Trainer's.
        ranks: how many read different data.
        device: where it will run.
        group: of those ranks; None for all.
    """
    if not settings.sync_batchnorm:
        return
    if ranks == 1:
        _tell(settings, "sync_batchnorm=True", "nothing to do: one process has all samples of a batch")
        return
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _KINDS):
                if child not in made:
                    made[child] = nn.SyncBatchNorm.convert_sync_batchnorm(child, group)  # type: ignore[no-untyped-call]
                setattr(parent, name, made[child])
    if device.type == "cpu":
        for layer in module.modules():
            if type(layer) is nn.SyncBatchNorm:
                layer.__class__ = HostSyncBatchNorm  # type: ignore[assignment]  # it is the user's object, in whatever places he keeps it
    layers = sum(isinstance(layer, (nn.SyncBatchNorm, HostSyncBatchNorm)) for layer in module.modules())
    _tell(settings, "sync_batchnorm=True", f"{layers} BatchNorm layers count the samples of {ranks} ranks")


def _tell(settings: Settings, name: str, reason: str) -> None:
    if (name, reason) not in settings.reasons:
        settings.reasons.append((name, reason))


class HostSyncBatchNorm(nn.modules.batchnorm._BatchNorm):  # the base of all, without a public name
    """`torch.nn.SyncBatchNorm` for the CPU: equal to BatchNorm in one process that has the samples of all ranks.

    Two collectives in the forward pass, for mean and variance, and two in the backward pass. Ranks may have different numbers
    of samples. It is no subclass of torch's, which DDP refuses on the CPU.
    """

    process_group: dist.ProcessGroup | None

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the statistics of all ranks' samples in training, else as BatchNorm does.

        Args:
            input: (samples, channels, …).
        """
        if not self.training:
            uses_own = self.running_mean is None
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, uses_own, 0.0, self.eps
            )
        value = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(value.dim()) if dim != 1]
        shape = [1, -1] + [1] * (value.dim() - 2)
        count = value.new_tensor([value.numel() // value.shape[1]])
        sums = self._over_ranks(torch.cat([value.sum(dims), count]))
        count = sums[-1].detach()
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        mean = sums[:-1] / count
        centered = value - mean.view(shape)
        variance = self._over_ranks(centered.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        result = centered * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            result = result * self.weight.view(shape)
        if self.bias is not None:
            result = result + self.bias.view(shape)
        return result.to(input.dtype)

    def _over_ranks(self, value: Tensor) -> Tensor:
        result: Tensor = _Sum.apply(value, self.process_group)  # type: ignore[no-untyped-call]
        return result

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            part = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), part)
            self.running_var.lerp_(variance.to(self.running_var.dtype), part)


class _Sum(torch.autograd.Function):
    """The sum over ranks, on every rank; each of them adds to the gradient of what it was given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _summed(value, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


def _summed(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
