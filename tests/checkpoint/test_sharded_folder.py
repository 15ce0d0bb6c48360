"""The folder of a sharded checkpoint: whatever is in it nothing runs, and it is kept, found and deleted like a file."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.checkpoint import atomic, container, folder
from leyden.checkpoint.container import Reader, write_file
from leyden.checkpoint.find import find_and_load
from leyden.checkpoint.format import load_checkpoint, read_about, read_metadata
from leyden.checkpoint.sharded import save_sharded
from leyden.checkpoint.store import copy_checkpoint, link_checkpoint, list_checkpoints, newest, remove, write_checkpoint
from leyden.errors import CheckpointError, LeydenWarning
from quiet import make_trainer
from ranks import run_ranks
from same_values import same

MAIN = "leyden.safetensors"
SHARDS = ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
STATE = {"w": torch.arange(15.0).reshape(5, 3), "n": torch.arange(7)}


def write(rank: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {name: distribute_tensor(each, mesh, [Shard(0)], src_data_rank=None) for name, each in STATE.items()}
    save_sharded(
        path, {"state_dict": state, "plain": torch.ones(2), "epoch": 3, "global_step": 7, "optimizer_states": []}
    )


TRUTH = {"state_dict": STATE, "plain": torch.ones(2), "epoch": 3, "global_step": 7, "optimizer_states": []}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("original") / "a.ckpt"
    run_ranks(write, 2, str(path))
    return path


@pytest.fixture
def saved(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(original, tmp_path / "a.ckpt"))


def numbered(path: pathlib.Path, step: int) -> pathlib.Path:
    """A sharded checkpoint of this process alone, which has no shards."""
    save_sharded(
        path, {"global_step": step, "optimizer_states": [], "state_dict": {"w": torch.full((3,), float(step))}}
    )
    return path


def test_it_loads_like_a_file(saved: pathlib.Path) -> None:
    assert same(load_checkpoint(saved), TRUTH)
    assert same(load_checkpoint(saved, weights_only=True), {k: v for k, v in TRUTH.items() if k != "optimizer_states"})
    assert load_checkpoint(saved, map_location="meta")["state_dict"]["w"].is_meta
    about = read_about(saved)
    assert (about.epoch, about.global_step, about.resumable) == (3, 7, True)
    assert read_metadata(saved)["leyden_about"]
    (saved / "notes.txt").write_text("a file that is none of ours is no matter")
    (saved / ".metadata").write_bytes(pickle.dumps({"never": "read"}))
    assert same(load_checkpoint(saved), TRUTH)


def test_one_file_is_no_checkpoint(saved: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"the tensor module\.w is missing"):
        load_checkpoint(saved / MAIN)


def test_any_flipped_byte_is_found(saved: pathlib.Path) -> None:
    rng, harmless, tried = random.Random(0), 0, 0
    reasons: list[str] = []
    for name in (MAIN, *SHARDS):
        whole = (saved / name).read_bytes()
        for position in range(0, len(whole), 3):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.randrange(8)
            (saved / name).write_bytes(damaged)
            tried += 1
            try:
                loaded = load_checkpoint(saved)
            except CheckpointError as error:
                reasons.append(str(error))
                continue
            assert same(loaded, TRUTH)
            # what is no concern of ours: padding, the library's name, and the words for torch's own reader
            harmless += b"DCP_SHARDING_INFO" not in whole
        (saved / name).write_bytes(whole)
    assert tried > 500
    assert harmless < 20
    assert all(reason.startswith(f"{saved}: ") for reason in reasons)


@pytest.mark.parametrize("name", [MAIN, *SHARDS])
def test_files_that_are_cut_missing_or_another(saved: pathlib.Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    for size in range(0, len(whole), 7):
        (saved / name).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"a\.ckpt: "):
            load_checkpoint(saved)
        with pytest.raises(CheckpointError, match=r"a\.ckpt: "):
            read_about(saved)  # also by those who read the header only
    (saved / name).unlink()
    for reader in (load_checkpoint, read_metadata, read_about):
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            reader(saved)
    os.mkfifo(saved / name)  # would be waited for
    for reader in (load_checkpoint, read_about):
        with pytest.raises(CheckpointError, match=f"{name} (is no file|has 0 bytes)"):
            reader(saved)


def test_a_shard_of_another_save_is_found(saved: pathlib.Path) -> None:
    """The same names, shapes and sizes, other numbers: each file by itself is right."""
    other = saved.with_name("b.ckpt")

    def write_other(rank: int) -> None:
        STATE["w"] += 1
        write(rank, str(other))

    run_ranks(write_other, 2)
    shutil.copy(other / SHARDS[1], saved / SHARDS[1])
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]} is damaged: its header's checksum"):
        load_checkpoint(saved)


# forgeries: all checksums are right


def forge_main(path: pathlib.Path, change: Callable[[dict[str, Any]], None]) -> None:
    with (path / MAIN).open("rb") as stream:
        reader = Reader(stream)
        metadata, tensors = reader.metadata, {name: reader.read(name) for name in reader.entries}
    table = json.loads(metadata["leyden_shards"])
    change(table)
    metadata["leyden_shards"] = json.dumps(table)
    keys = ("leyden_format", "leyden_version", "leyden_about", "leyden_checkpoint", "leyden_checksums", "leyden_shards")
    metadata["leyden_checksum"] = f"{zlib.crc32(chr(10).join(metadata[key] for key in keys).encode()):08x}"
    with (path / MAIN).open("wb") as stream:
        write_file(stream, tensors, metadata)


def forge_shard(path: pathlib.Path, change: Callable[[dict[str, Any]], None], name: str = SHARDS[1]) -> None:
    with (path / name).open("rb") as stream:
        reader = Reader(stream)
        metadata, tensors = reader.metadata, {key: reader.read(key) for key in reader.entries}
    chunks = json.loads(metadata["leyden_chunks"])
    change(chunks)
    metadata["leyden_chunks"] = json.dumps(chunks)
    with (path / name).open("wb") as stream:
        write_file(stream, tensors, metadata)
    file = [name, (path / name).stat().st_size, f"{zlib.crc32(metadata['leyden_chunks'].encode()):08x}"]
    forge_main(path, lambda table: table.update(files=[file if each[0] == name else each for each in table["files"]]))


def put(*keys: Any) -> Callable[[Any], None]:
    *path, last, value = keys

    def change(table: Any) -> None:
        for key in path:
            table = table[key]
        table[last] = value

    return change


MAIN_FORGERIES = {
    "a path that leads elsewhere": (
        put("files", 0, 0, "../../shard-00000-of-00002.safetensors"),
        "not the name of a shard",
    ),
    "an absolute path": (put("files", 0, 0, "/etc/passwd"), "not the name of a shard"),
    "its own name": (put("files", 0, 0, MAIN), "not the name of a shard"),
    "a line feed": (put("files", 0, 0, SHARDS[0] + "\n"), "not the name of a shard"),
    "no list": (put("files", 3), "malformed leyden_shards"),
    "no tensors": (put("tensors", None), "malformed leyden_shards"),
    "a size that is none": (put("files", 0, 1, "9"), "not the name of a shard"),
    "a checksum that is none": (put("files", 0, 2, 9), "malformed leyden_shards"),
    "a huge tensor": (put("tensors", "module.w", ["F32", [2**40, 3]]), "do not make it up"),
    "a huge tensor of which nothing is there": (put("tensors", "module.x", ["F32", [2**40]]), "do not make it up"),
    "an empty tensor": (put("tensors", "module.x", ["F32", [0, 2**62, 2**62]]), "malformed leyden_shards"),
    "another dtype": (put("tensors", "module.w", ["I32", [5, 3]]), "has the dtype F32"),
    "an unknown dtype": (put("tensors", "module.w", ["X", [5, 3]]), "malformed leyden_shards"),
    "a smaller tensor": (put("tensors", "module.w", ["F32", [4, 3]]), "do not make it up"),
    "another number of dimensions": (put("tensors", "module.w", ["F32", [15]]), "do not make it up"),
    "a tensor of the main file": (put("tensors", "plain", ["F32", [2]]), "is there twice"),
}
SHARD_FORGERIES = {
    "an overlap": (put("module.w", 1, [0, 0]), "do not make it up"),
    "beyond the end": (put("module.w", 1, [4, 0]), "do not make it up"),
    "before the beginning": (put("module.w", 1, [-3, 0]), "offsets are whole numbers"),
    "fractions": (put("module.w", 1, [3.0, 0]), "offsets are whole numbers"),
    "too few offsets": (put("module.w", 1, [3]), "do not make it up"),
    "no offsets": (put("module.w", 1, None), "offsets are whole numbers"),
    "another tensor": (put("module.w", 0, "module.n"), "has the dtype F32"),
    "no tensor": (put("module.w", 0, "x"), "a chunk of no tensor"),
    "a list for a name": (put("module.w", 0, ["x"]), "a chunk of no tensor"),
    "nothing": (put("module.w", None), "a chunk of no tensor"),
    "one more": (put("module.x", ["module.w", [0, 0], []]), "does not hold the chunks"),
    "no checksums": (put("module.w", 2, []), "is damaged"),
    "checksums that are none": (put("module.w", 2, 3), "offsets are whole numbers"),
}


@pytest.fixture(autouse=True)
def modest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing makes the reader allocate a tensor larger than the files."""
    real, made = torch.empty, [0]

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = real(*args, **kwargs)
        made.append(result.nbytes)
        return result

    monkeypatch.setattr(container.torch, "empty", empty)
    yield
    assert max(made) < 100_000


