"""What ``ckpt_path`` means: a path, a URL, "best" or "last", looked for and loaded.

"last" is the newest checkpoint that is whole and that training can go on from, whatever its name: the newest by the time
noted in the file, among those in the folders of the Trainer's `ModelCheckpoint` callbacks. Whether one is whole is known
when all of it has been read, so finding and loading are one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from leyden.checkpoint import remote
from leyden.checkpoint.container import is_hub_folder
from leyden.checkpoint.folder import is_sharded
from leyden.checkpoint.format import About, load_checkpoint, read_about
from leyden.checkpoint.remote import filesystem, is_remote, local_path
from leyden.checkpoint.store import exists, join, list_checkpoints
from leyden.errors import CheckpointError, CheckpointNotFoundError, did_you_mean, reject, warn

if TYPE_CHECKING:
    from leyden.callbacks import ModelCheckpoint

_ALLOWED = "None, 'best', 'last', a path, or a URL"
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class _Candidate:
    """A file that "last" may mean: what it says of itself, or why it cannot be read."""

    path: str
    when: float
    about: About | None
    reason: str = ""

    @property
    def order(self) -> tuple[float, int, bool]:
        """Sorts by age; of two names of one file, ``last`` is the one to show."""
        steps = self.about.global_step if self.about is not None else 0
        return self.when, steps, _split(self.path)[1].startswith("last")


def find_and_load(
    ckpt_path: Any,
    callbacks: Sequence[ModelCheckpoint],
    root: str,
    verb: str,
    weights_only: bool = False,
    run_id: str | None = None,
    load: Callable[..., dict[str, Any]] = load_checkpoint,
) -> tuple[dict[str, Any], str] | None:
    """Load the checkpoint that ``ckpt_path`` means.

    Args:
        ckpt_path: None; "best", the best of the first callback that has one; "last", the newest that is whole (and in
            `fit` one that training can go on from); a path; a URL.
        callbacks: the Trainer's.
        root: its ``default_root_dir``.
        verb: what the checkpoint is for.
        weights_only: leave the run's state in the file, unread.
        run_id: for "last": only those of this training.
        load: what is called with a path and ``weights_only``, and raises CheckpointError for one that is not whole.

    Returns:
        The checkpoint and its path; None to go on without: none was asked for, or "last" in `fit` where there is none yet.

    Raises:
        CheckpointError: there is none, or it is damaged; for "last": all there are.
        ConfigurationError: ``ckpt_path`` is something else.
    """
    if ckpt_path is None:
        return None
    if not isinstance(ckpt_path, (str, os.PathLike)) or isinstance(os.fspath(ckpt_path), bytes):
        reject("ckpt_path", ckpt_path, _ALLOWED)
    path = os.fspath(ckpt_path)
    if path == "last":
        return _last(callbacks, root, verb, weights_only, run_id, load)
    if path == "best":
        path = next((callback.best_model_path for callback in callbacks if callback.best_model_path), "")
        if not path:
            raise CheckpointError(
                f"{verb}(ckpt_path='best'): no best checkpoint is known. It is known after fit with a ModelCheckpoint that has "
                "saved; give a path otherwise."
            )
    _check_named(path, verb)
    try:
        return load(path, weights_only=weights_only), path
    except CheckpointError as error:
        whole = _newest_whole_beside(path)
        hint = f" The newest whole checkpoint beside it is {whole}." if whole else ""
        raise CheckpointError(f"{verb}(ckpt_path={path!r}): {error}.{hint}") from error


def _last(
    callbacks: Sequence[ModelCheckpoint],
    root: str,
    verb: str,
    weights_only: bool,
    run_id: str | None,
    load: Callable[..., dict[str, Any]],
) -> tuple[dict[str, Any], str] | None:
    """Load the newest whole one; those that are damaged are passed over loudly, never silently."""
    folders = list(dict.fromkeys(_folders(callbacks, root)))
    damaged: list[str] = []
    passed_over = 0
    for each in _candidates(folders, callbacks):
        if each.about is None:
            damaged.append(each.reason)
        elif run_id not in (None, each.about.run_id):
            continue
        elif verb == "fit" and not each.about.resumable:
            passed_over += 1
        else:
            try:
                checkpoint = load(each.path, weights_only=weights_only)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            if damaged:
                warn(
                    "damaged-checkpoint",
                    f"{verb}(ckpt_path='last'): {len(damaged)} newer checkpoint(s) cannot be read: {'; '.join(damaged)}. "
                    f"Instead, {each.path} is used, of epoch {each.about.epoch}, step {each.about.global_step}.",
                )
            return checkpoint, each.path
    where = ", ".join(folders)
    if damaged:
        raise CheckpointError(
            f"{verb}(ckpt_path='last'): none of the checkpoints in {where} can be read: {'; '.join(damaged)}. To start anew, "
            "leave ckpt_path out."
        )
    if verb == "fit":
        but = f" but {passed_over} with weights only" if passed_over else ""
        print(f"ckpt_path='last': there is none in {where}{but}; training starts anew.")
        return None
    raise CheckpointError(f"{verb}(ckpt_path='last'): there is no checkpoint in {where}. Pass its path, or fit first.")


def _folders(callbacks: Sequence[ModelCheckpoint], root: str) -> Iterator[str]:
    """The folders to look through: the callbacks', and where they would be by default if none has one yet."""
    given = [callback for callback in callbacks if callback.dirpath]
    for callback in given:
        assert callback.dirpath is not None
        depth = len(re.findall(r"[/\\]", callback.filename or ""))  # a template may make folders
        for folder in (callback.dirpath, *_earlier_versions(callback.dirpath)):
            yield from _with_subfolders(folder, depth)
    if not given:
        yield join(root, "checkpoints")
        yield from _versions(join(root, "lightning_logs"))


