"""The state of a run, part by part: captured into one dict, applied from one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from leyden.callbacks.callback import Callback
from leyden.data.generators import generator_states, module_generators, owned_generators
from leyden.errors import CheckpointError, warn
from leyden.fused import load_optimizer
from leyden.hooks import overridden
from leyden.loggers.logger import capture_loggers
from leyden.metrics_state import capture_metrics, emptied, merged, restore_metrics
from leyden.module import LightningModule
from leyden.optimizers import gradients_of, load_gradients
from leyden.run import Restored
from leyden.seed import capture_random_state
from leyden.strategy.random_state import spread_random_state

if TYPE_CHECKING:
    from leyden.datamodule import LightningDataModule
    from leyden.run import Run
    from leyden.strategy import Strategy
    from leyden.trainer import Trainer


def capture(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    callbacks: Sequence[Callback],
    run: Run | None,
    weights_only: bool,
) -> dict[str, Any]:
    """Return the state as one dict with the keys that hooks know.

    Args:
        trainer: passed to callbacks.
        module: whose weights.
        datamodule: whose state.
        callbacks: whose states.
        run: the training that is going on; None leaves its part out.
        weights_only: whether to leave out everything that only training needs.
    """
    saved = module._saved_hyperparameters
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "run_id": None if run is None else run.run_id,
        "state_dict": trainer.strategy.module_state(module),
        "hyper_parameters": saved.current(),
        "hparams_name": saved.name,
        "hparams_type": type(saved.shown).__name__,
        "hparams_omitted": dict(saved.omitted),
    }
    if datamodule is not None:
        checkpoint["datamodule_hyper_parameters"] = dict(datamodule.hparams)
    if not weights_only and run is not None:
        checkpoint["optimizer_states"] = [handle.optimizer.state_dict() for handle in run.handles]
        checkpoint["optimizer_windows"] = _window_states(run)
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in run.schedulers]
        checkpoint["scaler"] = run.scaler.scaler.state_dict() if run.scaler is not None else None
        checkpoint["progress"] = run.progress.state_dict()
        checkpoint["should_stop"] = run.should_stop
        if run.compiled is not None:
            checkpoint["compiled"] = run.compiled.state_dict()
        # what a resumed run has not taken up yet is still as it was
        waiting = run.restored
        checkpoint["metrics"] = waiting.metrics if waiting else capture_metrics(run.metrics, module, run.device)
        checkpoint["loggers"] = capture_loggers(trainer.loggers)
        checkpoint["loader_states"] = waiting.data if waiting else _data_state(run)
        checkpoint["callbacks"] = {
            callback.state_key: state for callback in callbacks if (state := callback.state_dict())
        }
        own = own_generators(module, datamodule, callbacks)
        drawn = capture_random_state(run.device) | {"own": generator_states(own)}
        checkpoint["random_state"] = waiting.random_state if waiting else drawn
        _add_other_ranks(checkpoint, trainer.strategy)
        if datamodule is not None and (state := datamodule.state_dict()):
            checkpoint[type(datamodule).__qualname__] = state
    for callback in callbacks:
        callback.on_save_checkpoint(trainer, module, checkpoint)
    module.on_save_checkpoint(checkpoint)
    return checkpoint


_OF_EACH_RANK = ("random_state", "metrics", "loader_states")


def _add_other_ranks(checkpoint: dict[str, Any], strategy: Strategy) -> None:
    """Put what each rank has of its own beside that of rank 0, which stands where one process has it."""
    if strategy.data_world_size > 1:
        own = {key: checkpoint[key] for key in _OF_EACH_RANK}
        if not strategy.shards_state:  # else each rank writes its part of the gradients as it does of the weights
            own["optimizer_windows"] = checkpoint["optimizer_windows"]
        checkpoint["other_ranks"] = strategy.gather_data_ranks(own)[1:]


def _of_this_rank(checkpoint: dict[str, Any], strategy: Strategy) -> tuple[dict[str, Any], bool]:
    """What a checkpoint has for this rank, and whether it was written by as many ranks as there are now.

    If not, rank 0 goes on with what all of them had logged, and the others begin anew. The gradients of windows that were begun
    are then the mean of theirs, on every rank, since the mean over ranks is what they are for.
    """
    first = {key: checkpoint.get(key) for key in (*_OF_EACH_RANK, "optimizer_windows")}
    parts = [first, *checkpoint.get("other_ranks", ())]
    if len(parts) == strategy.data_world_size:
        return parts[strategy.data_rank], True
    metrics = [part["metrics"] for part in parts]
    if metrics[0] is not None:
        parts[0]["metrics"] = merged(metrics) if strategy.data_rank == 0 else emptied(metrics[0])
    if all("optimizer_windows" in part for part in parts):
        parts[0]["optimizer_windows"] = _mean_windows([part["optimizer_windows"] or [] for part in parts])
    return parts[0], False  # divided loaders stood at the same place on all ranks


def wanted_by_hooks(module: LightningModule, callbacks: Sequence[Callback]) -> bool:
    """Whether somebody overrides `on_load_checkpoint`, and so may look at more of a checkpoint than its weights."""
    return overridden(module, "on_load_checkpoint", LightningModule) or any(
        overridden(callback, "on_load_checkpoint", Callback) for callback in callbacks
    )


def apply_weights(
    trainer: Trainer, module: LightningModule, callbacks: Sequence[Callback], checkpoint: dict[str, Any], path: str
) -> None:
    """Give the module the weights of a checkpoint.

    Raises:
        CheckpointError: if there are none, or names or shapes do not fit; the message is torch's, with the file's name.
    """
    for callback in callbacks:
        callback.on_load_checkpoint(trainer, module, checkpoint)
    module.on_load_checkpoint(checkpoint)
    if "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path} has no 'state_dict', so there are no weights in it; it has {', '.join(checkpoint)}."
        )
    try:
        trainer.strategy.load_module(module, checkpoint["state_dict"], module.strict_loading)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {type(module).__name__}: {error}") from error


def apply_optimizers(run: Run, checkpoint: dict[str, Any], path: str) -> None:
    """Give the run the optimizers, schedulers and loss scaler of a checkpoint.

    Raises:
        CheckpointError: if the checkpoint has other ones.
    """
    for key, here in (("optimizer_states", run.handles), ("lr_schedulers", run.schedulers)):
        if len(checkpoint[key]) != len(here):
            raise CheckpointError(
                f"{path} has {len(checkpoint[key])} {key.replace('_', ' ')}, but configure_optimizers made {len(here)}."
            )
    for handle, state in zip(run.handles, checkpoint["optimizer_states"], strict=True):
        try:
            load_optimizer(handle.optimizer, run.strategy.cut_optimizer_state(handle.optimizer, state))
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit {type(handle.optimizer).__name__}: {error}") from error
    for config, state in zip(run.schedulers, checkpoint["lr_schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    if run.scaler is not None and checkpoint.get("scaler"):
        run.scaler.scaler.load_state_dict(checkpoint["scaler"])


def own_part(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without what a user had added to it in another library under names that mean something here."""
    added = checkpoint.get("added_keys")
    return (
        {key: each for key, each in checkpoint.items() if key not in added} if isinstance(added, list) else checkpoint
    )