@pytest.mark.parametrize("case", MAIN_FORGERIES)
def test_a_forged_main_file(saved: pathlib.Path, case: str) -> None:
    change, reason = MAIN_FORGERIES[case]
    forge_main(saved, change)
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: .*{reason}"):
        load_checkpoint(saved)


@pytest.mark.parametrize("case", SHARD_FORGERIES)
def test_a_forged_shard(saved: pathlib.Path, case: str) -> None:
    change, reason = SHARD_FORGERIES[case]
    forge_shard(saved, change)
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: .*{reason}"):
        load_checkpoint(saved)


def test_the_forging_itself_does_no_harm(saved: pathlib.Path) -> None:
    forge_main(saved, lambda table: None)
    forge_shard(saved, lambda table: None)
    assert same(load_checkpoint(saved), TRUTH)


AUDIT = """
import os, pathlib, sys
from leyden.checkpoint import load_checkpoint, read_metadata
from leyden.checkpoint.format import load_checkpoint, read_about, read_metadata
from leyden.errors import CheckpointError

seen, active = [], [False]
allowed = pathlib.Path(sys.argv[1]).resolve()

def hook(event, arguments):
    if not active[0]:
        return
    if event == "open":
        path = str(arguments[0])
        if not isinstance(arguments[0], int) and not pathlib.Path(path).parent.parent.samefile(allowed):
            seen.append((event, path))
        if set(arguments[1] or "") & set("wax+") or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append((event, path))
        if path.endswith(".metadata"):
            seen.append((event, path))
    elif event in ("os.listdir", "os.scandir"):
        pass
    elif event in ("exec", "compile", "import", "pickle.find_class", "ctypes.dlopen"):
        seen.append((event, str(arguments)[:200]))
    elif event.startswith(("os.", "subprocess.", "socket.")):
        seen.append((event, str(arguments)[:200]))

sys.addaudithook(hook)
folders = sorted(allowed.iterdir())
load_checkpoint(folders[0])
read_about(folders[0])
before = set(sys.modules)
active[0] = True
refused = 0
for path in folders:
    for read in (load_checkpoint, read_metadata, read_about):
        try:
            read(path)
        except CheckpointError:
            refused += 1
active[0] = False
assert not seen, seen
assert set(sys.modules) == before, set(sys.modules) - before
print(refused)
"""


