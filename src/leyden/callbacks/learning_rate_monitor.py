"""Log the learning rate, and if asked momentum and weight decay, of every parameter group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from leyden.callbacks.callback import Callback
from leyden.errors import ConfigurationError, reject

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from leyden.module import LightningModule
    from leyden.trainer import Trainer

_KEPT = 10_000
"""Rates kept of each group, and written to each checkpoint: 80 kB."""


class LearningRateMonitor(Callback):
    """Log the learning rates to every logger of the trainer, and show them in ``trainer.callback_metrics``.

    An optimizer is called ``lr-AdamW`` after its class, a second one of that class ``lr-AdamW-1``, or by the
    ``name`` in its scheduler's configuration. With several parameter groups these are ``lr-AdamW/pg1``,
    ``lr-AdamW/pg2`` and so on, or ``lr-AdamW/encoder`` for a group with the key ``"name": "encoder"``. Momentum and
    weight decay are logged under the same name followed by ``-momentum`` and ``-weight_decay``.

    A value logged by step is the rate with which that optimizer step is made, so it stands beside the loss of the
    same step. In ``trainer.callback_metrics`` a value logged by epoch appears at the epoch's end.

    Args:
        logging_interval: ``"step"``: at every ``trainer.log_every_n_steps``-th optimizer step; ``"epoch"``: at the
            start of each training epoch; None: each optimizer as its scheduler's ``interval`` says, and an
            optimizer without a scheduler at both.
        log_momentum: log ``momentum``, or the first of ``betas``; 0 where there is neither.
        log_weight_decay: log ``weight_decay``; 0 where there is none.

    Attributes:
        lrs: the learning rates logged so far, by name; of each the newest 10 000, so that a checkpoint of a long run stays
            small. A run that goes on from a checkpoint goes on with those of the checkpoint.
        last_momentum_values: the momentum logged last, by name.
        last_weight_decay_values: the weight decay logged last, by name.

    Raises:
        ConfigurationError: when training starts without a logger, or two schedulers have one name.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            reject("logging_interval", logging_interval, "'step', 'epoch' or None (as each scheduler's interval says)")
        self.logging_interval: Literal["step", "epoch"] | None = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float] = {}
        self.last_weight_decay_values: dict[str, float] = {}
        self._at_steps: list[tuple[str, Optimizer]] = []
        self._at_epochs: list[tuple[str, Optimizer]] = []
        self._logged_step = self._logged_epoch = -1
        self._carried = (-1, -1)  # these two as a checkpoint has them, until training begins

    def state_dict(self) -> dict[str, Any]:
        """The values that the attributes show, and for which step and epoch values were logged last."""
        return {
            "lrs": {name: torch.tensor(values, dtype=torch.float64) for name, values in self.lrs.items()},
            "last_momentum_values": dict(self.last_momentum_values),
            "last_weight_decay_values": dict(self.last_weight_decay_values),
            "logged_step": self._logged_step,
            "logged_epoch": self._logged_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Show what was shown at the checkpoint, and do not log an epoch again that goes on in its middle."""
        self.lrs = {name: values.tolist() for name, values in state_dict["lrs"].items()}
        self.last_momentum_values = dict(state_dict["last_momentum_values"])
        self.last_weight_decay_values = dict(state_dict["last_weight_decay_values"])
        self._carried = (int(state_dict["logged_step"]), int(state_dict["logged_epoch"]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the optimizers and decide when each of them is logged."""
        # fast_dev_run drops the loggers; it should still run the whole script
        if not trainer.loggers and not trainer.fast_dev_run:
            raise ConfigurationError(
                "LearningRateMonitor has nowhere to log to: the Trainer has no logger. "
                "Leave logger=False out, pass logger=[...], or remove the callback."
            )
        self._at_steps, self._at_epochs = [], []
        (self._logged_step, self._logged_epoch), self._carried = self._carried, (-1, -1)
        for name, optimizer in _names(trainer):
            intervals = {c.interval for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer}
            if self.logging_interval is not None:
                intervals = {self.logging_interval}
            if "step" in intervals or not intervals:
                self._at_steps.append((name, optimizer))
            if "epoch" in intervals or not intervals:
                self._at_epochs.append((name, optimizer))
        for name, optimizer in self._at_steps + self._at_epochs:
            for key, _ in _groups(name, optimizer):
                self.lrs.setdefault(key, [])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the optimizers whose rate changes by epoch."""
        epoch = trainer.current_epoch
        if self._at_epochs and epoch != self._logged_epoch:
            self._logged_epoch = epoch
            self._log(trainer, pl_module, self._at_epochs, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the optimizers whose rate changes by step, if the coming step is one that is logged."""
        step = trainer.global_step + 1
        # a window of accumulated batches has one step and several batches
        if not self._at_steps or step == self._logged_step or not trainer.log_every_n_steps:
            return
        if step % trainer.log_every_n_steps == 0:
            self._logged_step = step
            self._log(trainer, pl_module, self._at_steps, step)

    def _log(
        self, trainer: Trainer, pl_module: LightningModule, optimizers: list[tuple[str, Optimizer]], step: int
    ) -> None:
        by_step = optimizers is self._at_steps
        values: dict[str, float] = {}
        for name, optimizer in optimizers:
            own = self._values(name, optimizer)
            values.update(own)
            # a key is shown either by step or by epoch; what is logged at both is shown by step
            if by_step or all(optimizer is not other for _, other in self._at_steps):
                pl_module.log_dict(own, on_step=by_step, on_epoch=not by_step, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(values, step)

    def _values(self, name: str, optimizer: Optimizer) -> dict[str, float]:
        values: dict[str, float] = {}
        for key, group in _groups(name, optimizer):
            values[key] = float(group["lr"])
            shown = self.lrs.setdefault(key, [])
            shown.append(values[key])
            if len(shown) > _KEPT:
                del shown[0]
            if self.log_momentum:
                betas = group.get("betas")
                momentum = float(betas[0] if betas else group.get("momentum", 0.0))
                values[f"{key}-momentum"] = self.last_momentum_values[f"{key}-momentum"] = momentum
            if self.log_weight_decay:
                decay = float(group.get("weight_decay", 0.0))
                values[f"{key}-weight_decay"] = self.last_weight_decay_values[f"{key}-weight_decay"] = decay
        return values


def _names(trainer: Trainer) -> list[tuple[str, Optimizer]]:
    """Every optimizer with the name it is logged by."""
    given: dict[int, str] = {}
    for config in trainer.lr_scheduler_configs:
        if config.name:
            given.setdefault(id(config.scheduler.optimizer), config.name)
    named: list[tuple[str, Optimizer]] = []
    seen: dict[str, int] = {}
    for optimizer in trainer.optimizers:
        name = given.get(id(optimizer))
        if name is None:
            base = f"lr-{type(optimizer).__name__}"
            count = seen.get(base, 0)
            seen[base] = count + 1
            name = f"{base}-{count}" if count else base
        if any(name == other for other, _ in named):
            raise ConfigurationError(
                f"Two optimizers would be logged as {name!r}. Give the schedulers in configure_optimizers "
                "different names: {'scheduler': ..., 'name': ...}."
            )
        named.append((name, optimizer))
    return named


def _groups(name: str, optimizer: Optimizer) -> list[tuple[str, dict[str, Any]]]:
    """Every parameter group with the key of its learning rate."""
    groups = optimizer.param_groups
    keyed: list[tuple[str, dict[str, Any]]] = []
    used: set[str] = set()
    for number, group in enumerate(groups, start=1):
        own = group.get("name")
        suffix = f"/{own}" if own else f"/pg{number}" if len(groups) > 1 else ""
        if suffix in used:
            raise ConfigurationError(
                f"Two parameter groups of {type(optimizer).__name__} are called {own!r}; their learning rates would be "
                "logged as one. Give each group its own 'name', or none."
            )
        used.add(suffix)
        keyed.append((name + suffix, group))
    return keyed