def _earlier_versions(folder: str) -> Iterable[str]:
    """Where earlier runs kept theirs, if this run keeps its checkpoints beside its logs: a new run has a new version."""
    version, name = _split(folder)
    logs, version_name = _split(version)
    return _versions(logs) if name == "checkpoints" and version_name.startswith("version_") else ()


def _versions(logs: str) -> Iterable[str]:
    names = sorted(name for name in _names(logs, folders=True) if name.startswith("version_"))
    return [join(join(logs, name), "checkpoints") for name in names]


def _with_subfolders(folder: str, depth: int) -> Iterator[str]:
    yield folder
    for name in sorted(_names(folder, folders=True)) if depth else ():
        yield from _with_subfolders(join(folder, name), depth - 1)


def _candidates(folders: Iterable[str], callbacks: Sequence[ModelCheckpoint]) -> list[_Candidate]:
    """What is in the folders, and what the callbacks remember; the newest first."""
    paths = [path for folder in folders for path in list_checkpoints(folder)]
    known = [path for callback in callbacks for path in (callback.last_model_path, callback.best_model_path) if path]
    looked_at = map(_look, dict.fromkeys([*paths, *known]))
    return sorted((each for each in looked_at if each is not None), key=lambda each: each.order, reverse=True)


def _look(path: str) -> _Candidate | None:
    try:
        about = read_about(path)
        return _Candidate(path, about.saved_at, about)
    except CheckpointError as error:
        if not exists(path):  # deleted meanwhile, or remembered and gone
            return None
        when = remote.modified(path) if is_remote(path) else os.stat(path).st_mtime
        return _Candidate(path, when, None, str(error))


def _check_named(path: str, verb: str) -> None:
    """Refuse what is no file, and say what may have been meant."""
    given = f"{verb}(ckpt_path={path!r})"
    try:
        if exists(path) and (not _is_folder(path) or _is_one_checkpoint(path)):
            return
    except CheckpointError as error:
        registry = " leyden has no model registry." if re.match(r"hf://|.*-registry://", path) else ""
        raise CheckpointError(f"{given}: {error}.{registry} Allowed: {_ALLOWED}.") from error
    if _is_folder(path):
        inside = list_checkpoints(path)
        hint = f"The newest checkpoint in it is {inside[0]}: pass that." if inside else "There is no *.ckpt in it."
        raise CheckpointError(f"{given} is a folder. {hint}")
    if re.match(r"registry(:|$)", path):
        raise CheckpointError(
            f"{given}: leyden has no model registry. Download the checkpoint and pass its path; allowed are {_ALLOWED}."
        )
    if path == "hpc":
        raise CheckpointError(
            f"{given}: checkpoints that were saved when the job was preempted have no keyword of their own. Pass 'last', "
            "which is the newest checkpoint whoever wrote it, or a path."
        )
    _no_such_file(path, given)


def _no_such_file(path: str, given: str) -> NoReturn:
    folder, name = _split(path)
    if folder and not _is_folder(folder):
        raise CheckpointNotFoundError(f"{given}: there is no such file, and no folder {folder}.")
    beside = _names(folder or ".", folders=False)
    hint = did_you_mean(name, [*beside, *(("last", "best") if not folder else ())])
    if not hint:
        there = [_split(other)[1] for other in list_checkpoints(folder or ".")[:_SHOWN]]
        hint = f" Beside it are {', '.join(there)}." if there else ""
    raise CheckpointNotFoundError(f"{given}: there is no such file.{hint}")


def _newest_whole_beside(path: str) -> str | None:
    """The newest checkpoint in the folder of ``path`` that can be loaded. Reads it all, which an error is worth."""
    for other in list_checkpoints(_split(path)[0] or "."):
        if _split(other)[1] != _split(path)[1]:
            try:
                load_checkpoint(other)
                return other
            except CheckpointError:
                pass
    return None


def _split(path: str) -> tuple[str, str]:
    """The folder and the name; of a URL, the folder keeps its scheme."""
    if is_remote(path):
        folder, _, name = path.rstrip("/").rpartition("/")
        return folder, name
    return os.path.split(os.fspath(local_path(path)))


def _is_one_checkpoint(folder: str) -> bool:
    return not is_remote(folder) and (is_sharded(local_path(folder)) or is_hub_folder(local_path(folder)))


def _is_folder(path: str) -> bool:
    if not is_remote(path):
        return local_path(path).is_dir()
    fs, inner = filesystem(path)
    return bool(fs.isdir(inner))


def _names(folder: str, folders: bool) -> list[str]:
    """The names of what is in a folder: of its folders, or of its files, which sharded checkpoints count as."""
    if not is_remote(folder):
        here = local_path(folder)
        inside = list(here.iterdir()) if here.is_dir() else []
        return [each.name for each in inside if (each.is_dir() and not is_sharded(each)) is folders]
    fs, inner = filesystem(folder)
    if not folders:
        return remote.names(folder, "*")
    entries = fs.ls(inner, detail=True) if fs.isdir(inner) else []
    return [_split_name(entry["name"]) for entry in entries if entry["type"] == "directory"]


def _split_name(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