def test_nothing_happens_while_folders_are_read(original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "evil"),)

    inside = tmp_path / "inside"
    for i, (forge, cases) in enumerate(((forge_main, MAIN_FORGERIES), (forge_shard, SHARD_FORGERIES))):
        for j, (change, _) in enumerate(cases.values()):
            forge(pathlib.Path(shutil.copytree(original, inside / f"{i + 1}{j:02}.ckpt")), change)
    shutil.copytree(original, inside / "0.ckpt")
    for name in (".metadata", "__0_0.distcp", "leyden.py", "sitecustomize.py"):
        (inside / "0.ckpt" / name).write_bytes(pickle.dumps(Evil()))
    for i, name in enumerate((MAIN, *SHARDS)):
        path = pathlib.Path(shutil.copytree(original, inside / f"9{i}.ckpt"))
        (path / name).write_bytes(pickle.dumps(Evil()))
    command = [sys.executable, "-W", "error", "-c", AUDIT, str(inside)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > len(MAIN_FORGERIES) + len(SHARD_FORGERIES)
    assert not (tmp_path / "evil").exists()


# keeping, finding, deleting


def names(path: pathlib.Path) -> list[str]:
    return sorted(os.listdir(path))


def test_it_is_listed_copied_linked_and_deleted_whole(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "other.ckpt").mkdir()
    (tmp_path / "other.ckpt" / "x.txt").write_text("not a checkpoint")
    assert list_checkpoints(tmp_path) == [str(saved)]
    copy, link = tmp_path / "copy.ckpt", tmp_path / "link.ckpt"
    copy_checkpoint(saved, copy)
    link_checkpoint(saved, link)
    assert copy.stat().st_ino != saved.stat().st_ino
    assert (copy / SHARDS[0]).stat().st_ino == (saved / SHARDS[0]).stat().st_ino  # shares the bytes
    assert link.is_symlink()
    assert sorted(list_checkpoints(tmp_path)) == sorted(map(str, (saved, copy, link)))
    remove(link)
    assert saved.exists()
    link_checkpoint(saved, copy)  # in the place of a folder
    assert copy.is_symlink()
    copy_checkpoint(saved, copy)  # and back
    remove(saved)
    assert same(load_checkpoint(copy), TRUTH)
    assert newest(tmp_path) == str(copy)
    with pytest.raises(CheckpointError, match="cannot be deleted: Is a directory, and no checkpoint"):
        remove(tmp_path / "other.ckpt")
    remove(copy)
    remove(copy)
    assert names(tmp_path) == ["other.ckpt"]


def test_files_and_folders_take_each_others_place(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"global_step": 1})
    for step in range(2, 8):
        if step % 3 == 0:
            write_checkpoint(path, {"global_step": step})
        else:
            numbered(path, step)
        assert path.is_dir() is (step % 3 != 0)
        assert load_checkpoint(path)["global_step"] == step
        assert names(tmp_path) == ["x.ckpt"]


