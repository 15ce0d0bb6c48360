"""What is done when a step goes wrong: the loss or a gradient is not finite, or the device runs out of memory.

`nan_policy` and `oom_policy` of the Trainer. `apply_policies` wires them into a `Run`; where neither is asked for there is
nothing to call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden.buffers import BufferBackup
from leyden.checkpoint import state
from leyden.checkpoint.format import load_checkpoint, read_about
from leyden.checkpoint.store import list_checkpoints
from leyden.errors import CheckpointError, ConfigurationError, NonFiniteError, warn
from leyden.halving import Halving
from leyden.optimizers import parameters_of
from leyden.ranks import read_checkpoint
from leyden.run import Mode, Run
from leyden.shards import local_part

if TYPE_CHECKING:
    from leyden.callbacks import Callback, ModelCheckpoint
    from leyden.settings import Settings
    from leyden.trainer import Trainer

MAX_SKIPS_IN_A_ROW = 100
"""Steps that ``nan_policy="skip"`` leaves out one after the other before it gives up: the weights themselves are bad."""
MAX_ROLLBACKS = 3
"""How often ``nan_policy="rollback"`` goes back to the same checkpoint before it gives up."""


def apply_policies(run: Run, settings: Settings, trainer: Trainer, callbacks: Sequence[Callback]) -> None:
    """Wire the policies that were asked for into the run.

    Raises:
        ConfigurationError: if a policy cannot be right here; the message says why.
    """
    if settings.nan_policy is not None:
        _refuse_without_steps_of_the_loop("nan_policy", settings.nan_policy, run, allowed="raise")
        if settings.nan_policy == "rollback" and not settings.fast_dev_run:
            _refuse_without_checkpoints(trainer)
        run.guard = FiniteGuard(run, settings.nan_policy, partial(roll_back, run, trainer, callbacks))
    if settings.oom_policy == "halve":
        if run.agreement is not None:
            raise ConfigurationError(
                f"oom_policy='halve' is for one process, and there are {run.strategy.world_size}: a rank that trains on its "
                "batch in parts would leave the others waiting. Use a smaller batch with accumulate_grad_batches."
            )
        _refuse_without_steps_of_the_loop("oom_policy", "halve", run, allowed="raise")
        run.halving = Halving(run)


def _refuse_without_steps_of_the_loop(name: str, value: str, run: Run, allowed: str) -> None:
    if run.mode is Mode.AUTOMATIC or value == allowed:
        return
    if run.mode is Mode.CLOSURE:
        why = (
            f"{type(run.optimizer).__name__} evaluates the loss itself, several times per step"
            if run.reevaluates
            else f"{type(run.module).__name__} overrides optimizer_step, which decides itself when there is a step"
        )
    elif run.module.automatic_optimization:
        why = "configure_optimizers returned None, so there are no steps"
    else:
        why = "the module sets automatic_optimization = False, so training_step itself computes gradients and steps"
    raise ConfigurationError(
        f"{name}={value!r} needs automatic optimization, in which the loop makes the gradients and the step: {why}. "
        f"Use {name}={allowed!r}."
    )


def _refuse_without_checkpoints(trainer: Trainer) -> None:
    if not trainer.checkpoint_callbacks:
        raise ConfigurationError(
            "nan_policy='rollback' goes back to a checkpoint, but there is no ModelCheckpoint. Add one, such as "
            "ModelCheckpoint(every_n_train_steps=1000), or use nan_policy='skip'."
        )
    if all(callback.save_weights_only for callback in trainer.checkpoint_callbacks):
        raise ConfigurationError(
            "nan_policy='rollback' goes back to a checkpoint with optimizer and schedulers, but every ModelCheckpoint has "
            "save_weights_only=True. Set it to False in one of them."
        )


def advise(error: BaseException, run: Run | None, settings: Settings) -> None:
    """Name ``oom_policy="halve"`` to who ran out of memory in training and could use it."""
    trains = run is not None and run.mode is Mode.AUTOMATIC and run.status.stage == "train"
    if trains and isinstance(error, torch.OutOfMemoryError) and settings.oom_policy == "raise":
        error.add_note(
            "Trainer(oom_policy='halve') would train on a batch that does not fit in two, four, … parts, with the gradient of "
            "the whole. Other ways: a smaller batch with accumulate_grad_batches, precision='bf16-mixed'."
        )


# Losses and gradients that are not finite


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every element of all tensors is finite: one pass over them, and one wait for the device.

    Of those that ranks have parts of, this rank's part is looked at.
    """
    parts = [local_part(tensor.detach()) for tensor in tensors]
    strided = [part if part.layout is torch.strided else part.coalesce().values() for part in parts]
    filled = [tensor for tensor in strided if tensor.numel()]
    if nn.utils.get_total_norm(filled).isfinite():  # NaN and inf carry over to the norm
        return True
    # The squares of large numbers overflow. Each element is asked, because torch_xla 2.9 loses NaN in the largest absolute value.
    answers = [tensor.isfinite().all() for tensor in filled]
    return bool(torch.stack([answer.to(answers[0].device) for answer in answers]).all())


