"""Evaluation where a forward pass needs all ranks, and ranks have different numbers of batches.

A rank that has run out goes through its last batch again, as often as others still need it for theirs; of that nothing is
logged, collected or told to anybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from leyden.data.loader import Source
from leyden.errors import DataError
from leyden.metric_ranks import copied_states
from leyden.metrics_state import restore_metric_objects

if TYPE_CHECKING:
    from leyden.run import Evaluation
    from leyden.strategy import Strategy


def batches_in_step(
    strategy: Strategy, run: Evaluation, source: Source, dataloader_idx: int
) -> Iterator[tuple[Any, int]]:
    """Give this rank's batches, and at their end go on with the last one until all ranks have ended.

    There is one small collective of the hosts for each batch.

    Raises:
        DataError: if this rank has no batch at all and others have.
    """
    batch, count = None, 0
    for batch, following in source.batches(run.move, dataloader_idx):
        strategy.highest([1])
        count += 1
        yield batch, following
    if not strategy.highest([0])[0]:
        return
    if count == 0:
        raise DataError(
            f"{source.name} gave rank {strategy.global_rank} no batch, and others some. Where parameters are sharded every "
            "rank needs one. Give it more data, or evaluate with a strategy that does not shard."
        )
    kept, metrics = copied_states(run.module), run.module._metrics
    run.module.__dict__["_metrics"] = None
    try:
        others_go_on = True
        while others_go_on:
            with run.step_context:
                run.step(*(batch, count - 1, dataloader_idx)[: run.arity])
            others_go_on = bool(strategy.highest([0])[0])
    finally:
        run.module.__dict__["_metrics"] = metrics
        restore_metric_objects(run.module, kept)