def test_a_kill_at_any_instant_leaves_the_old_or_the_new(tmp_path: pathlib.Path) -> None:
    """A replacement, a copy over a folder and a deletion, killed before each call that changes the disk."""
    path, last = tmp_path / "x.ckpt", tmp_path / "last.ckpt"
    leftovers = n = 0
    ended = False
    while not ended:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        numbered(path, 1)
        copy_checkpoint(path, last)
        atomic._swept.clear()
        child = os.fork()
        if not child:
            changes_until_killed(n)
            numbered(path, 2)
            copy_checkpoint(path, last)
            remove(last)
            os._exit(0)
        ended = os.waitpid(child, 0)[1] == 0
        leftovers += any(name.startswith(".") for name in names(tmp_path))
        found = list_checkpoints(tmp_path)
        assert str(path) in found
        step = load_checkpoint(path)["global_step"]
        assert step in (1, 2)
        if last.exists():
            assert load_checkpoint(last)["global_step"] <= step
        assert len(found) == 1 + last.exists()
        write_checkpoint(tmp_path / "other.ckpt", {})  # the next writer clears up
        assert not [name for name in names(tmp_path) if name.startswith(".")]
        n += 1
    assert n > 20
    assert leftovers > 10
    assert names(tmp_path) == ["other.ckpt", "x.ckpt"]


