"""What ``ckpt_path`` means, with files of known age on real and remote disks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.callbacks import ModelCheckpoint
from leyden.checkpoint.find import find_and_load
from leyden.checkpoint.format import flatten, seal
from leyden.checkpoint.store import copy_checkpoint, join, link_checkpoint, list_checkpoints, write_tensors
from leyden.errors import CheckpointError, ConfigurationError, LeydenWarning

VERBS = ["fit", "validate", "test", "predict"]


@pytest.fixture(params=["local", "memory", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder on the disk, as a path and as a URL, and one that is in memory only."""
    if request.param != "memory":
        yield str(tmp_path) if request.param == "local" else f"file://{tmp_path}"
        return
    import fsspec

    root = f"memory://{tmp_path.name}"
    yield root
    fs = fsspec.filesystem("memory")
    if fs.exists(f"/{tmp_path.name}"):
        fs.rm(f"/{tmp_path.name}", recursive=True)


def put(folder: str | Path, name: str, step: int, age: float = 0.0, resumable: bool = True) -> str:
    """Write a checkpoint that was saved ``age`` seconds before a certain moment."""
    checkpoint: dict[str, Any] = {"epoch": step // 10, "global_step": step, "run_id": "a"}
    checkpoint["state_dict"] = {"weight": torch.full((64,), float(step))}
    if resumable:
        checkpoint["optimizer_states"] = [{"step": step}]
    path = join(str(folder), name)
    write_tensors(path, *seal(*flatten(checkpoint), saved_at=1_000_000.0 - age))
    return path


def damage(path: str, how: str = "tensor") -> None:
    """Flip a bit of the last tensor, cut the end off, or leave nothing of the header."""
    import fsspec

    with fsspec.open(path, "rb") as file:
        raw = bytearray(file.read())
    if how == "tensor":
        raw[-1] ^= 1
    content = {"tensor": raw, "cut": raw[:-8], "header": b"not a checkpoint"}[how]
    with fsspec.open(path, "wb") as file:
        file.write(bytes(content))


def last(folder: str, verb: str = "fit", **arguments: Any) -> str | None:
    """The name of what "last" means."""
    found = find_and_load("last", [ModelCheckpoint(folder, **arguments)], "elsewhere", verb)
    return None if found is None else found[1].replace("file://", "").removeprefix(folder.replace("file://", ""))[1:]


# "last"


def test_last_is_the_newest_by_the_time_in_the_file_whatever_its_name(folder: str) -> None:
    put(folder, "last.ckpt", 30, age=60)
    put(folder, "zebra.ckpt", 40, age=10)
    put(folder, "epoch=1-step=50.ckpt", 50, age=20)  # a later step of an earlier run
    put(folder, "weights.ckpt", 90, age=0, resumable=False)
    put(folder, ".hidden.ckpt", 91)
    put(folder, "other.safetensors", 92)
    assert last(folder) == "zebra.ckpt"
    for verb in VERBS[1:]:
        assert last(folder, verb) == "weights.ckpt"


def test_the_checkpoint_that_was_found_is_loaded(folder: str) -> None:
    put(folder, "a.ckpt", 7)
    found = find_and_load("last", [ModelCheckpoint(folder)], "elsewhere", "fit")
    assert found is not None
    assert found[0]["global_step"] == 7
    assert torch.equal(found[0]["state_dict"]["weight"], torch.full((64,), 7.0))


def test_of_two_names_of_one_checkpoint_last_is_shown(folder: str) -> None:
    copy_checkpoint(put(folder, "z.ckpt", 1), join(folder, "last.ckpt"))
    assert last(folder) == "last.ckpt"


def test_a_link_and_a_dangling_link(tmp_path: Path) -> None:
    link_checkpoint(put(tmp_path, "a.ckpt", 1), tmp_path / "last.ckpt")
    assert last(str(tmp_path)) == "last.ckpt"
    put(tmp_path, "b.ckpt", 0, age=50)
    (tmp_path / "a.ckpt").unlink()
    assert last(str(tmp_path)) == "b.ckpt"


def test_a_file_without_times_has_the_time_of_the_disk(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    put(tmp_path, "ours.ckpt", 1)
    save_file({"weight": torch.zeros(1)}, tmp_path / "plain.ckpt")
    os.utime(tmp_path / "plain.ckpt", (2_000_000, 2_000_000))
    assert last(str(tmp_path)) == "ours.ckpt"
    assert last(str(tmp_path), "test") == "plain.ckpt"
    os.utime(tmp_path / "plain.ckpt", (500_000, 500_000))
    assert last(str(tmp_path), "test") == "ours.ckpt"


def test_last_looks_in_the_folders_of_every_callback(folder: str) -> None:
    put(join(folder, "one"), "a.ckpt", 1, age=9)
    put(join(folder, "two"), "b.ckpt", 2)
    callbacks = [ModelCheckpoint(join(folder, name), monitor=name) for name in ("one", "two", "missing")]
    found = find_and_load("last", callbacks, "elsewhere", "fit")
    assert found is not None
    assert found[0]["global_step"] == 2


def test_last_looks_in_the_folders_of_earlier_versions(folder: str) -> None:
    logs = join(folder, "logs")
    put(join(logs, "version_1/checkpoints"), "a.ckpt", 1)
    put(join(logs, "version_0/checkpoints"), "b.ckpt", 2, age=5)
    put(join(logs, "others/checkpoints"), "c.ckpt", 3, age=-5)
    for version in ("version_2", "version_10"):
        found = find_and_load("last", [ModelCheckpoint(join(logs, f"{version}/checkpoints"))], "elsewhere", "fit")
        assert found is not None
        assert found[0]["global_step"] == 1


def test_without_a_folder_of_its_own_last_looks_where_defaults_would_be(folder: str) -> None:
    put(join(folder, "lightning_logs/version_3/checkpoints"), "a.ckpt", 3, age=5)
    for callbacks in ([], [ModelCheckpoint()]):
        found = find_and_load("last", callbacks, folder, "fit")
        assert found is not None
        assert found[0]["global_step"] == 3
    put(join(folder, "checkpoints"), "b.ckpt", 4)
    found = find_and_load("last", [], folder, "fit")
    assert found is not None
    assert found[0]["global_step"] == 4


def test_templates_that_make_folders_are_looked_into_as_deep_as_they_go(folder: str) -> None:
    put(folder, "3/0.5.ckpt", 3)
    put(folder, "top.ckpt", 1, age=5)
    put(folder, "too/deep/x.ckpt", 9)
    assert last(folder, filename="{step}/{val}") == "3/0.5.ckpt"
    assert last(folder) == "top.ckpt"


def test_what_a_callback_remembers_counts_wherever_it_is(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "new")
    old = put(tmp_path / "old", "best.ckpt", 5)
    state = callback.state_dict()
    callback.load_state_dict({**state, "inherited": [1.0, old], "last_model_path": str(tmp_path / "gone.ckpt")})
    found = find_and_load("last", [callback], "elsewhere", "fit")
    assert found is not None
    assert found[1] == old


@pytest.mark.parametrize("weights", [False, True])
def test_without_a_last_fit_starts_anew_and_says_so(
    weights: bool, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if weights:
        put(folder, "w.ckpt", 1, resumable=False)
    assert find_and_load("last", [ModelCheckpoint(folder)], "elsewhere", "fit") is None
    but = " but 1 with weights only" if weights else ""
    where = folder.removeprefix("file://")
    assert capsys.readouterr().out == f"ckpt_path='last': there is none in {where}{but}; training starts anew.\n"


@pytest.mark.parametrize("verb", VERBS[1:])
def test_without_a_last_the_other_verbs_refuse(verb: str, folder: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"{verb}\(ckpt_path='last'\): there is no checkpoint in .*Pass its path"
    ):
        find_and_load("last", [ModelCheckpoint(folder)], "elsewhere", verb)


# damage


@pytest.mark.parametrize("how", ["tensor", "cut", "header"])
def test_a_damaged_newest_falls_back_to_the_one_before_loudly(how: str, folder: str) -> None:
    put(folder, "a.ckpt", 10, age=9)
    put(folder, "b.ckpt", 20, age=5)
    damage(put(folder, "c.ckpt", 30), how)
    with pytest.warns(LeydenWarning, match=r"LEY-damaged-checkpoint.*1 newer checkpoint.*c\.ckpt: ") as record:
        assert last(folder) == "b.ckpt"
    assert len(record) == 1
    text = str(record[0].message)
    reason = {"tensor": "checksum", "cut": "cut short", "header": "not a checkpoint"}[how]
    assert reason in text
    assert "b.ckpt is used, of epoch 2, step 20." in text


def test_two_damaged_ones_are_named_in_one_warning(folder: str) -> None:
    put(folder, "a.ckpt", 10, age=9)
    damage(put(folder, "b.ckpt", 20, age=5))
    damage(put(folder, "c.ckpt", 30), "cut")
    with pytest.warns(LeydenWarning, match=r"2 newer checkpoint.*c\.ckpt: .*b\.ckpt: .*a\.ckpt is used") as record:
        assert last(folder) == "a.ckpt"
    assert len(record) == 1


def test_damage_of_an_older_one_is_no_matter(folder: str) -> None:
    damage(put(folder, "a.ckpt", 10, age=9))
    put(folder, "b.ckpt", 20)
    assert last(folder) == "b.ckpt"


@pytest.mark.parametrize("verb", VERBS)
def test_if_all_are_damaged_nothing_starts_anew_silently(verb: str, folder: str) -> None:
    damage(put(folder, "a.ckpt", 10, age=9), "cut")
    damage(put(folder, "b.ckpt", 20))
    if verb == "fit":
        put(folder, "weights.ckpt", 1, resumable=False)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* can be read: .*To start anew") as error:
        last(folder, verb)
    assert re.search(r"a\.ckpt: [^;]*cut short", str(error.value))
    assert re.search(r"b\.ckpt: [^;]*checksum", str(error.value))


def test_a_pickle_that_names_what_it_should_not_is_damage(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "global_step": 1, "hyper_parameters": {"run": os.system}}, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"old\.ckpt: it names (posix|nt)\.system"):
        last(str(tmp_path))


def test_a_checkpoint_of_lightning_is_found_like_others(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 1, "global_step": 7, "optimizer_states": []}, tmp_path / "lightning.ckpt")
    assert last(str(tmp_path)) == "lightning.ckpt"
    torch.save({"state_dict": {}, "epoch": 1, "global_step": 7}, tmp_path / "lightning.ckpt")
    assert last(str(tmp_path)) is None  # training cannot go on from weights
    assert last(str(tmp_path), "test") == "lightning.ckpt"


def test_a_file_that_disappears_while_it_is_looked_for(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "a.ckpt", 1)
    there = list_checkpoints(folder)
    monkeypatch.setattr(
        "leyden.checkpoint.find.list_checkpoints", lambda folder: [join(folder, "deleted.ckpt"), *there]
    )
    assert last(folder) == "a.ckpt"


def test_a_damaged_path_names_the_newest_whole_one_beside_it(folder: str) -> None:
    path = put(folder, "chosen.ckpt", 5)
    put(folder, "a.ckpt", 10, age=9)
    b = put(folder, "b.ckpt", 20, age=5)
    damage(put(folder, "c.ckpt", 30))
    damage(path)
    with pytest.raises(
        CheckpointError, match=r"fit\(ckpt_path='.*chosen\.ckpt'\): .*checksum.*newest whole.* is "
    ) as error:
        find_and_load(path, [], "elsewhere", "fit")
    assert str(error.value).endswith(f"beside it is {b.removeprefix('file://')}.")


def test_a_damaged_path_that_is_alone(folder: str) -> None:
    path = put(folder, "chosen.ckpt", 5)
    damage(path)
    with pytest.raises(CheckpointError, match="checksum") as error:
        find_and_load(path, [], "elsewhere", "test")
    assert "beside" not in str(error.value)


# names


def test_nothing_is_nothing() -> None:
    assert find_and_load(None, [], "elsewhere", "fit") is None


def test_a_path_in_its_forms(folder: str) -> None:
    path = put(folder, "a.ckpt", 3)
    forms: list[Any] = [path] if "://" in path else [path, Path(path), f"file://{path}"]
    for form in forms:
        found = find_and_load(form, [], "elsewhere", "fit")
        assert found is not None
        assert found[0]["global_step"] == 3
        assert found[1] == os.fspath(form)


def test_best(folder: str) -> None:
    none, callback = ModelCheckpoint(folder), ModelCheckpoint(folder, monitor="x")
    with pytest.raises(CheckpointError, match=r"test\(ckpt_path='best'\): no best checkpoint is known"):
        find_and_load("best", [none, callback], "elsewhere", "test")
    path = put(folder, "a.ckpt", 3)
    callback.load_state_dict({**callback.state_dict(), "history": [[0.5, path]]})
    found = find_and_load("best", [none, callback], "elsewhere", "test")
    assert found is not None
    assert found[1] == path
    callback.load_state_dict({**callback.state_dict(), "history": [[0.5, join(folder, "b.ckpt")]]})
    with pytest.raises(CheckpointError, match=r"b\.ckpt'\): there is no such file\."):
        find_and_load("best", [none, callback], "elsewhere", "test")


def test_a_folder(folder: str) -> None:
    put(folder, "a.ckpt", 1)
    b = put(folder, "b.ckpt", 2, age=-5)
    with pytest.raises(
        CheckpointError, match=r"is a folder\. The newest checkpoint in it is .*b\.ckpt: pass that"
    ) as error:
        find_and_load(folder, [], "elsewhere", "fit")
    assert b.removeprefix("file://") in str(error.value)
    put(folder, "c/x.safetensors", 2)
    with pytest.raises(CheckpointError, match=r"is a folder\. There is no \*\.ckpt in it"):
        find_and_load(join(folder, "c"), [], "elsewhere", "fit")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("epoch=1-step=2O.ckpt", r"no such file\. Did you mean 'epoch=1-step=20\.ckpt'"),
        ("epoch=1-step=20", r"no such file\. Did you mean 'epoch=1-step=20\.ckpt'"),
        ("xyz", r"no such file\. Beside it are epoch=1-step=20\.ckpt"),
        ("nowhere/a.ckpt", r"no such file, and no folder .*nowhere\."),
    ],
)
def test_a_path_that_does_not_exist(name: str, message: str, folder: str) -> None:
    put(folder, "epoch=1-step=20.ckpt", 20)
    with pytest.raises(CheckpointError, match=rf"fit\(ckpt_path=.*{message}"):
        find_and_load(join(folder, name), [], "elsewhere", "fit")