def apply_training(
    callbacks: Sequence[Callback],
    datamodule: LightningDataModule | None,
    run: Run,
    checkpoint: dict[str, Any],
    path: str,
) -> None:
    """Give the run the rest of a checkpoint: optimizers, schedulers, counters, callbacks, random state.

    Raises:
        CheckpointError: if the checkpoint has weights only, or other optimizers.
    """
    checkpoint = own_part(checkpoint)
    if "optimizer_states" not in checkpoint or "progress" not in checkpoint:
        raise CheckpointError(
            f"{path} holds weights only, so training cannot go on from it. To start anew from its weights: "
            "model.load_state_dict(leyden.load_checkpoint(path)['state_dict']), then fit without ckpt_path."
        )
    apply_optimizers(run, checkpoint, path)
    run.run_id = checkpoint.get("run_id") or run.run_id
    run.progress.load_state_dict(checkpoint["progress"])
    run.progress.start_epoch()
    own, as_before = _of_this_rank(checkpoint, run.strategy)
    windows = own.get("optimizer_windows") or checkpoint.get("optimizer_windows")
    _apply_windows(run, windows or [None] * len(run.handles))
    run.should_stop = bool(checkpoint.get("should_stop"))
    if run.compiled is not None and checkpoint.get("compiled"):
        run.compiled.load_state_dict(checkpoint["compiled"])
    metrics = own["metrics"]
    if metrics is not None:
        restore_metrics(run.metrics, run.module, metrics, run.device)  # for hooks to see, before training begins
    states = dict(checkpoint.get("callbacks", {}))
    for callback in callbacks:
        # older files of Lightning know a callback by its class alone
        key = next((key for key in (callback.state_key, type(callback).__qualname__) if key in states), None)
        if key is not None:
            callback.load_state_dict(states.pop(key))
    if states:
        warn(
            "callback-state", f"{path} has the state of callbacks that this Trainer does not have: {', '.join(states)}."
        )
    if datamodule is not None and type(datamodule).__qualname__ in checkpoint:
        datamodule.load_state_dict(checkpoint[type(datamodule).__qualname__])
    if run.strategy.is_global_zero:
        for left_out in (*checkpoint.get("left_out", ()), *_lost_window(run, checkpoint)):
            warn("left-out", f"{path} is of another library, and this is not taken over: {left_out}")
        _tell(run, path)
    drawn = own["random_state"] or {}  # files of Lightning have none: the run goes on with this process's numbers
    run.restored = Restored(
        drawn,
        metrics,
        own["loader_states"] or {},
        lambda: own_generators(run.module, datamodule, callbacks),
        None if as_before and drawn else partial(spread_random_state, run.strategy, run.device),
    )


