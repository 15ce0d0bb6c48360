"""The loop, top to bottom: the only place that calls the user's steps, backward and the optimizer.

A batch's way: `train` takes it from the loader, `forward_backward` makes gradients of it, `optimizer_step` uses them,
`step_boundary` logs, validates and saves between two steps. `evaluate` is validation, test and prediction.
On the way the time is noted: ``account.mark`` is when the present part of it began.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from leyden.data.loader import set_epoch
from leyden.errors import DataError, StepError
from leyden.hooks import Hook
from leyden.run import Evaluation, Mode, Run, detached, loss_of
from leyden.seed import isolated_random_state


def train(run: Run) -> None:
    """Train until a limit is reached or somebody asks to stop."""
    progress, hooks, metrics, account = run.progress, run.hooks, run.metrics, run.account
    clock = account.begin(run)
    call(hooks.on_train_start)
    agree(run)  # a timer may have no time left
    while run.wants_epoch():
        position = begin_epoch(run)
        account.mark = clock()
        for batch, following in run.source.batches(
            run.move, start=progress.batch, position=position, ahead=lambda: run.accumulate
        ):
            account.data_s += clock() - account.mark
            batch_idx = progress.batch
            run.is_last_batch, run.weight = following == 0, run.source.weight
            metrics.begin_batch(batch, batch_idx, run.weight)
            if progress.micro_batch == 0:
                run.window = min(run.accumulate, following + 1)  # the last window of an epoch may be short
            if hooks.on_train_batch_start and skips_epoch(run, batch, batch_idx):
                run.is_last_batch = True
                run.step_schedulers_after_epoch()
                break
            account.mark = clock()
            if run.compiled is not None and run.compiled.is_ready() and run.compiled.train_on(batch, batch_idx):
                output = run.compiled.output
                account.training_step_s += clock() - account.mark
            elif run.mode is Mode.AUTOMATIC:
                if run.halving is None:
                    output = forward_backward(run, batch, batch_idx)
                else:
                    output = run.halving.train_on(forward_backward, batch, batch_idx)
                account.compute_s += clock() - account.mark
                if progress.micro_batch == run.window:
                    account.mark = clock()
                    optimizer_step(run)
                    account.optimizer_s += clock() - account.mark
            elif run.mode is Mode.CLOSURE:
                output = closure_batch(run, batch, batch_idx)
            else:
                output = manual_batch(run, batch, batch_idx)

            progress.batch += 1
            progress.total_batches += 1
            if run.is_last_batch:
                run.step_schedulers_after_epoch()
            for hook in hooks.on_train_batch_end:
                hook(output, batch, batch_idx)
            if run.schedule is not None:
                run.schedule.note_batch(progress, run.is_last_batch)
            if progress.micro_batch == 0:
                step_boundary(run)
                if run.stop_reached():
                    break
            account.mark = clock()
        else:
            account.data_s += clock() - account.mark  # finding the end takes a while where workers are shut down
        end_epoch(run)
    run.take_up_restored()  # where nothing was left to train
    metrics.leave()
    call(hooks.on_train_end)
    run.serve_requests()


def forward_backward(run: Run, batch: Any, batch_idx: int) -> Any:
    """Add the gradients of one batch to the window's; return what callbacks get of it."""
    progress, hooks = run.progress, run.hooks
    if run.sync_gradients is not None:
        run.sync_gradients(progress.micro_batch + 1 == run.window)
    with run.step_context:
        output = run.training_step(*(batch, batch_idx)[: run.arity])
    loss = loss_of(output)
    assert run.optimizer is not None
    if progress.micro_batch == 0:
        for hook in hooks.on_before_zero_grad:
            hook(run.optimizer)
        run.zero_grad()
    progress.micro_batch += 1
    if loss is None:
        run.refuse_lone_skip()
        progress.skipped_batches += 1
        progress.skipped_in_window += 1
        run.loss = None
        return None
    if run.window > 1:
        loss = loss / run.window
    if run.share * run.weight != 1.0:
        loss = loss * (run.share * run.weight)
    for hook in hooks.on_before_backward:
        hook(loss)
    run.backward(loss if run.scaler is None else run.scaler.scale(loss))
    for hook in hooks.on_after_backward:
        hook()
    run.loss = loss.detach()
    return detached(output) if run.wants_outputs else None