class FiniteGuard:
    """Looks once per optimizer step whether the losses and gradients are finite, and does what `nan_policy` says.

    Under fp16 loss scaling gradients overflow as a matter of course, and the scaler leaves out the step; only losses are
    looked at then. The look comes before `on_before_optimizer_step` and before clipping. It reads all gradients once, which is
    a small part of what an optimizer does, and waits for the device: the host can no longer run ahead of it by more than a
    step. On the host it takes about 50 calls.

    Under "skip" and "rollback", what was logged in the window is left out of epoch means, but not what metric objects
    were updated with. "skip" copies the buffers before each window, to put them back.

    Args:
        run: which it joins by its hooks.
        policy: "raise", "skip" or "rollback".
        roll_back: goes back to a checkpoint, given what was found.
    """

    def __init__(self, run: Run, policy: str, roll_back: Callable[[str], None]) -> None:
        self._run = run
        self._roll_back = roll_back
        self._answer = {"raise": self._raise, "skip": self._skip, "rollback": self._go_back}[policy]
        self._losses: deque[tuple[int, Tensor]] = deque(maxlen=10_000)  # bounded: in manual mode a step may never come
        self._buffers = BufferBackup(run.module)
        self._logged: Any = None
        self._told = False
        hooks = run.hooks
        hooks.on_before_backward = (*hooks.on_before_backward, self._note_loss)
        self._restores_buffers = policy == "skip"
        if policy != "raise":
            hooks.on_train_batch_start = (self._note_batch, *hooks.on_train_batch_start)

    def _note_batch(self, batch: Any, batch_idx: int) -> None:
        if self._run.progress.micro_batch == 0:
            self._logged = self._run.metrics.mark()
            if self._restores_buffers:
                self._buffers.save()

    def _note_loss(self, loss: Tensor) -> None:
        progress = self._run.progress
        if progress.micro_batch == 1:  # of a new window; an epoch may have ended within the last one
            self._losses.clear()
        self._losses.append((progress.batch, loss.detach()))

    def look(self, optimizer: Optimizer) -> None:
        """Refuse to step on what is not finite, where the loop does not step itself.

        An optimizer that evaluates the loss several times, such as LBFGS, may have moved the weights within the step.

        Raises:
            NonFiniteError: naming the loss, or the first gradient by its parameter.
        """
        if (found := self._found_anywhere(optimizer)) is not None:
            self._raise(found, 0)

    def drops(self, optimizer: Optimizer, batches: int) -> bool:
        """Whether this step is not to be made; what the policy does about it is done.

        Args:
            optimizer: with the gradients of a window.
            batches: of how many batches.
        """
        found = self._found_anywhere(optimizer)
        if found is None:
            self._run.progress.dropped_in_a_row = 0
            return False
        self._answer(found, batches)
        return True

    def _found_anywhere(self, optimizer: Optimizer) -> str | None:
        """What is not finite on any rank: all of them do the same about it."""
        found, run = self._find(optimizer), self._run
        if run.agreement is None or not run.agreement.any(found is not None):
            return found
        known = [(rank, what) for rank, what in enumerate(run.strategy.gather_objects(found)) if what is not None]
        # one rank's loss makes gradients of all that are not finite: it is the cause
        rank, what = min(known, key=lambda each: each[1].startswith("The loss is finite"))
        return f"On rank {rank}: {what}"

    def _find(self, optimizer: Optimizer) -> str | None:
        losses = list(self._losses)
        self._losses.clear()
        parameters = parameters_of(optimizer) if self._run.scaler is None else []
        gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        if all_finite([*(loss for _, loss in losses), *(gradient for _, gradient in gradients)]):
            return None
        progress = self._run.progress
        for batch_idx, loss in losses:
            if not all_finite([loss]):
                return f"The loss is {loss.item()} in {progress.where(batch_idx)}."
        names = {id(parameter): name for name, parameter in self._run.module.named_parameters()}
        bad = next(parameter for parameter, gradient in gradients if not all_finite([gradient]))
        name = names.get(id(bad), f"a parameter of shape {tuple(bad.shape)} that is not the module's")
        return f"The loss is finite, but the gradient of {name} is not, in {progress.where()}."

    def _raise(self, found: str, batches: int) -> None:
        raise NonFiniteError(
            f"{found} The optimizer was not stepped, so the weights are those before this batch. "
            "Trainer(detect_anomaly=True) names the operation; nan_policy='skip' or 'rollback' goes on."
        )

    def _drop(self, batches: int) -> None:
        assert self._run.optimizer is not None
        self._run.optimizer.zero_grad()
        self._run.progress.skipped_batches += batches
        self._run.progress.dropped_in_a_row += 1
        if self._logged is not None:  # it is where a restart came within the window
            self._run.metrics.rewind(self._logged)  # one NaN would make a NaN of the epoch's mean

    def _skip(self, found: str, batches: int) -> None:
        self._drop(batches)
        if self._run.progress.dropped_in_a_row > MAX_SKIPS_IN_A_ROW:
            raise NonFiniteError(
                f"{found} {MAX_SKIPS_IN_A_ROW} steps in a row were skipped before it, so training cannot get on. "
                "Lower the learning rate, or use nan_policy='rollback'."
            )
        self._buffers.put_back()
        if not self._told:
            self._told = True
            warn(
                "nan-skipped",
                f"{found} nan_policy='skip': no step was made of it. Later ones are counted in trainer.skipped_batches and not "
                "announced again.",
            )

    def _go_back(self, found: str, batches: int) -> None:
        self._drop(batches)
        self._roll_back(found)


