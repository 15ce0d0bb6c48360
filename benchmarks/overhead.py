"""Steps per second of the hand-written loop, of leyden, and of other trainers that are installed; and what they call.

    python benchmarks/overhead.py [--repeats 7] [--workloads tiny mlp cnn gpt lstm] [--json PATH] [--plot PATH]
    python benchmarks/overhead.py --quick       # a minute, without peers, compilers and counts

Each contestant has a process and one CPU thread, and only one of them runs at any time: they take turns of a fraction of a
second, in an order that rotates from round to round, so that a machine that is busy for a while disturbs all of them alike. A
contestant's ratio is the median, over the rounds, of its steps per second divided by those of the hand-written loop of the
same round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from contestants import Contestant, own_contestants
from measure import Race, calls_per_step, frames, processes, quiet_process, warm_compiler
from peers import peers
from report import Results, as_data, count_table, machine, plot, ratio_table, speed_table, standing_table, versions
from workloads import WORKLOADS

QUICK_WORKLOADS = ["tiny", "mlp", "gpt"]
QUICK_REPEATS = 3
QUICK_SHORTEN = 2


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, help=f"rounds that count, after one to warm up (7; {QUICK_REPEATS} if quick)"
    )
    parser.add_argument(
        "--workloads", nargs="+", choices=list(WORKLOADS), help=f"all; {', '.join(QUICK_WORKLOADS)} if quick"
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="contestants whose names contain one of these")
    parser.add_argument(
        "--quick", action="store_true", help="fewer workloads, shorter turns; no peers, compilers, counts"
    )
    parser.add_argument("--shorten", type=int, help=f"divide the steps of a turn by this (1; {QUICK_SHORTEN} if quick)")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--plot", type=Path, help="where to draw the ratios, as PNG; needs matplotlib")
    arguments = parser.parse_args(given)
    if arguments.repeats is None:
        arguments.repeats = QUICK_REPEATS if arguments.quick else 7
    if arguments.workloads is None:
        arguments.workloads = QUICK_WORKLOADS if arguments.quick else list(WORKLOADS)
    if arguments.shorten is None:
        arguments.shorten = QUICK_SHORTEN if arguments.quick else 1
    if arguments.repeats < 1 or arguments.shorten < 1:
        parser.error("--repeats and --shorten must be at least 1")
    return arguments


def chosen_contestants(arguments: argparse.Namespace) -> list[Contestant]:
    """Who takes part; the hand-written loop always does, for the ratios are to it."""
    found = own_contestants()
    if arguments.quick:
        found = [one for one in found if not one.compiled and "fused_optimizer" not in one.name]
    else:
        found += peers()
    return [
        contestant for number, contestant in enumerate(found)
        if number == 0 or not arguments.only or any(text in contestant.name for text in arguments.only)
    ]  # fmt: skip


def count(contestants: list[Contestant], folder: Path) -> dict[str, tuple[float, int]]:
    """Calls per step and frames of those that compile nothing."""
    found = {}
    tiny = WORKLOADS["tiny"]
    for number, contestant in enumerate(contestants):
        if not contestant.compiled:
            with contextlib.suppress(Exception) if not contestant.required else contextlib.nullcontext():
                own = folder / f"{number}"  # a peer that fails is named with its error where it is timed
                found[contestant.name] = calls_per_step(contestant, tiny, own), frames(contestant, tiny, own)
    return found


def run(arguments: argparse.Namespace, folder: Path) -> int:
    """Measure, print, and write what was asked for; the exit code says whether one of ours did not run."""
    start = time.perf_counter()
    contestants = chosen_contestants(arguments)
    peer_names = [contestant.name for contestant in contestants if contestant.group == "peer"]
    where = machine()
    print(", ".join(f"{name} {number}" for name, number in versions().items()))
    print(f"{where['cores']} CPU cores ({where['processor']}), one thread; {arguments.repeats} rounds\n", flush=True)
    counts: dict[str, tuple[float, int]] = {}
    if not arguments.quick:
        counts = count(contestants, folder / "counts")
        print(count_table(counts), flush=True)
    if any(contestant.compiled for contestant in contestants):
        warm_compiler()
    by_workload: dict[str, Results] = {}
    for kind in arguments.workloads:
        race = Race(WORKLOADS[kind], contestants, arguments.repeats, folder / kind, arguments.shorten)
        with processes(kind) as open_lane:
            found = by_workload[kind] = race.run(open_lane)
        print("\n" + speed_table(WORKLOADS[kind].title, found), flush=True)
    print("\n" + ratio_table(by_workload))
    if any(contestant.name == "leyden, default" for contestant in contestants):
        print("\n" + standing_table(by_workload, peer_names))
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    groups = {contestant.name: contestant.group for contestant in contestants}
    data = as_data(by_workload, counts, groups, " ".join(sys.argv))
    if arguments.json:
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")
    if arguments.plot:
        plot(data, {kind: WORKLOADS[kind].title for kind in by_workload}, arguments.plot)
    required = {contestant.name for contestant in contestants if contestant.required}
    return int(any(results[name].failed for results in by_workload.values() for name in required))


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    for name in ("json", "plot"):
        if getattr(arguments, name):
            setattr(arguments, name, getattr(arguments, name).absolute())
    quiet_process()
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        # compilers must compile, not find what an earlier run or another contestant has left
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
        os.chdir(folder)
        try:
            return run(arguments, Path(folder))
        finally:
            os.chdir(before)


if __name__ == "__main__":
    sys.exit(main())
