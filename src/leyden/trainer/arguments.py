"""What a Trainer was asked for, as callbacks and modules may read it."""

from __future__ import annotations

import math
from abc import ABC
from datetime import timedelta
from typing import TYPE_CHECKING

from leyden.precision import PrecisionName
from leyden.strategy.base import Layout

if TYPE_CHECKING:
    from leyden.accelerators import Accelerator
    from leyden.device import DeviceChoice
    from leyden.precision import Precision
    from leyden.settings import Settings


class TrainerArguments(ABC):
    """The Trainer's arguments, validated, with what was chosen for those that were left open: abstract, a page of `TrainerView`.

    What a run changes is not here: a Trainer with other arguments is another Trainer.
    """

    _settings: Settings
    _device_choice: DeviceChoice
    _default_root_dir: str

    @property
    def max_epochs(self) -> int | None:
        """The epoch limit; -1 for none."""
        return self._settings.max_epochs

    @property
    def min_epochs(self) -> int | None:
        """Epochs before a stop is heeded."""
        return self._settings.min_epochs

    @property
    def max_steps(self) -> int:
        """The limit of optimizer steps; -1 for none."""
        return self._settings.max_steps

    @property
    def min_steps(self) -> int | None:
        """Optimizer steps before a stop is heeded."""
        return self._settings.min_steps

    @property
    def fast_dev_run(self) -> int:
        """Batches of each kind in a trial run; 0 if it is a real one."""
        return int(self._settings.fast_dev_run)

    @property
    def log_every_n_steps(self) -> int:
        """Optimizer steps between two flushes of step values; 0 for never."""
        return self._settings.log_every_n_steps or 0

    @property
    def precision(self) -> str:
        """The canonical name of the precision; it equals its short forms, as 16 for "16-mixed", too."""
        return PrecisionName(self._settings.precision.name)

    @property
    def gradient_clip_val(self) -> float | None:
        """The bound of gradient clipping."""
        return self._settings.gradient_clip_val

    @property
    def check_val_every_n_epoch(self) -> int | None:
        """Epochs between validations."""
        return self._settings.check_val_every_n_epoch

    @property
    def default_root_dir(self) -> str:
        """Where files go that have no other place."""
        return self._default_root_dir

    @property
    def precision_plugin(self) -> Precision:
        """The precision, with what it casts and scales."""
        found: Precision = self._settings.precision
        return found

    @property
    def gradient_clip_algorithm(self) -> str | None:
        """What ``gradient_clip_val`` bounds: "norm" or "value"."""
        return self._settings.gradient_clip_algorithm

    @property
    def limit_train_batches(self) -> int | float | None:
        """Batches of an epoch: a number, or a fraction as a float; so for the next three."""
        return self._settings.limit_train_batches

    @property
    def limit_val_batches(self) -> int | float | None:
        """See ``limit_train_batches``."""
        return self._settings.limit_val_batches

    @property
    def limit_test_batches(self) -> int | float | None:
        """See ``limit_train_batches``."""
        return self._settings.limit_test_batches

    @property
    def limit_predict_batches(self) -> int | float | None:
        """See ``limit_train_batches``."""
        return self._settings.limit_predict_batches

    @property
    def overfit_batches(self) -> int | float:
        """The limit of training and validation together; 0 for none."""
        return self._settings.overfit_batches

    @property
    def num_sanity_val_steps(self) -> int | float:
        """Validation batches before training; inf for all."""
        steps = self._settings.num_sanity_val_steps or 0
        return math.inf if steps == -1 else steps

    @property
    def val_check_interval(self) -> int | float | timedelta:
        """Training batches, the fraction of an epoch, or the time between validations."""
        found: int | float | timedelta = self._settings.val_check_interval
        return found

    @property
    def reload_dataloaders_every_n_epochs(self) -> int:
        """Epochs after which the loader hooks are asked again; 0 for never."""
        return self._settings.reload_dataloaders_every_n_epochs

    @property
    def barebones(self) -> bool:
        """Whether everything is off that is not training."""
        return self._settings.barebones

    @property
    def num_nodes(self) -> int:
        """How many machines there are."""
        return self._settings.num_nodes

    @property
    def num_devices(self) -> int:
        """How many devices this machine trains on, each by a process of its own."""
        return len(self._device_choice.devices)

    @property
    def device_ids(self) -> list[int]:
        """The indices of those devices."""
        return [number if each.index is None else each.index for number, each in enumerate(self._device_choice.devices)]

    @property
    def layout(self) -> Layout:
        """Which processes there are to be, as far as this machine knows them."""
        return Layout(self._device_choice.devices, self._settings.num_nodes)

    @property
    def max_restarts(self) -> int:
        """How often all processes are started again when one has failed."""
        return self._settings.max_restarts

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device, which can say whether it is here and how many there are."""
        from leyden.accelerators import accelerator_of  # few programs ask

        return accelerator_of(self._device_choice.accelerator)
