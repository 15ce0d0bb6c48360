"""What the ranks of a run do together around the loop: download once, log from one, load the same file, draw other numbers.

Each function is called by all ranks at the same place. With one rank they do what one process does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from leyden.checkpoint.find import find_and_load
from leyden.checkpoint.format import contents, load_checkpoint, opened, read_about, verify
from leyden.data.shares import Share
from leyden.series import interleaved
from leyden.shards import is_sharded
from leyden.strategy.random_state import spread_random_state

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from leyden.callbacks import ModelCheckpoint
    from leyden.datamodule import LightningDataModule
    from leyden.loggers import Logger
    from leyden.module import LightningModule
    from leyden.strategy import Strategy

__all__ = [
    "Found",
    "find_checkpoint",
    "gather_predictions",
    "prepare_data",
    "read_checkpoint",
    "share_loggers",
    "share_of_data",
    "spread_random_state",
    "told_of_waiting",
]

WAIT_TOLD_AFTER_S = 10.0
Found = tuple[dict[str, Any], str]


def prepare_data(strategy: Strategy, module: LightningModule, datamodule: LightningDataModule | None) -> None:
    """Call `prepare_data` of datamodule and module on one rank of each machine, while the others wait.

    An owner with ``prepare_data_per_node = False`` is called on one rank of all, for disks that machines share.
    """
    for owner in (datamodule, module):
        per_node = getattr(owner, "prepare_data_per_node", True)
        if owner is not None and (strategy.local_rank if per_node else strategy.global_rank) == 0:
            owner.prepare_data()
    strategy.barrier("prepare_data")


def share_loggers(strategy: Strategy, loggers: Sequence[Logger]) -> Sequence[Logger]:
    """Give the loggers of all ranks the version of rank 0's; return those that write: none but on rank 0."""
    if strategy.world_size == 1:
        return loggers
    for logger in loggers:
        version = strategy.broadcast(logger.version if strategy.is_global_zero else None)
        if not strategy.is_global_zero:
            logger.adopt_version(version)
    return loggers if strategy.is_global_zero else ()


def share_of_data(strategy: Strategy) -> Share | None:
    """Which part of the data this rank reads; None if it reads all."""
    if strategy.data_world_size == 1:
        return None
    return Share(
        strategy.data_rank,
        strategy.data_world_size,
        strategy.broadcast,
        lambda number: -strategy.highest([-number])[0],
    )


def find_checkpoint(
    strategy: Strategy,
    module: LightningModule,
    ckpt_path: Any,
    callbacks: Sequence[ModelCheckpoint],
    root: str,
    verb: str,
    weights_only: bool = False,
) -> Found | None:
    """Load the checkpoint that ``ckpt_path`` means to rank 0, on every rank; see `find_and_load`.

    A run that the elastic launcher has started again goes on from its own newest checkpoint, whatever ``ckpt_path`` says.
    Where ranks have parts of the module, each reads its part of the checkpoint.
    """
    found = None
    if strategy.is_global_zero:
        load: Callable[..., dict[str, Any]] = load_checkpoint
        if strategy.shards_state:
            load = _read_through if ckpt_path == "last" else _look_at
        run_id = strategy.interrupted_run() if verb == "fit" else None
        if run_id is not None:
            print("Started again after a failure: the newest checkpoint of this run is looked for.", flush=True)
            whole = _read_through if strategy.shards_state else load_checkpoint
            found = find_and_load("last", callbacks, root, verb, run_id=run_id, load=whole)
        if found is None:
            found = find_and_load(ckpt_path, callbacks, root, verb, weights_only, load=load)
    path = strategy.broadcast(None if found is None else found[1])
    if path is None:
        return None
    if found is not None and not strategy.shards_state:
        return found
    return read_checkpoint(strategy, module, path, weights_only), path


def read_checkpoint(
    strategy: Strategy, module: LightningModule, path: str, weights_only: bool = False
) -> dict[str, Any]:
    """Load one checkpoint on every rank: whole, or this rank's part of it."""
    if not strategy.shards_state:
        return load_checkpoint(path, weights_only=weights_only)
    from leyden.checkpoint.sharded import load_sharded, templates_for

    named = templates_for(module)
    # there are no optimizers yet; their states are cut like any parameter of their shape, and exchanged if that was another
    alike = {each.shape: each for each in module.parameters() if is_sharded(each)}

    def template(name: str, shape: torch.Size) -> Tensor | None:
        return alike.get(shape) if name.startswith("optimizer") else named(name, shape)

    return load_sharded(path, template, strategy.host_group, weights_only)


def _look_at(path: str, weights_only: bool = False) -> dict[str, Any]:
    """See that there is a checkpoint; each rank will read and verify its own part."""
    read_about(path)
    return {}


def _read_through(path: str, weights_only: bool = False) -> dict[str, Any]:
    """See that a checkpoint is whole, one tensor after the other, and keep nothing."""
    with opened(path) as file:
        _, checksums = contents(file.metadata, weights_only)
        for name in file.entries:
            tensor = file.read(name)
            if name not in getattr(file, "sharded", ()):  # which are verified when they are read
                verify(name, tensor, checksums)
    return {}


def gather_predictions(strategy: Strategy, predictions: list[list[Any]]) -> list[list[Any]]:
    """The predictions of all ranks, by loader, in the order of the data: each rank has every N-th batch."""
    if strategy.data_world_size == 1:
        return predictions
    by_rank = strategy.gather_data_ranks(predictions)
    return [interleaved([parts[loader] for parts in by_rank]) for loader in range(len(predictions))]


@contextmanager
def told_of_waiting(strategy: Strategy, call: str) -> Iterator[None]:
    """Say so if this rank is long in here: others may never come, for whom a collective waits half an hour."""
    if strategy.world_size == 1:
        yield
        return
    line = (
        f"[rank {strategy.global_rank}] has been in {call} for {WAIT_TOLD_AFTER_S:.0f} s. If it waits for other ranks: all of "
        "them must call it, not one of them under `if trainer.is_global_zero`.\n"
    )
    timer = threading.Timer(WAIT_TOLD_AFTER_S, lambda: sys.stderr.write(line))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