def optimizer_step(run: Run) -> None:
    """Step the optimizer with the gradients of a whole window."""
    progress, optimizer, scaler = run.progress, run.optimizer, run.scaler
    assert optimizer is not None
    trained, skipped = run.window - progress.skipped_in_window, progress.skipped_in_window
    progress.micro_batch = progress.skipped_in_window = 0
    if trained == 0:
        return
    if run.guard is not None and run.guard.drops(optimizer, trained):
        return
    if scaler is not None:
        scaler.unscale(optimizer)
    if skipped:
        rescale_gradients(optimizer, run.window / trained)
    for hook in run.hooks.on_before_optimizer_step:
        hook(optimizer)
    if run.clip is not None:
        run.clip(optimizer)
    run.stepped = run.moved = True
    if scaler is None:
        optimizer.step()
    else:
        run.moved = scaler.step(optimizer)
        scaler.update()
    progress.global_step += 1
    if run.moved and run.step_schedulers:
        run.step_schedulers_after_step()


def closure_batch(run: Run, batch: Any, batch_idx: int) -> Any:
    """Train on one batch where the optimizer, or the user's `optimizer_step`, calls for the gradients itself."""
    progress = run.progress
    if run.reevaluates:
        run.held.append((batch, batch_idx, run.weight))
        if len(run.held) < run.window:
            progress.micro_batch = len(run.held)
            return None
        batches, run.held, first = run.held, [], 0
    elif progress.micro_batch + 1 < run.window:
        output = forward_backward(run, batch, batch_idx)
        run.account.lap("forward and backward")
        return output
    else:
        batches, first = [(batch, batch_idx, run.weight)], progress.micro_batch
    outputs: list[Any] = []
    skipped_before = (progress.skipped_in_window, progress.skipped_batches)

    def closure() -> Tensor | None:
        run.account.lap("optimizer")
        progress.micro_batch = first
        progress.skipped_in_window, progress.skipped_batches = skipped_before
        total: Tensor | None = None
        for held_batch, held_idx, run.weight in batches:
            run.metrics.begin_batch(held_batch, held_idx, run.weight)
            outputs.append(forward_backward(run, held_batch, held_idx))
            if run.loss is not None:
                total = run.loss if total is None else total + run.loss
        run.account.lap("forward and backward")
        if total is None and run.reevaluates:
            raise StepError(
                f"training_step returned None, but {type(run.optimizer).__name__} needs a loss in every window. Return a loss."
            )
        return run.mean_loss(rescaled(run, total))

    run.stepped = False
    if run.own_optimizer_step is not None:
        run.own_optimizer_step(progress.epoch, batch_idx, run.handles[0], closure)
    else:
        run.handles[0].step(closure)
    if not outputs:
        raise StepError(
            "optimizer_step did not call its optimizer_closure, so nothing was computed. Call "
            "optimizer.step(closure=optimizer_closure)."
        )
    if run.scaler is not None:
        run.scaler.end_batch()
    progress.micro_batch = progress.skipped_in_window = 0
    if run.stepped:
        progress.global_step += 1
        if run.moved:
            run.step_schedulers_after_step()
    run.account.lap("optimizer")
    return outputs[-1]


def manual_batch(run: Run, batch: Any, batch_idx: int) -> Any:
    """Run a training step that steps its optimizers itself; it counts as a step if one of them did."""
    run.stepped = False
    with run.step_context:
        output = run.training_step(*(batch, batch_idx)[: run.arity])
    if run.scaler is not None:
        run.scaler.end_batch()
    if not run.handles:
        run.stepped = True  # without an optimizer every batch counts, so that limits and logging still have a unit
    if run.stepped:
        run.progress.global_step += 1
        if run.moved and run.step_schedulers:
            run.step_schedulers_after_step()
    run.account.lap("training step")
    return detached(output) if run.wants_outputs else None


