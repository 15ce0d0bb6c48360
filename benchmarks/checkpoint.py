"""How long training stands still for a checkpoint, and how long it takes until the file is on the disk; against torch.save.

    python benchmarks/checkpoint.py [--sizes 10 100 1000] [--repeats 7] [--folder DIR]

One process, one round after the other; a round saves once in each way, in an order that rotates. The first rounds do not
count: they pay for memory that is kept (leyden's snapshot) and for the disk's cache. Shown are medians; the ratio is the median
of the stall divided by torch.save's time of the same round.

The stall is what the loop waits for: all of `torch.save`, or `Writer.submit`. Nothing runs beside the background write here, so
what it takes from a training step on a busy machine is no part of this.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import leyden
from leyden.checkpoint.writer import Writer

WARMUP_ROUNDS = 2
SMALL = "1,000 tensors of 10 KB"


def weights(megabytes: float, tensors: int) -> dict[str, Tensor]:
    """As many float32 tensors as asked for, of ``megabytes`` in all."""
    elements = int(megabytes * 1e6 / 4 / tensors)
    return {f"layers.{i // 4}.block.{i % 4}.weight": torch.randn(elements) for i in range(tensors)}


Way = Callable[[Path, dict[str, Any]], tuple[float, float]]
"""Saves, and returns the seconds until the loop may go on and until the file is there."""


def torch_save(path: Path, checkpoint: dict[str, Any]) -> tuple[float, float]:
    start = time.perf_counter()
    torch.save(checkpoint, path)
    done = time.perf_counter() - start
    return done, done


def torch_save_durably(path: Path, checkpoint: dict[str, Any]) -> tuple[float, float]:
    """What a careful hand-written loop does: a temporary file, fsync, rename."""
    start = time.perf_counter()
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    done = time.perf_counter() - start
    return done, done


def background(writer: Writer) -> Way:
    def save(path: Path, checkpoint: dict[str, Any]) -> tuple[float, float]:
        start = time.perf_counter()
        writer.submit(path, checkpoint)
        stall = time.perf_counter() - start
        writer.wait()
        return stall, time.perf_counter() - start

    return save


def measure(checkpoint: dict[str, Any], folder: Path, repeats: int) -> dict[str, list[tuple[float, float]]]:
    writer = Writer()
    ways: dict[str, Way] = {
        "torch.save": torch_save,
        "torch.save, fsync": torch_save_durably,
        "leyden": background(writer),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(WARMUP_ROUNDS + repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(ways[name](folder / f"{names.index(name)}.ckpt", checkpoint))
            # the dirty pages of one must not be written in the time of the next
            os.sync()
    writer.release()
    return times


def row(title: str, times: dict[str, list[tuple[float, float]]]) -> str:
    first = times["leyden"][0][0]
    kept = {name: values[WARMUP_ROUNDS:] for name, values in times.items()}
    plain, durable, ours = kept["torch.save"], kept["torch.save, fsync"], kept["leyden"]
    ratios = [stall / whole for (stall, _), (whole, _) in zip(ours, plain, strict=True)]
    cells = [
        f"{1e3 * first:.0f}",
        f"{1e3 * statistics.median(stall for stall, _ in ours):.1f}",
        f"{1e3 * statistics.median(done for done, _ in plain):.0f}",
        f"{1e3 * statistics.median(done for done, _ in durable):.0f}",
        f"{1e3 * statistics.median(done for _, done in ours):.0f}",
        f"{100 * statistics.median(ratios):.1f} %",
        f"{100 * min(ratios):.1f} to {100 * max(ratios):.1f} %",
    ]
    return f"| {title} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Stall and total time of a checkpoint, against torch.save.")
    parser.add_argument("--sizes", type=float, nargs="*", default=[10, 100, 1000], help="MB of weights")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary folder")
    arguments = parser.parse_args()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, leyden {leyden.__version__}, "
        f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads; ms, medians of {arguments.repeats} rounds\n"
    )
    print(
        "| weights | first stall | stall | torch.save | with fsync | leyden, until durable | stall / torch.save | range |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    cases = [(SMALL, 10.0, 1000)] + [(f"{size:g} MB", size, 50) for size in arguments.sizes]
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for title, size, tensors in cases:
            times = measure({"state_dict": weights(size, tensors)}, Path(folder), arguments.repeats)
            line = row(title, times)
            print(line, flush=True)
            worst = max(worst, float(line.split("|")[-3].rstrip(" %")))
    sys.exit(worst >= 20)


if __name__ == "__main__":
    main()