def _lost_window(run: Run, checkpoint: dict[str, Any]) -> list[str]:
    """What there is to say of a window of batches that another library had begun: its file has no gradients."""
    begun = run.progress.batch % run.accumulate if "left_out" in checkpoint and run.optimizer is not None else 0
    if not begun:
        return []
    return [
        f"The gradients of {begun} of {run.accumulate} batches that were accumulated (accumulate_grad_batches={run.accumulate}): "
        f"batch {run.progress.batch} begins a new step."
    ]


def _tell(run: Run, path: str) -> None:
    print(f"Going on from {path}: epoch {run.progress.epoch}, step {run.progress.global_step}.")
    if 0 <= run.max_epochs <= run.progress.epoch:
        print(f"max_epochs={run.max_epochs} is reached already, so nothing is left to train. Raise it to go on.")
    elif run.should_stop and run.stop_reached():
        print("Training had been asked to stop there, so nothing is left to train.")


def _window_states(run: Run) -> list[dict[str, Any] | None]:
    """The gradients of windows that were begun, by optimizer: those of `minimize`, and the loop's own.

    The loop's are there only if somebody saves by hand: within a batch they would be half-done, so the window begins anew.
    So it does where the ranks have not exchanged them yet.
    """
    states = [handle.window_state() for handle in run.handles]
    progress, optimizer = run.progress, run.optimizer
    if (
        optimizer is not None
        and progress.micro_batch
        and not run.held
        and (run.sync_gradients is None or not run.strategy.shards_state)
        and not run.source.is_within_batch(progress.batch)
    ):
        states[0] = {"accumulated": run.window, "gradients": gradients_of(optimizer)}
    return states


def _mean_windows(ranks: Sequence[Sequence[dict[str, Any] | None]]) -> list[dict[str, Any] | None]:
    """For each optimizer, the mean of the ranks' gradients; one that a rank has none of counts as zeros there."""
    found: list[dict[str, Any] | None] = []
    for windows in zip(*ranks, strict=True):
        begun = [window for window in windows if window is not None]
        if not begun:
            found.append(None)
            continue
        by_parameter = zip(*(window["gradients"] for window in begun), strict=True)
        sums = [[gradient for gradient in each if gradient is not None] for each in by_parameter]
        means = [sum(given[1:], given[0]) / len(ranks) if given else None for given in sums]
        found.append({**begun[0], "gradients": means})
    return found


def _apply_windows(run: Run, windows: Sequence[dict[str, Any] | None]) -> None:
    if run.optimizer is None:
        for handle, window in zip(run.handles, windows, strict=False):
            if window is not None:
                cut = run.strategy.cut_gradients(handle.optimizer, window["gradients"])
                handle.load_window_state({**window, "gradients": cut})
    elif windows[0] is None or not run.progress.micro_batch:
        run.progress.micro_batch = run.progress.skipped_in_window = 0
    else:
        run.window = int(windows[0]["accumulated"])
        load_gradients(run.optimizer, run.strategy.cut_gradients(run.optimizer, windows[0]["gradients"]))


def own_generators(
    module: LightningModule, datamodule: LightningDataModule | None, callbacks: Sequence[Callback]
) -> dict[str, Any]:
    """The random generators that the user's objects own, by names that are the same in every process."""
    found = {f"module{name}": each for name, each in module_generators(module).items()}
    found.update((f"datamodule{name}", each) for name, each in owned_generators(datamodule).items())
    for callback in callbacks:
        found.update((f"{callback.state_key}{name}", each) for name, each in owned_generators(callback).items())
    return found


def _data_state(run: Run) -> dict[str, Any]:
    """Where the training loader stands within its epoch, and what all loaders keep between two."""
    if not hasattr(run, "source"):
        return {}  # somebody saves before training
    progress = run.progress
    position = run.source.position(progress.batch) if progress.batch > 0 and not progress.epoch_ended else None
    validation = run.validation.sources if run.validation is not None else ()
    return {
        "position": position,
        "train": None if position is not None else run.source.rest(),
        "validation": [source.rest() for source in validation],
    }