def changes_until_killed(n: int) -> None:
    left = [n]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not left[0]:
                os.kill(os.getpid(), 9)
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "link", "fsync"):
        setattr(os, name, counted(getattr(os, name)))


def test_the_folder_of_a_living_process_stays(tmp_path: pathlib.Path) -> None:
    """One process writes while another begins to: the second takes nothing away."""
    with contextlib.ExitStack() as held:
        draft, main = atomic.draft_folder(tmp_path / "x.ckpt", held)
        child = os.fork()
        if not child:
            atomic._swept.clear()
            write_checkpoint(tmp_path / "y.ckpt", {})
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert draft.is_dir()
        write_file(main, {}, {})
        atomic.commit_folder(draft, main, tmp_path / "x.ckpt")
    assert names(tmp_path) == ["x.ckpt", "y.ckpt"]


def find(path: Any, root: pathlib.Path, verb: str = "fit") -> tuple[dict[str, Any], str] | None:
    return find_and_load(path, [ModelCheckpoint(root)], str(root), verb)


def test_last_and_paths_find_folders(tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path / "file.ckpt", {"global_step": 1, "optimizer_states": []})
    old, new = numbered(tmp_path / "old.ckpt", 2), numbered(tmp_path / "new.ckpt", 3)
    found = find("last", tmp_path)
    assert found is not None
    assert (found[0]["global_step"], found[1]) == (3, str(new))
    found = find(str(old), tmp_path)
    assert found is not None
    assert found[0]["global_step"] == 2
    (new / MAIN).write_bytes((new / MAIN).read_bytes()[:-1])
    with pytest.warns(LeydenWarning, match=r"1 newer checkpoint\(s\) cannot be read: .*new.ckpt: .*cut short"):
        found = find("last", tmp_path)
    assert found is not None
    assert found[1] == str(old)
    with pytest.raises(CheckpointError, match=rf"new.ckpt: the file is cut short.*The newest whole .* is {old}"):
        find(str(new), tmp_path)
    with pytest.raises(CheckpointError, match=r"is a folder. The newest checkpoint in it is .*new\.ckpt: pass that"):
        find(str(tmp_path), tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no such file. Did you mean 'old\.ckpt'"):
        find(str(tmp_path / "olb.ckpt"), tmp_path)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_model_checkpoint_keeps_the_best_folders(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.checkpoint.writer.write_checkpoint", save_sharded)
    policy: dict[str, Any] = {"dirpath": tmp_path, "every_n_train_steps": 1, "save_top_k": 2, "background": False}
    policy |= {"monitor": "step", "mode": "max"}
    callback = ModelCheckpoint(save_last=True, **policy)
    trainer = make_trainer(tmp_path, callback, enable_checkpointing=True)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(5, 1)))
    assert names(tmp_path) == ["epoch=0-step=4.ckpt", "epoch=0-step=5.ckpt", "last.ckpt"]
    assert all(folder.is_sharded(tmp_path / name) for name in names(tmp_path))
    assert load_checkpoint(callback.best_model_path)["global_step"] == 5
    assert load_checkpoint(callback.last_model_path)["global_step"] == 5
    again = make_trainer(tmp_path, ModelCheckpoint(**policy), enable_checkpointing=True, max_epochs=2)
    again.fit(Module(), torch.utils.data.DataLoader(torch.ones(5, 1)), ckpt_path="last")
    assert names(tmp_path) == ["epoch=1-step=10.ckpt", "epoch=1-step=9.ckpt", "last.ckpt"]
