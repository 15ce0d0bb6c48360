"""Kill a training at each of its instants, let it go on, and compare it with one that was never disturbed.

``python tests/faults/driver.py`` prints a table. ``--share N`` looks at one in N of the instants, ``--cases a,b`` at some
cases. Exit code 1 if a run differs. Each run is a fork of this process, which has imported everything, so that it takes a
fraction of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # threads that spin would starve the forks of each other

import torch
import torch._dynamo  # the first optimizer of a process imports it, which would take a second in each fork

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.program import CASES, Case, train
from leyden.checkpoint import load_checkpoint

Kill = tuple[str, int | float]
TIMEOUT_S = 120.0


@dataclass
class Outcome:
    """How often a case was killed, and where it came out differently."""

    case: Case
    kills: int = 0
    missed: int = 0
    differences: list[str] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.differences = []


def fork(folder: Path, case: Case, kill: Kill | None, resumed: bool) -> bool:
    """Train in a process of its own; whether it was killed as asked.

    Raises:
        RuntimeError: if it failed by itself, or hangs.
    """
    pid = os.fork()
    if pid == 0:
        _child(folder, case, kill, resumed)
    if kill is not None and kill[0] == "time":
        time.sleep(kill[1])
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise RuntimeError(f"{case.name}: {kill}: hangs\n{(folder / 'output').read_text()[-3000:]}")
        time.sleep(0.002)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"{case.name}: {kill}: failed\n{(folder / 'output').read_text()[-3000:]}")
    return False


def _child(folder: Path, case: Case, kill: Kill | None, resumed: bool) -> None:
    code = 1
    try:
        with open(folder / "output", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        torch.set_num_threads(1)
        warnings.simplefilter("error")
        for passing in ("fast-forward", "checkpoint-none-saved"):  # what some cases are about
            warnings.filterwarnings("ignore", message=rf"\[LEY-{passing}\]")
        event = None if kill is None or kill[0] == "time" else (kill[0], int(kill[1]))
        train(folder, case, event, resumed)
        code = 0
    except BaseException:  # noqa: BLE001 — reported by the parent; a fork must never return into it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def lines(folder: Path) -> dict[tuple[str, str], set[str]]:
    """All that a run wrote down, by kind and key. A batch or value that was done twice is there twice, if it differs."""
    found: dict[tuple[str, str], set[str]] = {}
    for line in (folder / "lines.jsonl").read_text().splitlines():
        kind, key, value = json.loads(line)
        found.setdefault((kind, key), set()).add(json.dumps(value))
    return found


def result(folder: Path) -> dict[str, Any]:
    """The state at the end, with the folder's name taken out of paths."""
    return _without(load_checkpoint(folder / "result.state"), str(folder))  # type: ignore[no-any-return]


def _without(value: Any, text: str) -> Any:
    if isinstance(value, str):
        return value.replace(text, "")
    if isinstance(value, dict):
        return {_without(key, text): _without(part, text) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without(part, text) for part in value]
    return value


def difference(first: Any, second: Any, path: str = "") -> str | None:
    """Where two states differ, bit for bit; None if they do not."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape
        if same and first.is_floating_point():
            same = torch.equal(first.nan_to_num(3e33), second.nan_to_num(3e33))
        else:
            same = same and torch.equal(first, second)
        return None if same else f"{path}: {first} / {second}"
    if isinstance(first, dict) and isinstance(second, dict):
        if list(map(str, first)) != list(map(str, second)):
            return f"{path}: keys {list(first)} / {list(second)}"
        pairs: Any = ((key, first[key], second[key]) for key in first)
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return f"{path}: {first} / {second}"
        pairs = ((index, *both) for index, both in enumerate(zip(first, second, strict=True)))
    else:
        same = type(first) is type(second) and (first == second or (first != first and second != second))
        return None if same else f"{path}: {first!r} / {second!r}"
    return next((found for key, a, b in pairs if (found := difference(a, b, f"{path}.{key}"))), None)


def compare(folder: Path, reference: Path) -> str | None:
    """What differs from the undisturbed run: the state at the end, a batch, a logged value."""
    found = difference(result(reference), result(folder))
    if found:
        return found
    expected, here = lines(reference), lines(folder)
    for key, values in here.items():
        if not values <= expected.get(key, set()):
            return f"{key}: {sorted(values)[:2]}, undisturbed {sorted(expected.get(key, set()))[:2]}"
    missing = expected.keys() - here.keys()
    return f"never done: {sorted(missing)[:3]}" if missing else None


def instants(folder: Path, case: Case, duration_s: float, chance: random.Random, share: int) -> Iterator[list[Kill]]:
    """Where to kill: at each event of the undisturbed run, at random times, and several times in one life."""
    counts = json.loads((folder / "counts.json").read_text())
    events = [(name, count) for name, total in counts.items() if name != "write" for count in range(1, total + 1)]
    writes = [("write", count) for count in range(1, counts.get("write", 0) + 1)]
    single = [
        *chance.sample(events, max(1, len(events) // share)),
        *chance.sample(writes, min(len(writes), max(1, 24 // share))),
    ]
    for kill in single:
        yield [kill]
    for _ in range(max(1, 12 // share)):
        yield [("time", chance.uniform(0, duration_s))]
    for _ in range(max(1, 8 // share)):
        yield [chance.choice(events), chance.choice(events), chance.choice(writes or events)]


def examine(case: Case, share: int, seed: int, room: Path) -> Outcome:
    """Run one case undisturbed, then killed at many instants."""
    chance = random.Random(f"{seed} {case.name}")
    outcome = Outcome(case)
    reference = room / case.name / "undisturbed"
    reference.mkdir(parents=True)
    began = time.monotonic()
    fork(reference, case, None, False)
    duration_s = time.monotonic() - began
    for number, kills in enumerate(instants(reference, case, duration_s, chance, share)):
        folder = room / case.name / f"life{number}"
        folder.mkdir()
        try:
            resumed = False
            for kill in kills:
                killed = fork(folder, case, kill, resumed)
                outcome.kills += killed
                outcome.missed += not killed
                resumed = True
                if not killed:
                    break
            else:
                fork(folder, case, None, True)
            found = compare(folder, reference)
        except RuntimeError as error:
            found = str(error)
        if found:
            outcome.differences.append(f"{case.name} killed at {kills}: {found[:1500]}")
        else:
            shutil.rmtree(folder)
    return outcome


def main() -> int:
    """Examine the cases that were asked for, and print how many lives came out the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=int, default=1, help="look at one in so many instants")
    parser.add_argument("--cases", default="", help="names, with commas; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="", help="a folder to keep everything in")
    given = parser.parse_args()
    names = set(filter(None, given.cases.split(",")))
    unknown = names - {case.name for case in CASES}
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}. Known: {', '.join(case.name for case in CASES)}")
    kills = wrong = 0
    with contextlib.ExitStack() as stack:
        room = Path(given.keep) if given.keep else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for case in CASES:
            if names and case.name not in names:
                continue
            began = time.monotonic()
            outcome = examine(case, given.share, given.seed, room)
            kills += outcome.kills
            wrong += len(outcome.differences)
            print(f"{case.name:18} {outcome.kills:4} kills, {len(outcome.differences)} differ, "
                  f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
            for line in outcome.differences[:3]:
                print(f"    {line}", flush=True)
    print(f"{kills} kills, {wrong} lives differ from the undisturbed one")
    return 1 if wrong or not kills else 0


if __name__ == "__main__":
    sys.exit(main())
