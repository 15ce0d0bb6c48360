"""What is said of how a loader is divided among ranks."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from leyden.data.combined import CombinedLoader
from leyden.data.indexed import is_plain, items_of, knows_ranks, size_of
from leyden.data.reader import as_torch
from leyden.data.shares import Share
from leyden.errors import warn


def describe_division(loader: Any, name: str, share: Share, training: bool, divides: bool) -> str:
    """Say in one line how the loader is divided; rank 0 warns of what may not be meant.

    Args:
        loader: what the hook gave.
        name: the hook.
        share: of this rank.
        training: whether it is trained on, so that ranks need as many batches.
        divides: whether loaders are to be divided, from ``use_distributed_sampler``.
    """
    if isinstance(loader, CombinedLoader):
        lines = [describe_division(part, name, share, training, divides) for part in loader.flattened]
        return "; ".join(dict.fromkeys(lines))
    if not divides:
        return f"each of {share.of} ranks reads all that it gives there: use_distributed_sampler=False"
    loader = as_torch(loader)
    first = share.rank == 0
    if isinstance(loader, (list, tuple)):
        if training and first:
            _warn_of_trimming(name, len(loader), share.of)
        return f"{share.of} ranks take the batches in turns"
    if not is_plain(loader):
        if first:
            _warn_of_undivided(loader, name, share.of)
        return f"not divided: each of {share.of} ranks reads all that it gives there"
    if knows_ranks(loader):
        if first:
            _warn_of_own_sampler(loader, name, share.of, training)
        return "divided by its own sampler, which knows about ranks"
    size = size_of(loader)
    if size is None:
        if training and first:
            _warn_of_trimming(name, items_of(loader), share.of)
        return f"{share.of} ranks take the batches of its sampler in turns"
    return f"divided among {share.of} ranks: their batches of {size} make up one process's batch of {size * share.of}"


def _warn_of_trimming(name: str, batches: int | None, ranks: int) -> None:
    if batches is None or batches % ranks == 0:
        return
    warn(
        "trimmed-batches",
        f"{name}: {batches} batches cannot be divided evenly among {ranks} ranks, so the last {batches % ranks} of each epoch "
        "are not trained on. A DataLoader with batch_size=… can be divided sample by sample.",
    )


def _warn_of_undivided(loader: Any, name: str, ranks: int) -> None:
    what = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
    warn(
        "undivided",
        f"{name}: {what} cannot be divided, so each of {ranks} ranks reads all that it gives there. Let it give each rank "
        "a part of its own (by torch.distributed.get_rank(), or split_dataset_by_node of Hugging Face's datasets) and say "
        "use_distributed_sampler=False.",
    )


def _warn_of_own_sampler(loader: DataLoader[Any], name: str, ranks: int, training: bool) -> None:
    samplers = (loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None), loader.sampler)
    for sampler in samplers:
        replicas = getattr(sampler, "num_replicas", None)
        if isinstance(replicas, int) and replicas != ranks:
            warn(
                "sampler-ranks",
                f"{name}: {type(sampler).__name__} divides the data by {replicas}, but {ranks} ranks read different data. Leave "
                "the sampler out, and leyden divides the data.",
            )
            return
        if isinstance(sampler, DistributedSampler) and not training:
            samples = len(sampler.dataset)  # type: ignore[arg-type]
            if not sampler.drop_last and sampler.total_size > samples:
                warn(
                    "padded-evaluation",
                    f"{name}: DistributedSampler gives {sampler.total_size - samples} of {samples} samples twice, so that ranks "
                    "have as many, and metrics count them twice. Leave the sampler out: leyden divides the data without that.",
                )
            return
