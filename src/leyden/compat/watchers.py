"""Callbacks that do what arguments of the Trainer did: look at gradients and memory, keep the best by ``val_loss``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leyden.callbacks.callback import Callback
from leyden.errors import reject
from leyden.gradients import grad_norm

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from leyden.callbacks.model_checkpoint import ModelCheckpoint
    from leyden.module import LightningModule
    from leyden.trainer import Trainer


class GradientNorms(Callback):
    """Log the p-norm of each parameter's gradient and of all of them together, before clipping.

    The keys are those of ``track_grad_norm``: ``grad_2.0_norm_layer.weight`` and ``grad_2.0_norm_total``. It is done in every
    ``log_every_n_steps``-th step, with as many kernels as there are gradients, and does not wait for the device.

    Args:
        norm_type: p, greater than 0; ``"inf"`` for the greatest absolute value.

    Raises:
        ConfigurationError: if it is not a number greater than 0.
    """

    def __init__(self, norm_type: float | str = 2.0) -> None:
        try:
            self.norm_type = float(norm_type)
        except (TypeError, ValueError):
            self.norm_type = math.nan
        if isinstance(norm_type, bool) or not self.norm_type > 0:
            reject("track_grad_norm", norm_type, "a number greater than 0, 'inf', or -1 for none")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log, if this step is one of those."""
        if _is_logged(trainer):
            pl_module.log_dict(grad_norm(pl_module, self.norm_type, "_"), on_step=True, on_epoch=False)


class NaNGradients(Callback):
    """Print the names of the parameters whose gradient has a NaN in it, after each backward pass.

    It waits for the device in every batch. ``Trainer(nan_policy="raise")`` does so once per step, names them too, and stops.
    """

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, and print."""
        found = [(name, torch.isnan(gradient).any()) for name, gradient in _gradients(pl_module)]
        if not found:
            return
        nan = torch.stack([is_nan.to(trainer.device) for _, is_nan in found]).tolist()
        names = [name for (name, _), is_nan in zip(found, nan, strict=True) if is_nan]
        if names:
            rank = f"[rank {trainer.global_rank}] " if trainer.world_size > 1 else ""
            print(f"{rank}NaN in the gradients of {', '.join(names)}, in step {trainer.global_step + 1}")


class GPUMemory(Callback):
    """Log the memory in use on the GPUs of a run, in MiB, in every ``log_every_n_steps``-th step; elsewhere than on GPUs nothing.

    It is what the driver counts, by all programs. Several processes exchange their values.

    Args:
        mode: "all" logs ``gpu_0``, ``gpu_1``, …: with one process the device's index, with several the rank. "min_max" logs
            ``min_gpu_mem`` and ``max_gpu_mem``.

    Raises:
        ConfigurationError: for another mode.
    """

    def __init__(self, mode: str = "all") -> None:
        if mode not in ("all", "min_max"):
            reject("log_gpu_memory", mode, "'all' or 'min_max'")
        self.mode = mode

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log, if this step is one of those."""
        device = trainer.device
        if device.type != "cuda" or not _is_logged(trainer):
            return
        free, total = torch.cuda.mem_get_info(device)
        used = float((total - free) // 2**20)
        values = {f"gpu_{device.index or 0}": used}
        if trainer.world_size > 1:
            of_all = trainer.all_gather(torch.tensor(used, device=device)).tolist()
            values = {f"gpu_{rank}": value for rank, value in enumerate(of_all)}
        if self.mode == "min_max":
            values = {"min_gpu_mem": min(values.values()), "max_gpu_mem": max(values.values())}
        pl_module.log_dict(values, on_step=True, on_epoch=False)


class ValLossIfLogged(Callback):
    """Let a `ModelCheckpoint` without ``monitor`` keep the best by ``val_loss``, if the first validation logs it.

    Otherwise it keeps the latest, as it does by itself.

    Args:
        checkpoints: of the same Trainer.
    """

    def __init__(self, checkpoints: Sequence[ModelCheckpoint]) -> None:
        self._checkpoints = checkpoints
        self._fitting = False
        self.start_anew()

    @staticmethod
    def suits(checkpoint: ModelCheckpoint) -> bool:
        """Whether it saves after validations, and by no value yet."""
        after_validation = checkpoint.every_n_epochs > 0 and not checkpoint.save_on_train_epoch_end
        return checkpoint.monitor is None and after_validation

    def start_anew(self) -> None:
        """Decide again: the next module may log something else."""
        self._watched: bool | None = None  # None until the first validation has ended
        self._watch(False)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stay with what was decided, which shows in the keys of ModelCheckpoint's states: it has none of its own to miss."""
        if self._fitting:
            states = checkpoint.get("callbacks", {})
            self._watched = next((watched for watched in (True, False) if self._is_known(watched, states)), None)

    def _is_known(self, watched: bool, states: dict[str, Any]) -> bool:
        self._watch(watched)
        return any(checkpoint.state_key in states for checkpoint in self._checkpoints)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note whether this verb trains; other verbs decide nothing."""
        self._fitting = stage == "fit"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide, before ModelCheckpoint asks for its first save."""
        if self._fitting and not trainer.sanity_checking and self._watched is None:
            self._watched = "val_loss" in trainer.callback_metrics
            self._watch(self._watched)

    def _watch(self, watched: bool) -> None:
        for checkpoint in self._checkpoints:
            checkpoint.monitor = "val_loss" if watched else None


def _is_logged(trainer: Trainer) -> bool:
    """Whether the coming step is one whose values are logged."""
    every = trainer.log_every_n_steps
    return every > 0 and (trainer.global_step + 1) % every == 0


def _gradients(module: LightningModule) -> list[tuple[str, Tensor]]:
    """The gradients that there are, of sparse ones the values."""
    found = []
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.detach()
            found.append((name, gradient.coalesce().values() if gradient.is_sparse else gradient))
    return found
