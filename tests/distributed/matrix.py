"""The whole matrix of faults: what happens to one rank, at which place, under which strategy; and how soon all are over.

    python tests/distributed/matrix.py [--strategies ddp fsdp] [--devices 2] [--markdown]

A row fails if the run does not end by itself, ends with code 0, takes more than 10 s from the fault to its end, or leaves a
process behind. `test_faults.py` holds a part of it in the test suite.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from test_faults import PROGRAM, ranks_left

FAULTS = ("exception", "None", "out of memory", "exit", "SIGINT", "SIGTERM", "SIGKILL")
PLACES = ("setup", "training", "validation", "saving")
LIMIT_S = 10.0
GIVE_UP_S = 90.0


def seconds_to_end(fault: str, place: str, strategy: str, rank: int, devices: int) -> tuple[float, int, bool]:
    """From the fault to the end of all processes; the exit code; and whether nothing was left behind."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PROGRAM), folder, "--fault", fault, "--place", place, "--strategy", strategy]
        command += ["--rank", str(rank), "--devices", str(devices), "--step", "0" if place == "setup" else "5"]
        command += ["--once"] if fault == "SIGTERM" else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            try:
                code = process.wait(GIVE_UP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return float("inf"), process.wait(), not ranks_left(folder)
        ended = time.time()
        mark = Path(folder, "suffered")
        return (ended - mark.stat().st_mtime if mark.exists() else float("nan")), code, not ranks_left(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--faults", nargs="+", default=list(FAULTS))
    parser.add_argument("--places", nargs="+", default=list(PLACES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1])
    parser.add_argument("--devices", type=int, default=2)
    given = parser.parse_args()
    bad = 0
    for strategy in given.strategies:
        print(f"\n{strategy}, {given.devices} ranks: seconds from the fault to the end of all (exit code)\n")
        print(f"| rank | fault | {' | '.join(given.places)} |")
        print("| ---: | --- |" + " --- |" * len(given.places))
        for rank in given.ranks:
            for fault in given.faults:
                cells = []
                for place in given.places:
                    if fault == "None" and place != "training":
                        cells.append("")
                        continue
                    took_s, code, clean = seconds_to_end(fault, place, strategy, rank, given.devices)
                    fine = took_s <= LIMIT_S and code != 0 and clean
                    bad += not fine
                    cells.append(f"{took_s:.1f} ({code})" + ("" if fine else " **!**"))
                print(f"| {rank} | {fault} | {' | '.join(cells)} |", flush=True)
    sys.exit(f"{bad} of them are not as they should be" if bad else 0)


if __name__ == "__main__":
    main()