def step_boundary(run: Run) -> None:
    """Do what may only be done between two steps: log, validate, save."""
    progress = run.progress
    stepped, run.stepped = run.stepped, False
    if stepped and run.log_every_n_steps and progress.global_step % run.log_every_n_steps == 0:
        with run.account.spent_on("logging"):
            run.outlet.send(run.metrics.step_values(), progress.global_step)
        run.account.sample_device()
    if run.schedule is not None and run.schedule.pay():
        with run.account.spent_on("validation"):
            validate(run)
    if stepped and run.step_schedulers:
        run.step_plateau_schedulers(run.step_schedulers, progress.global_step)
    if run.agreement is not None and not run.is_last_batch and run.agreement.is_due(progress.total_batches):
        run.agreement.reach(run)
    # Last, so that a run that goes on from a checkpoint misses nothing of this boundary. After an epoch's last batch its
    # end serves them, so that a checkpoint is of a whole epoch.
    if run.requests and not run.is_last_batch:
        run.serve_requests()


def begin_epoch(run: Run) -> dict[str, Any] | None:
    """Open an epoch: fresh loaders if they are to be reloaded, a new order, its hooks.

    Returns:
        Where to go on reading, if a checkpoint was written in the middle of this epoch.
    """
    run.is_last_batch = False
    if run.progress.micro_batch == 0:  # else a window goes on that was begun before a restart
        run.window = 0
    position = None if run.restored is None else run.restored.data.get("position")
    if run.progress.batch == 0:
        run.take_up_restored()
    run.reload_loaders(run)
    set_epoch(run.source.loader, run.progress.epoch)
    run.metrics.enter_epoch_hooks()
    call(run.hooks.on_train_epoch_start)
    run.take_up_restored()  # in the middle of an epoch, what its first hooks drew and logged came before the checkpoint
    run.metrics.enter_batches()
    return position


def end_epoch(run: Run) -> None:
    """Close an epoch: its hooks, its means, its schedulers; then save if asked to."""
    progress, metrics = run.progress, run.metrics
    if progress.batch == 0 and run.window == 0:
        raise DataError(
            f"{run.source.name} gave no batch in epoch {progress.epoch}. A generator can be read only once: return an object "
            "whose __iter__ starts anew, such as a DataLoader."
        )
    progress.micro_batch = progress.skipped_in_window = 0
    run.held.clear()
    metrics.enter_epoch_hooks()
    metrics.publish_epoch()
    call(run.hooks.on_train_epoch_end)
    run.outlet.send(metrics.publish_epoch(), progress.global_step)
    call(run.hooks.on_train_epoch_end_monitors)
    agree(run)
    progress.epoch_ended = run.is_last_batch or not run.stop_reached()
    if progress.epoch_ended:
        run.step_plateau_schedulers(run.epoch_schedulers, progress.epoch + 1)
    metrics.reset()
    run.serve_requests()
    progress.start_epoch()


def validate(run: Run) -> None:
    """Validate in the middle of training, and leave training as it was."""
    assert run.validation is not None
    if run.mode is not Mode.MANUAL:
        call(run.hooks.on_validation_model_zero_grad)  # frees memory; in manual mode gradients are the user's
    run.strategy.send_buffers(run.module)
    evaluate(run.validation)
    report(run.validation)
    run.metrics.enter_batches()
    agree(run)


def sanity_check(run: Run, check: Evaluation) -> None:
    """Run a few validation batches before training, so that a mistake in them shows at once; nothing is kept."""
    rests = [source.rest() for source in check.sources]
    with isolated_random_state(run.device):
        evaluate(check)
    for source, rest in zip(check.sources, rests, strict=True):
        source.take_rest(rest)
    check.metrics.reset()
    check.metrics.end_evaluation()
    check.metrics.leave()
    call(run.hooks.on_sanity_check_end)


