"""Files of others as checkpoints: those of Lightning, state dicts of ``torch.save``, folders of weights from model hubs.

The core comes here when a file is not a safetensors file. Whatever it is, nothing of it is run or imported; see
`leyden.compat.pickles`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from leyden.checkpoint.container import HUB_FILES, Reader, is_hub_folder, shown, strict_json
from leyden.checkpoint.format import RUN_STATE_KEYS, About
from leyden.checkpoint.remote import is_remote, local_path, modified, open_stream
from leyden.compat.inert import Deferred
from leyden.compat.lightning_checkpoint import (
    VERSION_KEYS,
    from_lightning,
    is_lightning,
    malformed,
    progress_of,
    training_keys,
)
from leyden.compat.pickles import Pickled
from leyden.compat.scan import said
from leyden.errors import CheckpointError

_FILE_NAME = re.compile(r"[\w.+-]+\.safetensors")
_MAX_INDEX_BYTES = 100_000_000


def load_foreign(
    path: str | os.PathLike[str], device: torch.device, weights_only: bool = False, allow: Iterable[Any] = ()
) -> dict[str, Any]:
    """Read a checkpoint that leyden did not write into a dict with the keys that it would have.

    Args:
        path: the file or its URL; or a folder with ``model.safetensors``, or with its shards and their index.
        device: of the tensors.
        weights_only: leave what only a training needs in the file, unread.
        allow: classes that the file may name, see `leyden.compat.pickles.Pickled`.

    Raises:
        CheckpointError: damaged, of a kind that is not known, or it names what is not allowed; names the file.
    """
    with _naming(path):
        if not is_remote(path) and is_hub_folder(local_path(path)):
            return {"state_dict": _hub_weights(local_path(path), device)}
        with _buffered(path) as stream:
            file = Pickled(stream, allow)
            tree = file.tree
            if is_lightning(tree):
                unread = training_keys(tree) if weights_only else frozenset()
                given = file.load({key: each for key, each in tree.items() if key not in unread}, device)
                with _structure():
                    made = from_lightning(given)
                return {key: each for key, each in made.items() if not (weights_only and key in RUN_STATE_KEYS)}
            if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
                if odd := [said(key) for key in tree["state_dict"] if not isinstance(key, str)]:
                    raise CheckpointError(f"its state_dict has the key {odd[0]}, and names of weights are strings")
                loaded: dict[str, Any] = file.load({"state_dict": tree["state_dict"]} if weights_only else tree, device)
                return loaded
            if _is_state_dict(tree):
                return {"state_dict": file.load(tree, device)}
            raise CheckpointError(_neither(tree))


def about_foreign(path: str | os.PathLike[str]) -> About:
    """Say of such a file what `leyden.checkpoint.format.read_about` says; its tensors are not read.

    Raises:
        CheckpointError: as `load_foreign`.
    """
    with _naming(path):
        saved_at = modified(path)
        if not is_remote(path) and is_hub_folder(local_path(path)):
            return About(saved_at=saved_at)
        with _buffered(path) as stream:
            file = Pickled(stream)
            tree = file.tree
            if not is_lightning(tree):
                return About(saved_at=saved_at)
            counters = {key: tree[key] for key in (*VERSION_KEYS, "epoch", "global_step", "loops") if key in tree}
            counters = {**file.load(counters), "optimizer_states": tree.get("optimizer_states")}
        with _structure():
            progress = progress_of(counters)
        return About(progress.epoch, progress.global_step, None, saved_at, "optimizer_states" in tree)


def read(path: str | os.PathLike[str], allow: Iterable[Any] = ()) -> Any:
    """Return whatever ``torch.save`` wrote, as plain data and tensors on the CPU: the safe `torch.load`.

    Args:
        path: the file or its URL.
        allow: see `leyden.compat.pickles.Pickled`.

    Raises:
        CheckpointError: damaged, not such a file, or it names what is not allowed; names the file.
    """
    with _naming(path), _buffered(path) as stream:
        file = Pickled(stream, allow)
        return file.load(file.tree)


@contextlib.contextmanager
def _buffered(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open for reads of single bytes, which pickles are made of."""
    with open_stream(path) as stream:
        if isinstance(stream, io.RawIOBase):
            with io.BufferedReader(stream) as buffered:
                yield buffered
        else:
            yield stream


def _is_state_dict(tree: Any) -> bool:
    """Whether it is tensors by name; modules may add an ``_extra_state`` of any kind."""
    if not isinstance(tree, dict) or not tree or not all(isinstance(key, str) for key in tree):
        return False
    return all(isinstance(each, Deferred) or key.endswith("_extra_state") for key, each in tree.items())


def _neither(tree: Any) -> str:
    if not isinstance(tree, dict):
        return f"neither a checkpoint nor a state dict, but a {type(tree).__name__}"
    keys = ", ".join(map(said, list(tree)[:12]))
    return (
        f"neither a checkpoint of Lightning nor a state dict; its keys are {keys}. If one of them holds the weights, such as "
        "'model': module.load_state_dict(leyden.compat.foreign.read(path)['model'])"
    )


def _hub_weights(folder: Path, device: torch.device) -> dict[str, Any]:
    """The weights of a folder, from one file or from the files that its index names."""
    index = folder / HUB_FILES[0]
    if not index.is_file():
        return dict(_tensors(folder / HUB_FILES[1], None, device))
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{index.name} is larger than {_MAX_INDEX_BYTES // 10**6} MB")
    parsed = strict_json(index.read_text(encoding="utf-8", errors="replace"))
    places = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(places, dict) or not all(isinstance(each, str) for each in places.values()):
        raise CheckpointError(f"{index.name} has no weight_map of tensors' names to files")
    weights: dict[str, Any] = {}
    for name in sorted(set(places.values())):
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"{index.name} names the file {name[:80]!r}, which is no *.safetensors in the same folder"
            )
        weights |= _tensors(folder / name, [key for key, file in places.items() if file == name], device)
    return {key: weights[key] for key in places}


def _tensors(path: Path, names: list[str] | None, device: torch.device) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"the shard {path.name} is missing")
    with path.open("rb", buffering=0) as stream:
        reader = Reader(stream)
        wanted = reader.entries if names is None else {name: reader.entries.get(name) for name in names}
        if lost := next((name for name, entry in wanted.items() if entry is None), None):
            raise CheckpointError(f"the tensor {shown(lost)} is not in {path.name}, where the index says it is")
        for name in sorted(wanted, key=lambda name: reader.entries[name].begin):
            yield name, reader.read(name).to(device)


@contextlib.contextmanager
def _structure() -> Iterator[None]:
    """Say of what is missing where Lightning has it that the file has Lightning's keys only."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise malformed(f"{type(error).__name__}: {error!s:.200}") from error


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name in front of what is wrong with it."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except CheckpointError as error:
        named = str(error).startswith(f"{path}: ")
        raise CheckpointError(str(error) if named else f"{path}: {error}") from error.__cause__
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"{path}: damaged, or made to do harm: {type(error).__name__}: {error!s:.200}") from error