# Back to a checkpoint


def roll_back(run: Run, trainer: Trainer, callbacks: Sequence[Callback], found: str) -> None:
    """Give the run the weights, buffers, optimizer, schedulers and scaler of its newest checkpoint, and its step.

    Epoch, batch, data, random state and callbacks stay where they are: the batches since the checkpoint are not trained on
    again, as is usual in large runs, for the bad ones may be among them.

    Args:
        run: which is between two steps.
        trainer: whose `ModelCheckpoint`s know the checkpoints.
        callbacks: whose `on_load_checkpoint` is called, as the module's is, for they may have had a hand in the file.
        found: what was not finite, for messages.

    Raises:
        NonFiniteError: if there is no checkpoint yet, or it was gone back to `MAX_ROLLBACKS` times.
    """
    await_writes(trainer)
    progress, before = run.progress, run.progress.global_step
    path, checkpoint = _newest_checkpoint(trainer) if trainer.is_global_zero else (None, {})
    path = run.strategy.broadcast(path)
    if path is not None and (not checkpoint or run.strategy.shards_state):
        checkpoint = read_checkpoint(run.strategy, run.module, path)
    if path is None:
        raise NonFiniteError(
            f"{found} nan_policy='rollback': this training has written no checkpoint yet that it could go back to. Save "
            "earlier, with ModelCheckpoint(every_n_train_steps=…)."
        )
    step = int(checkpoint["global_step"])
    if progress.rolled_back_to != step:
        progress.rolled_back_to, progress.rollbacks = step, 0
    if progress.rollbacks >= MAX_ROLLBACKS:
        raise NonFiniteError(
            f"{found} nan_policy='rollback': {path} of step {step} was gone back to {MAX_ROLLBACKS} times already. Lower the "
            "learning rate, or go on from an earlier checkpoint."
        )
    progress.rollbacks += 1
    state.apply_weights(trainer, run.module, callbacks, checkpoint, path)
    state.apply_optimizers(run, checkpoint, path)
    progress.global_step = step
    warn(
        "nan-rollback",
        f"{found} nan_policy='rollback': from step {before} back to step {step}, {path} (rollback {progress.rollbacks} of at "
        f"most {MAX_ROLLBACKS} to it). Training goes on with the next batch; the batches of those {before - step} steps are not "
        "trained on again.",
    )


def await_writes(trainer: Trainer) -> None:
    """Wait until no checkpoint is being written in the background, so that the newest one is there."""
    trainer._writer.wait()


def _newest_checkpoint(trainer: Trainer) -> tuple[str | None, dict[str, Any]]:
    """The newest whole checkpoint that this training has written and can go on from."""
    tried: set[str] = set()
    for paths in _places(trainer.checkpoint_callbacks):
        known = []
        for path in {*paths} - tried:
            tried.add(path)
            try:
                about = read_about(path)
            except CheckpointError:
                continue  # deleted since, or no checkpoint
            if about.resumable and about.run_id == trainer.run_id and about.global_step <= trainer.global_step:
                known.append((about.saved_at, about.global_step, path))
        for _, _, path in sorted(known, reverse=True):
            try:
                return path, load_checkpoint(path)
            except CheckpointError as error:
                warn("damaged-checkpoint", f"{error} The checkpoint before it is taken.")
    return None, {}


def _places(callbacks: Sequence[ModelCheckpoint]) -> Iterator[list[str]]:
    """Where checkpoints may be: those that callbacks know, and only if none of them will do, those that lie beside them."""
    yield [
        path for each in callbacks for path in (each.last_model_path, each.best_model_path, *each.best_k_models) if path
    ]
    folders = dict.fromkeys(each.dirpath for each in callbacks if each.dirpath is not None)
    yield [path for folder in folders for path in list_checkpoints(folder)]