def evaluate(run: Evaluation) -> None:
    """Validate, test or predict: every batch of every loader, without gradients.

    Values are published when the epoch's hooks have run, and before the `end` hooks; the series stay open, for the
    caller to report and close.
    """
    hooks, metrics, several = run.hooks, run.metrics, len(run.sources) > 1
    outer, run.status.stage = run.status.stage, run.stage
    metrics.begin_evaluation()
    if not run.logs:
        metrics.leave()
    with evaluation_modes(run), run.no_grad():
        call(hooks.start)
        call(hooks.epoch_start)
        if run.logs:
            metrics.enter_batches()
        for dataloader_idx, source in enumerate(run.sources):
            metrics.begin_dataloader(dataloader_idx if several else None)
            set_epoch(source.loader, 0)
            which = (dataloader_idx,) if several else ()
            if run.in_step is None or source.even:
                reading = source.batches(run.move, dataloader_idx)
            else:
                reading = run.in_step(run, source, dataloader_idx)
            for batch_idx, (batch, _) in enumerate(reading):
                metrics.begin_batch(batch, batch_idx)
                note_indices(run, dataloader_idx)
                for hook in hooks.batch_start:
                    hook(batch, batch_idx, *which)
                with run.step_context:
                    output = run.step(*(batch, batch_idx, dataloader_idx)[: run.arity])
                if run.predictions is not None:
                    run.predictions[dataloader_idx].append(output)
                for hook in hooks.batch_end:
                    hook(output, batch, batch_idx, *which)
        metrics.begin_dataloader(None)
        if run.logs:
            metrics.enter_epoch_hooks()
        metrics.publish_epoch()
        call(hooks.epoch_end)
        metrics.publish_epoch()
        call(hooks.end)
    run.status.stage = outer


def report(run: Evaluation) -> None:
    """Send an evaluation's values to the loggers and close its series."""
    metrics = run.metrics
    progress = run.outlet.progress
    history = metrics.evaluation_history() if run.outlet.loggers else []
    before = progress.validation_batches if run.stage == "validation" else 0
    for batch_idx, values in history:
        run.outlet.send(dict(values), before + batch_idx, with_epoch=False)
    if history and run.stage == "validation":
        progress.validation_batches = before + max(batch_idx for batch_idx, _ in history) + 1
    run.outlet.send(metrics.publish_epoch(), progress.global_step)
    metrics.reset()
    metrics.end_evaluation()
    metrics.leave()  # training opens it again


@contextmanager
def evaluation_modes(run: Evaluation) -> Iterator[None]:
    """Set eval mode; afterwards give every submodule back the mode it had, a frozen BatchNorm its eval mode too."""
    modes = [(module, module.training) for module in run.module.modules()]
    if not run.own_eval:
        run.module.eval()
    call(run.hooks.model_eval)
    try:
        yield
    finally:
        if not run.own_train:
            for module, mode in modes:
                module.training = mode
    if run.own_train:
        call(run.hooks.model_train)


def note_indices(run: Evaluation, dataloader_idx: int) -> None:
    """Keep the sample indices of the present batch, for prediction writers."""
    if not run.records_indices:
        return
    run.batch_indices = run.sources[dataloader_idx].indices()
    run.epoch_batch_indices[dataloader_idx].append(run.batch_indices or [])


def skips_epoch(run: Run, batch: Any, batch_idx: int) -> bool:
    """Call the hooks before a training batch; whether one of them returned -1, which skips the rest of the epoch."""
    answers = [hook(batch, batch_idx) for hook in run.hooks.on_train_batch_start]
    skips = any(answer is not None and answer == -1 for answer in answers)
    return run.agreement.any(skips) if run.agreement is not None and run.agrees_on_skipping else skips


def rescale_gradients(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Make the gradients a mean over the batches that had a loss, when others of the window were skipped."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def rescaled(run: Run, total: Tensor | None) -> Tensor | None:
    """Rescale what a closure computed, where batches of its window had no loss; return its loss."""
    skipped = run.progress.skipped_in_window
    if skipped in (0, run.window):
        return total
    assert run.optimizer is not None
    factor = run.window / (run.window - skipped)
    rescale_gradients(run.optimizer, factor)
    return None if total is None else total * factor


def agree(run: Run) -> None:
    """Compare with the other ranks what each has asked for, at a place that all come by; nothing with one."""
    if run.agreement is not None:
        run.agreement.reach(run)


def call(hooks: Iterable[Hook]) -> None:
    """Call every hook of an event that has no arguments."""
    for hook in hooks:
        hook()
