"""Processes that get SIGTERM and SIGUSR1 from outside, at instants of a seeded choice, and go on as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden
from leyden.checkpoint.format import load_checkpoint
from preempted import KINDS, Warm

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")

DATA = Path(leyden.__file__).parent / "data"
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    process = Warm()
    yield process
    process.close()


@pytest.fixture(scope="module")
def undisturbed(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert warm.ask(folder)["code"] == 0
    return final(folder)


def final(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "final" / "final.ckpt")


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    """Both are equal to the last bit."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), place
        for index, each in enumerate(expected):
            assert_same(found[index], each, f"{place}.{index}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    else:
        assert found == expected, place


def check_preempted(result: dict[str, Any], folder: Path, steps_known: int, name: str = "preempted.ckpt") -> int:
    """A preempted run ended as it should, and left a whole checkpoint; its number of steps."""
    assert result["code"] == 143, result
    assert "Traceback" not in result["out"] + result["err"]
    assert result["err"].count("\n") == 1, result["err"]
    checkpoint = load_checkpoint(folder / name)  # checks length and sums
    assert f"after {checkpoint['global_step']} steps: the state is saved in {folder / name}" in result["out"]
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    assert checkpoint["global_step"] > steps_known, "a run that is preempted again and again must come forward"
    return int(checkpoint["global_step"])


def train_on(warm: Warm, folder: Path, undisturbed: dict[str, Any], **arguments: Any) -> None:
    """Let a run end in peace, and compare with one that was never disturbed."""
    result = warm.ask(folder, arguments={"resume": True, **arguments})
    assert result["code"] == 0, result
    for key in COMPARED:
        assert_same(final(folder)[key], undisturbed[key], key)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_preempted_again_and_again_equals_an_undisturbed_one(
    seed: int, warm: Warm, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    draw = random.Random(seed)
    steps = 0
    for _ in range(4):
        kind = draw.choice([*KINDS, "".join(KINDS)])
        result = warm.ask(
            tmp_path,
            signals=[draw.choice(("SIGTERM", "SIGUSR1"))],
            kind=kind,
            at=draw.randint(1, 2 if kind in ("e", "s") else 6),
            delay_s=draw.uniform(0, 0.004),
            arguments={"resume": True},
        )
        if "d" in result["events"]:  # training had ended before
            assert "Traceback" not in result["out"] + result["err"]
            break
        steps = check_preempted(result, tmp_path, steps)
    assert steps
    train_on(warm, tmp_path, undisturbed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_in_every_stage(kind: str, warm: Warm, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    result = warm.ask(tmp_path, signals=["SIGTERM"], kind=kind, at=2, arguments={"save_last": True})
    check_preempted(result, tmp_path, 0, "last.ckpt")
    assert result["events"].endswith("s")
    if kind == "v":  # the validation is finished first
        assert result["events"].count("v") == 3
    train_on(warm, tmp_path, undisturbed, save_last=True)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_whole_process_group_with_loader_workers(
    name: str, warm: Warm, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    result = warm.ask(
        tmp_path, signals=[name], group=True, kind="t", at=11, to_the_end=True, arguments={"workers": 2, "step_s": 0.02}
    )
    assert check_preempted(result, tmp_path, 0) >= 6
    train_on(warm, tmp_path, undisturbed, workers=2)


def test_the_whole_process_group_while_workers_start(warm: Warm, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    for part in range(5):  # after an epoch's end its validation's workers end, and those of the next epoch are born
        result = warm.ask(
            tmp_path, signals=["SIGTERM"], group=True, kind="e", delay_s=part * 0.005, arguments={"workers": 2}
        )
        check_preempted(result, tmp_path, 0)
    train_on(warm, tmp_path, undisturbed, workers=2)


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGTERM"), ("SIGTERM", "SIGUSR1")])
def test_the_second_signal_ends_at_once_and_damages_nothing(
    first: str, second: str, warm: Warm, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    result = warm.ask(tmp_path, signals=[first, second], pause_s=0.1, kind="v", at=4, arguments={"step_s": 0.15})
    assert result["code"] == -signal.Signals[second]
    assert result["events"].count("v") <= 5, "the validation was not finished"
    assert "Traceback" not in result["out"] + result["err"]
    for path in tmp_path.glob("*.ckpt"):
        load_checkpoint(path)
    train_on(warm, tmp_path, undisturbed)


def test_a_second_signal_while_the_state_is_saved_leaves_whole_files(
    warm: Warm, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    draw = random.Random(5)
    for _ in range(4):
        result = warm.ask(
            tmp_path,
            signals=["SIGTERM", "SIGTERM"],
            kind="s",
            at=2,
            pause_s=draw.uniform(0, 0.004),
            arguments={"resume": True},
        )
        assert result["code"] in (0, 143, -signal.SIGTERM), result
        assert "Traceback" not in result["out"] + result["err"]
        for path in tmp_path.glob("*.ckpt"):
            load_checkpoint(path)
    train_on(warm, tmp_path, undisturbed)
