"""``leyden convert``: a checkpoint of another library as one of leyden, and one of leyden as one of Lightning 2.x."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from leyden.checkpoint import remote
from leyden.checkpoint.atomic import filled, replace
from leyden.checkpoint.container import ForeignFileError
from leyden.checkpoint.format import load_checkpoint, read_metadata
from leyden.checkpoint.remote import PathLike, is_remote, local_path, open_stream
from leyden.checkpoint.store import exists, write_checkpoint
from leyden.compat.expansion import Size
from leyden.compat.lightning_checkpoint import VERSION_KEY, to_lightning
from leyden.compat.pickles import write
from leyden.errors import CheckpointError

_PARTS = {
    "hyper_parameters": "hyperparameters",
    "datamodule_hyper_parameters": "hyperparameters of the datamodule",
    "optimizer_states": "optimizers",
    "lr_schedulers": "schedulers",
    "callbacks": "states of callbacks",
}
_COUNTED = frozenset({
    "added_keys", "epoch", "global_step", "hparams_name", "hparams_omitted", "hparams_type", "left_out", "loops", "progress",
    "run_id", "scaler", "state_dict",
})  # fmt: skip
"""What goes without saying."""


@dataclass(frozen=True)
class Converted:
    """What was done.

    Attributes:
        source: what the source is, in words.
        target: what was written.
        kept: what of the source is in it.
        left_out: what is not, in sentences.
        remarks: what else there is to know, in sentences.
    """

    source: str
    target: str
    kept: tuple[str, ...]
    left_out: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def convert(source: PathLike, target: PathLike, force: bool = False) -> Converted:
    """Write the checkpoint ``source`` in the other format: of leyden as one of Lightning 2.x, anything else as one of leyden.

    The direction depends on what the source is; the names do not matter. Nothing in the source is run or imported.

    Args:
        source: a file or its URL; a folder of weights, or of a sharded checkpoint.
        target: the file to write, atomically.
        force: replace what is there.

    Raises:
        CheckpointError: the source cannot be read, the target is there already or a part of the source, it cannot be written, or
            it would be many times as large as the source, which is so if parts are shared; names the file.
    """
    source, target = os.fspath(source), os.fspath(target)
    if _same(source, target):
        raise CheckpointError(
            f"{target} is the source itself. Give another name, and delete the source when you have looked"
        )
    if _overlap(source, target):
        raise CheckpointError(
            f"{target} and the source {source} lie one within the other: writing it would change the source. Give another name"
        )
    if exists(target) and not force:
        raise CheckpointError(f"{target} is there already. Give another name, or --force to replace it")
    ours = _is_ours(source)
    given = load_checkpoint(source)
    if ours:
        made, left_out = to_lightning(given)
        _write_pickle(target, made)
        kept = _kept(made)
        return Converted(
            _named("leyden", given), "a checkpoint of Lightning 2.x", kept, tuple(left_out), _remarks(target)
        )
    version = next((str(given[key]) for key in given if key == VERSION_KEY), "")
    name = f"Lightning {version}".strip() if "global_step" in given else ""
    _refuse_inflated(source, given)
    write_checkpoint(target, given)
    told = name and "left_out" not in _added(given)  # else the word is a user's
    left_out = [*given.get("left_out", ())] if told else []
    if "optimizer_states" in given:
        left_out.append("A random state, because files of Lightning have none.")
    what = _named(name, given) if name else "weights"
    return Converted(what, "a checkpoint of leyden", _kept(given), tuple(left_out))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what ``leyden convert`` takes."""
    parser.add_argument(
        "source",
        help="a checkpoint of leyden, a checkpoint of Lightning, a state dict of torch.save, or a folder of weights",
    )
    parser.add_argument("target", help="the file to write: of Lightning 2.x if the source is of leyden, else of leyden")
    parser.add_argument("--force", action="store_true", help="replace the target if it is there")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what was done and what was left out."""
    done = convert(arguments.source, arguments.target, arguments.force)
    print(f"{arguments.source}: {done.source}\n{arguments.target}: {done.target}, with {', '.join(done.kept)}")
    for sentence in done.left_out:
        print(f"left out: {sentence}")
    for sentence in done.remarks:
        print(f"note: {sentence}")
    return 0


def _is_ours(path: str) -> bool:
    try:
        return any(key.startswith("leyden_") for key in read_metadata(path))
    except ForeignFileError:
        return False


def _same(source: str, target: str) -> bool:
    if is_remote(source) or is_remote(target):
        return source == target
    ends = local_path(source), local_path(target)
    return all(end.exists() for end in ends) and ends[0].samefile(ends[1])


def _overlap(source: str, target: str) -> bool:
    """Whether one is a folder in which the other is."""
    if is_remote(source) or is_remote(target):
        return is_remote(source) and target.startswith(f"{source.rstrip('/')}/")
    ends = local_path(source).resolve(), local_path(target).resolve()
    return ends[0] in ends[1].parents or ends[1] in ends[0].parents


def _refuse_inflated(source: str, given: Mapping[str, Any]) -> None:
    """Refuse what is small because its parts share memory: a file of leyden writes each part for itself.

    Raises:
        CheckpointError: it would become many times as large.
    """
    try:
        size = Size(given)
    except RecursionError:
        raise CheckpointError(f"{source}: its data is nested too deeply") from None
    for what, written, held, slack in (
        ("tensors", size.written, size.held, 1 << 26),
        ("plain data", size.expanded, size.plain, 1 << 22),
    ):
        if written > 8 * held + slack:
            raise CheckpointError(
                f"{source}: its {what} share memory, and written each for itself would take {written / 1e6:,.0f} MB or more "
                f"instead of {held / 1e6:,.1f} MB. Save what is shared once; for weights, without Tensor.expand"
            )


def _remarks(target: str) -> tuple[str, ...]:
    with open_stream(target) as stream:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
    if not unsafe:
        return ()
    return (
        f"it holds {', '.join(sorted(unsafe))}, which Lightning refuses unless told that you trust the file: "
        "Trainer.fit(…, weights_only=False), or within torch.serialization.safe_globals([…]).",
    )


def _write_pickle(target: str, value: Mapping[str, Any]) -> None:
    if is_remote(target):
        remote.write(target, lambda stream: write(stream, value))
    else:
        path = local_path(target)
        replace(path, lambda held: filled(path, held, lambda stream: write(stream, value)))


def _named(library: str, given: Mapping[str, Any]) -> str:
    return f"a checkpoint of {library}, of epoch {given.get('epoch', 0)}, step {given.get('global_step', 0)}"


def _added(given: Mapping[str, Any]) -> set[str]:
    """Keys of the user that have names of leyden's own."""
    added = given.get("added_keys")
    return set(added) if isinstance(added, list) else set()


def _kept(made: Mapping[str, Any]) -> tuple[str, ...]:
    weights = made.get("state_dict", {})
    numbers = sum(each.numel() for each in weights.values() if isinstance(each, torch.Tensor))
    parts = [f"{len(weights)} weights of {numbers:,} numbers"]
    parts += [f"{name} ({len(made[key])})" for key, name in _PARTS.items() if made.get(key)]
    known = {*_PARTS, *_COUNTED, VERSION_KEY}
    known -= _added(made)
    others = [repr(key) for key in made if key not in known]
    return (*parts, *others)
