"""The specification of the checkpoint file: its examples run, and its tables are those of the code."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

import leyden
from leyden.checkpoint import container, format, from_plain, plain, read_metadata
from leyden.errors import CheckpointError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "checkpoint_format.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text("\n".join(blocks), encoding="utf-8")
    return runpy.run_path("program.py", run_name="__main__")


def test_the_examples_run(program: dict[str, object]) -> None:
    model, weights, about = program["model"], program["weights"], program["about"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(weights, dict)
    assert isinstance(about, dict)
    model.load_state_dict(weights)
    assert torch.equal(weights["weight"], leyden.load_checkpoint("a.ckpt")["state_dict"]["weight"])
    assert about["epoch"] == 4
    assert len(program["checksums"]) == 2 + 2 * 3  # type: ignore[arg-type]  # weights; AdamW's step and two moments of each


def test_the_sharded_example_runs(program: dict[str, object]) -> None:
    """In one process; several are in tests/checkpoint/test_sharded.py."""
    save, load = program["save"], program["load"]
    model = torch.nn.Linear(3, 2)
    save("b.ckpt", program["model"], program["optimizer"])  # type: ignore[operator]
    load("b.ckpt", model, torch.optim.AdamW(model.parameters()))  # type: ignore[operator]
    assert torch.equal(model.weight, program["model"].weight)  # type: ignore[attr-defined]
    assert "leyden_shards" in read_metadata("b.ckpt")
    assert Path("b.ckpt").is_dir()


def test_the_example_with_a_class_runs(program: dict[str, object]) -> None:
    assert program["theirs"]["hyper_parameters"]["activation"] is torch.nn.ReLU  # type: ignore[index]
    with pytest.raises(CheckpointError, match=r"names torch\.nn\.modules\.activation\.ReLU"):
        leyden.load_checkpoint("theirs.ckpt")


def test_the_metadata_are_those_of_a_file(program: dict[str, object]) -> None:
    metadata = read_metadata("a.ckpt")
    assert first_cells(section("The metadata")) == list(metadata)
    assert f"the format version: `{metadata['leyden_format']}`" in PAGE
    example = re.search(r"`leyden_about` is `(\{.*?\})`", PAGE)
    assert example is not None
    assert json.loads(example[1]).keys() == json.loads(metadata["leyden_about"]).keys()
    checksum = section("Checksums").split("`leyden_checksum` is that of")[1].split("in this\n")[0]
    assert tuple(re.findall(r"`(leyden_\w+)`", checksum)) == format._CHECKED


def test_the_tags_are_those_of_the_code() -> None:
    assert sorted(first_cells(section("The tree"))) == sorted(from_plain._DECODERS)


def test_the_dtypes_are_those_of_the_code() -> None:
    pairs = dict(re.findall(r"\| `(\w+)` \| `(\w+)` ", section("The container")))
    assert pairs == {name: str(dtype).removeprefix("torch.") for dtype, name in container.NATIVE_DTYPES.items()}
    others = section("The container").split("Only these are written. ")[1].split(" of other writers")[0]
    read = {name for name, (_, dtype) in container._READ_DTYPES.items() if dtype is not None}
    assert set(re.findall(r"`(\w+)`", others)) == read - pairs.keys()


def test_the_versions_are_those_of_the_code() -> None:
    versions = re.findall(r"^\| (\d+) \|", section("Versions"), flags=re.MULTILINE)
    assert versions == [*format.MIGRATIONS, format.FORMAT_VERSION]
    assert f"format version {format.FORMAT_VERSION}." in PAGE


def test_the_limits_are_those_of_the_code() -> None:
    limits = section("Limits")
    assert f"may have {container.MAX_HEADER_BYTES // 10**6} MB" in limits
    assert f"nested {plain.MAX_DEPTH} levels deep" in limits
    assert f"more than {plain._INLINE_BYTES} bytes" in section("The tree")
    left = limits.split("`weights_only=True` leaves")[1].split("all the keys")[0]
    assert (
        {"optimizer_states", "callbacks", "random_state"} == set(re.findall(r"`(\w+)`", left)) <= format.RUN_STATE_KEYS
    )
    assert set(re.findall(r"`(\w+)`", limits.split("\n- ")[-1])) - {"map_location"} == format.RANDOM_STATE_KEYS
