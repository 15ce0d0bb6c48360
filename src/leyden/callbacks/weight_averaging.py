"""Averages of the weights (EMA, SWA) that validation, checkpoints and the finished module use instead of the raw ones."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from leyden.callbacks.averages import Average, Averages, exchanged
from leyden.callbacks.callback import Callback
from leyden.errors import ConfigurationError, did_you_mean, reject, warn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from leyden.module import LightningModule
    from leyden.trainer import Trainer

RAW = "current_model_state"  # the key that Lightning's own callback uses for the weights that training goes on from


class WeightAveraging(Callback):
    """Keep averages of the weights, and use them for validation, in checkpoints and at the end of `fit`.

    The default is the equally weighted mean of the weights after each optimizer step (SWA). Other averages come with
    ``avg_fn`` or ``multi_avg_fn``, other moments by overriding `should_update`; `EMAWeightAveraging` does both.

    - **Training** is what it would be without this callback, bit for bit. A step that a loss scaler skipped is not
      averaged, a batch that only accumulates gradients neither.
    - **Validation** inside of `fit` sees the averages, and gives the raw weights back exactly, also when it raises.
      Only what was averaged is swapped: nothing before the first update. Hooks named ``on_validation_end`` see the
      raw weights again. What validation itself writes into averaged buffers is dropped.
    - **After** `fit` the module has the averages; after a `fit` that failed or was interrupted, the raw weights.
    - **Checkpoints** hold the averages as ``state_dict``, so that `load_from_checkpoint` and
      ``test(ckpt_path="best")`` use them; those that training can go on from hold the raw weights as well, under
      ``current_model_state``, and a resumed run is exact.

    Averages have the dtype of their parameter. With bfloat16 parameters, which keep 8 bits, a change of less than
    1/512 of the value is lost: use a ``decay`` of 0.99 or less, or update rarely, or train in ``bf16-mixed``, whose
    parameters are fp32.

    Frozen parameters (``requires_grad=False``) are not averaged, the module's own are used; one that is unfrozen
    later is averaged as if it had been from the start. Tied parameters are averaged once. A parameter that appears
    in a later epoch starts its average at its first update. Changes of the module are looked for when an epoch and
    when a validation begins.

    An update is one call of torch's ``foreach`` kernels for each dtype, and does not wait for the device.

    Args:
        device: where the averages are kept; default: where the parameters are. ``"cpu"`` saves accelerator memory (one
            copy of the weights), but each update then waits for the weights to be copied: update rarely.
        use_buffers: average floating-point buffers too (the statistics of BatchNorm), as they are after each update.
            False uses the module's own; `torch.optim.swa_utils.update_bn` makes exact ones after `fit`. Integer and
            8-bit buffers, and those that hold infinities (masks), are always the module's own.
        **kwargs: ``avg_fn(average, value, n)`` returns the new average of one tensor, or ``multi_avg_fn(averages,
            values, n)`` changes a list of averages in place; ``n`` is the number of values averaged so far, an int ≥ 1.
            They are those of `torch.optim.swa_utils.AveragedModel`, whose functions can be passed.

    Raises:
        ConfigurationError: an unknown argument or device, both functions, or two such callbacks in one Trainer.

    Example::

        class FromStep100(WeightAveraging):
            def should_update(self, step_idx=None, epoch_idx=None):
                return step_idx is not None and step_idx >= 100

        trainer = Trainer(callbacks=FromStep100(), max_epochs=10)
        trainer.fit(model, loader)  # model has the mean of its weights after the 101st step and all later ones
    """

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if name not in ("avg_fn", "multi_avg_fn"):
                known = [*inspect.signature(type(self)).parameters, "avg_fn", "multi_avg_fn"]
                hint = did_you_mean(name, known)
                raise ConfigurationError(f"{type(self).__name__} has no argument {name!r}.{hint}")
            if value is not None and not callable(value):
                reject(name, value, "a function of (average, value, number of values averaged so far)")
        try:
            self._device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError):
            reject("device", device, "a device such as 'cpu' or 'cuda:0', or None for where the parameters are")
        one, several = kwargs.get("avg_fn"), kwargs.get("multi_avg_fn")
        if one is not None and several is not None:
            raise ConfigurationError(f"{type(self).__name__} got both avg_fn and multi_avg_fn. Give one of the two.")
        if one is not None:
            several = _one_by_one(one)
        self._average: Average = several or get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        self._use_buffers = use_buffers
        self._fitting = False
        self._owner: weakref.ref[LightningModule] | None = None
        self._watches: list[RemovableHandle] = []
        self.start_anew()

    def start_anew(self) -> None:
        """Forget the averages of an earlier `fit`."""
        self._averages = Averages(self._average, self._device, self._use_buffers)
        self._latest_step: int | None = None  # steps done when one was last looked at
        self._latest_epoch = -1
        self._epoch = 0
        self._stepped = False  # whether an optimizer has really stepped since then
        self._stale = True  # whether the module may have changed since it was last looked through

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update the averages now; override it to choose the moments.

        Called after each optimizer step with ``step_idx`` and at the end of each training epoch with ``epoch_idx``.

        Args:
            step_idx: the number of the step, from 0; None at the end of an epoch.
            epoch_idx: the number of the epoch, from 0; None after a step.

        Returns:
            By default True after every step.
        """
        return step_idx is not None

    @property
    def state_key(self) -> str:
        """One for all kinds of averages, because there can be one of them in a Trainer only."""
        return "WeightAveraging"

    # Training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second averaging callback, which would swap the first one's averages."""
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        others = [each for each in trainer.callbacks if isinstance(each, WeightAveraging) and each is not self]
        if others:
            raise ConfigurationError(
                f"There are two callbacks that average weights: {type(self).__name__} and {type(others[0]).__name__}. A module "
                "can have one set of averages. Leave one out."
            )
        self._owner = weakref.ref(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the optimizers: the trainer counts a step that a loss scaler skips, but nothing has moved."""
        self._stop_watching()
        self._watches = [each.register_step_post_hook(self._note_step) for each in trainer.optimizers]
        if self._latest_step is None:
            self._latest_step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the module looked through again before the epoch's first step, once all hooks have changed it."""
        self._stale = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look the module through if it may have changed."""
        if self._stale:
            self._averages.bind(pl_module)
            self._stale = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the averages if an optimizer stepped and `should_update` says so."""
        if trainer.global_step == self._latest_step:
            return
        self._latest_step, self._epoch = trainer.global_step, trainer.current_epoch
        moved, self._stepped = self._stepped or not self._watches, False
        if moved and self.should_update(step_idx=self._latest_step - 1):
            self._averages.update(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the averages if `should_update` wants one for the epoch."""
        if trainer.current_epoch <= self._latest_epoch:
            return
        self._latest_epoch = self._epoch = trainer.current_epoch
        if self.should_update(epoch_idx=trainer.current_epoch):
            self._averages.update(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averages into the module, inside of `fit`; after it, the module has them."""
        if self._fitting:
            self._averages.swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its raw weights back."""
        self._swap_out()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the averages in the module."""
        self._averages.finish(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its raw weights back if validation raised."""
        self._swap_out()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers; the averages stay, for a checkpoint that is saved after `fit`."""
        self._swap_out()
        self._stop_watching()
        self._averages.let_go()
        self._fitting = False

    def _swap_out(self) -> None:
        if self._fitting:
            self._averages.swap_out()

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def _stop_watching(self) -> None:
        for watch in self._watches:
            watch.remove()
        self._watches = []

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The averages by name and how many values are in them; in a file they share the bytes of ``state_dict``."""
        owner = self._owner() if self._owner is not None else None
        return {
            "latest_step": self._latest_step,
            "latest_epoch": self._latest_epoch,
            **self._averages.state_dict(owner),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._latest_step, self._latest_epoch = state_dict["latest_step"], int(state_dict["latest_epoch"])
        self._averages.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make the averages the checkpoint's weights, and keep the raw ones beside them if training can go on from it."""
        averages, state = self._averages, checkpoint["state_dict"]
        if self._owner is None or self._owner() is not pl_module or not averages.updates:
            return
        if "optimizer_states" in checkpoint:
            checkpoint[RAW] = state if averages.raw is None else exchanged(pl_module, state, averages.raw)
        checkpoint["state_dict"] = exchanged(pl_module, state, averages.values)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let `fit` go on from the raw weights; whoever evaluates gets the averages."""
        if not self._fitting:
            return
        self.start_anew()
        if RAW in checkpoint:
            checkpoint["state_dict"] = checkpoint.pop(RAW)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            self.load_state_dict(state)  # here as well: a rollback in the middle of `fit` leaves callbacks' states out
        elif "optimizer_states" in checkpoint:
            warn(
                "averages",
                f"The checkpoint was written without {type(self).__name__}, so it holds no averages: they start anew with the "
                "next update.",
            )


class EMAWeightAveraging(WeightAveraging):
    """`WeightAveraging` with an exponential moving average: ``average = decay · average + (1 - decay) · weights``.

    The first update copies the weights; until then validation sees the raw ones.

    Args:
        device: see `WeightAveraging`; so for ``use_buffers``.
        use_buffers: see above.
        decay: the share of the average that an update keeps, from 0 to 1.
        update_every_n_steps: update after the steps whose number, from 0, this divides; 0 updates at the end of each
            epoch instead.
        update_starting_at_step: the first step, from 0, that may be averaged.
        update_starting_at_epoch: the first epoch, from 0, in which steps may be averaged. Lightning 2.6 averages the
            steps before it as well, and adds one update at the end of each epoch from then on.
        **kwargs: none; accepted so that a wrong name is met with a hint.

    Raises:
        ConfigurationError: an argument is out of range or unknown.

    Example::

        ema = EMAWeightAveraging(decay=0.999, update_starting_at_step=1000)
        trainer = Trainer(callbacks=[ema, ModelCheckpoint(monitor="val_loss")])
        trainer.fit(model, train_loader, val_loader)  # val_loss is that of the averages from the 1001st step on
        trainer.test(model, test_loader, ckpt_path="best")  # the averages, as they were then
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("avg_fn", "multi_avg_fn"):
            if name in kwargs:
                raise ConfigurationError(f"EMAWeightAveraging has its own average; for {name}, use WeightAveraging.")
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0.0 <= decay <= 1.0:
            reject("decay", decay, "a number from 0 to 1")
        for name, value in (
            ("update_every_n_steps", update_every_n_steps),
            ("update_starting_at_step", update_starting_at_step or 0),
            ("update_starting_at_epoch", update_starting_at_epoch or 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                reject(name, value, "an integer ≥ 0")
        self.decay = float(decay)
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch
        if not kwargs:
            kwargs = {"multi_avg_fn": get_ema_multi_avg_fn(self.decay)}  # type: ignore[no-untyped-call]
        super().__init__(device, use_buffers, **kwargs)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the beginning is reached and it is the turn of this step, or of this epoch."""
        if (self._epoch if epoch_idx is None else epoch_idx) < (self.update_starting_at_epoch or 0):
            return False
        if epoch_idx is not None:
            begun = (self._latest_step or 0) > (self.update_starting_at_step or 0)
            return self.update_every_n_steps == 0 and begun
        if step_idx is None or step_idx < (self.update_starting_at_step or 0):
            return False
        return self.update_every_n_steps > 0 and step_idx % self.update_every_n_steps == 0


def _one_by_one(avg_fn: Callable[[Tensor, Tensor, int], Tensor]) -> Average:
    """An average of several tensors from one of a single tensor."""

    def average(averages: Sequence[Tensor], values: Sequence[Tensor], n: int) -> None:
        for each, value in zip(averages, values, strict=True):
            each.copy_(avg_fn(each, value.detach(), n))

    return average
