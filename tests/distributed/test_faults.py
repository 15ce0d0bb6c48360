"""One rank of several comes to grief: all are over in seconds, the culprit's words come first, the exit code is not zero."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("faulty.py")
LIMIT_S = 120.0
"""For the whole program: a wait that never ends would be 30 minutes, the timeout of a collective."""


@dataclass
class Ended:
    """What became of a run."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """What rank 0 printed at its end."""
        lines = [line for line in self.out.splitlines() if line.startswith("{")]
        assert len(lines) == 1, self.out + self.err
        return json.loads(lines[0])


def run(folder: Path, *options: object, launcher: tuple[str, ...] = ()) -> Ended:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *launcher, str(PROGRAM), str(folder), *map(str, options)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"not over after {LIMIT_S} s\n{out}\n{err}")
    assert not ranks_left(str(folder)), "a rank outlived its run"
    return Ended(process.returncode, out, err)


def ranks_left(folder: str) -> list[str]:
    """The processes of a run that are still there a moment after it has ended."""
    for _ in range(20):
        left = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if str(PROGRAM).encode() in words and folder.encode() in words:
                    left.append(entry.name)
        if not left:
            break
        time.sleep(0.1)
    return left


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

FAULTS = {
    "exception": (1, "ValueError: the culprit's own words"),
    "out of memory": (1, "OutOfMemoryError: the culprit's own words"),
    "None": (1, "training_step returned None on rank 1 of 2"),
    "SIGINT": (130, "rank 1 failed first: KeyboardInterrupt"),
    "SIGKILL": (137, "its process was killed"),
    "exit": (3, "SystemExit: 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_rank_ends_all(fault: str, tmp_path: Path) -> None:
    code, words = FAULTS[fault]
    ended = run(tmp_path / "run", "--fault", fault)
    said = ended.err + ended.out
    assert ended.code == code, said
    assert words in said
    assert not ended.out.count('{"steps"'), "no rank came to the end"
    if fault in ("exception", "out of memory", "None"):
        own, other = ended.err.index("in training_step" if fault != "None" else words), ended.err.find("RankError")
        assert other == -1 or own < other, "the culprit's traceback comes first"
        assert "failed in rank 1, which ended first, with exit code 1: " in ended.err


@pytest.mark.parametrize("place", ["setup", "validation", "saving"])
def test_wherever_it_happens(place: str, tmp_path: Path) -> None:
    ended = run(tmp_path / "run", "--fault", "exception", "--place", place, "--rank", "0", "--step", "0")
    assert ended.code == 1
    assert "ValueError: the culprit's own words" in ended.err


@pytest.mark.parametrize("fault", ["exception", "SIGKILL"])
def test_under_torchrun(fault: str, tmp_path: Path) -> None:
    ended = run(tmp_path / "run", "--fault", fault, launcher=TORCHRUN)
    assert ended.code != 0
    assert FAULTS[fault][1] in ended.err


def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path: Path) -> None:
    ended = run(tmp_path / "run", "--fault", "SIGTERM", "--once")
    assert ended.code == 143, ended.err
    assert "the state is saved in" in ended.out
    whole = run(tmp_path / "whole")
    again = run(tmp_path / "run", "--fault", "none")
    assert whole.code == again.code == 0
    assert again.result["weights"] == whole.result["weights"], "a program that is started anew trains anew"


@pytest.mark.parametrize("fault", ["exception", "SIGKILL"])
def test_with_restarts_it_goes_on_from_the_last_checkpoint(fault: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    ended = run(tmp_path / "run", "--fault", fault, "--step", 13, "--once", "--restarts", 1)
    assert ended.code == 0, ended.err
    assert "step 12." in ended.out, ended.out
    assert ended.result == whole.result, "to the last bit"


def test_restarts_come_to_an_end(tmp_path: Path) -> None:
    ended = run(tmp_path / "run", "--fault", "exception", "--restarts", 1)
    assert ended.code == 1
    assert ended.err.count("ValueError: the culprit's own words") >= 2


def test_torchrun_restarts_as_well(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    torchrun = (*TORCHRUN, "--max-restarts=1")
    ended = run(tmp_path / "run", "--fault", "SIGKILL", "--step", 13, "--once", launcher=torchrun)
    assert ended.code == 0, ended.err
    assert ended.result == whole.result


def test_uneven_data_ends_together_and_is_announced(tmp_path: Path) -> None:
    ended = run(tmp_path / "run", "--uneven")
    assert ended.code == 0, ended.err
    assert ended.result["steps"] == 3 * (8 - 3)