def test_a_keyword_that_is_misspelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such file\. Did you mean 'last'"):
        find_and_load("lastt", [], "elsewhere", "fit")
    put(tmp_path, "a.ckpt", 1)
    found = find_and_load("a.ckpt", [], "elsewhere", "fit")
    assert found is not None


@pytest.mark.parametrize("name", ["registry", "registry:mine", "registry:mine:version:3", "registry:version:last"])
def test_registries_are_refused_with_what_to_pass(name: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"fit\(ckpt_path='{name}'\): leyden has no model registry.*pass its path"
    ):
        find_and_load(name, [], "elsewhere", "fit")


def test_a_file_that_is_called_registry_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "registry", 1)
    monkeypatch.chdir(tmp_path)
    assert find_and_load("registry", [], "elsewhere", "fit") is not None


def test_urls_that_cannot_be_read() -> None:
    with pytest.raises(CheckpointError, match=r"hpc.*no keyword of their own. Pass 'last'"):
        find_and_load("hpc", [], "elsewhere", "fit")
    with pytest.raises(CheckpointError, match=r"'nonsense://x/y\.ckpt'\): .*Allowed: None, 'best', 'last', a path"):
        find_and_load("nonsense://x/y.ckpt", [], "elsewhere", "fit")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        with pytest.raises(CheckpointError, match=r"hf://.*huggingface_hub.*no model registry.*Allowed"):
            find_and_load("hf://me/model/last.ckpt", [], "elsewhere", "test")


@pytest.mark.parametrize("value", [3, True, ["a.ckpt"], b"a.ckpt"])
def test_what_is_no_path(value: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"ckpt_path=.*is not valid. Allowed: None, 'best', 'last', a path, or a URL"
    ):
        find_and_load(value, [], "elsewhere", "fit")
