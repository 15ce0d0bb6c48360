"""Samples per second: torch's DataLoader, leyden.data.DataLoader, and a Trainer's reading of torch's DataLoader.

    python benchmarks/data.py [--repeats 9] [--samples 8192] [--images 256] [--workers 2]

One process, one thread; a round reads one whole epoch in each way, in an order that rotates, and the first round does not count:
persistent workers are started in it. Shown are medians; a ratio is the median of samples per second divided by those of torch's
DataLoader of the same round. Nothing is done with the batches.

The images are JPEGs that are written into a temporary folder, decoded and flipped at random. In the
case «as they are made» each way has its own default: leyden.data.DataLoader keeps its workers from epoch to epoch, torch's starts
them anew, and a Trainer leaves that as the user made it.

Ends with 1 if tensors in memory (one dataset or a part of it) are read less than 3 times as fast as by torch, or images less than
0.95 times, which leaves room for noise.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import leyden
import leyden.data
from leyden.data.loader import make_source

try:
    from PIL import Image
except ImportError:  # it comes with matplotlib, an extra: leyden[demo]
    Image = None

WARMUP_ROUNDS = 1
WAYS = ("torch", "leyden.data", "Trainer")
REQUIRED_IN_MEMORY, REQUIRED_IMAGES = 3.0, 0.95
SIDE = 160  # pixels


class Images(Dataset[Any]):
    """Decodes an image file and flips it at random."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.paths[index]) as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return (pixels.flip(2) if random.random() < 0.5 else pixels), index % 10


def write_images(folder: Path, count: int) -> None:
    """Smooth images, which compress like photographs."""
    noise = np.random.default_rng(0)
    for number in range(count):
        small = noise.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(
            folder / f"{number:05}.jpg", quality=90
        )


def readings(dataset: Any, **options: Any) -> dict[str, tuple[Callable[[], Iterable[Any]], Callable[[], None]]]:
    """For each way what begins an epoch, and what ends its workers."""
    plain, own = DataLoader(dataset, **options), leyden.data.DataLoader(dataset, **options)
    source = make_source(DataLoader(dataset, **options), "train_dataloader", 1.0, "limit_train_batches")
    return {
        "torch": (lambda: plain, lambda: None),
        "leyden.data": (lambda: own, lambda: None),
        "Trainer": (lambda: (batch for batch, _ in source.batches(None)), source.shut_down),
    }


def measure(dataset: Any, repeats: int, **options: Any) -> dict[str, list[float]]:
    """Samples per second of each way, round by round."""
    ways = readings(dataset, **options)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(WARMUP_ROUNDS + repeats):
        for name in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
            start = time.perf_counter()
            for _ in ways[name][0]():
                pass
            rates[name].append(len(dataset) / (time.perf_counter() - start))
    for _, end in ways.values():
        end()
    return {name: values[WARMUP_ROUNDS:] for name, values in rates.items()}


def row(title: str, rates: dict[str, list[float]]) -> tuple[str, float]:
    """A line of the table, and the smaller of its two ratios."""
    cells, least = [f"{statistics.median(rates['torch']):,.0f}"], float("inf")
    for name in WAYS[1:]:
        ratios = [ours / torchs for ours, torchs in zip(rates[name], rates["torch"], strict=True)]
        cells += [
            f"{statistics.median(rates[name]):,.0f}",
            f"**{statistics.median(ratios):.2f}**",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        ]
        least = min(least, statistics.median(ratios))
    return f"| {title} | {' | '.join(cells)} |", least


def in_memory(samples: int) -> Iterable[tuple[str, Any, dict[str, Any]]]:
    """Every case of tensors in memory: its title, the dataset, the loader's arguments."""
    for width in (8, 784):
        whole = TensorDataset(torch.randn(2 * samples, width), torch.randint(10, (2 * samples,)))
        half = Subset(whole, torch.randperm(2 * samples)[:samples].tolist())
        first, second = (
            TensorDataset(*(part[i * samples // 2 :][: samples // 2] for part in whole.tensors)) for i in (0, 1)
        )
        datasets = {
            "TensorDataset": TensorDataset(*(part[:samples] for part in whole.tensors)),
            "Subset of it": half,
            "ConcatDataset of two": ConcatDataset([first, second]),
        }
        for name, dataset in datasets.items():
            for batch_size in (8, 64, 512) if name == "TensorDataset" else (64,):
                for shuffle in (True, False):
                    order = "shuffled" if shuffle else "in order"
                    title = f"{name}, {width} floats, batch {batch_size}, {order}"
                    yield title, dataset, {"batch_size": batch_size, "shuffle": shuffle}


def main() -> None:
    parser = argparse.ArgumentParser(description="Samples per second, against torch's DataLoader.")
    parser.add_argument("--repeats", type=int, default=9, help="rounds that count")
    parser.add_argument("--samples", type=int, default=8192, help="of datasets in memory")
    parser.add_argument("--images", type=int, default=256, help="files to decode; 0 leaves them out")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, leyden {leyden.__version__}, "
        f"{os.cpu_count()} CPU cores, 1 thread; samples per second, medians of {arguments.repeats} rounds\n"
    )
    print("| data | torch | leyden.data | ratio | range | Trainer | ratio | range |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    fails = False
    for title, dataset, options in in_memory(arguments.samples):
        line, least = row(title, measure(dataset, arguments.repeats, **options))
        print(line, flush=True)
        fails = fails or (least < REQUIRED_IN_MEMORY and not title.startswith("Concat"))
    if Image is None and arguments.images:
        print("\nPillow is not installed, so no image was decoded.")
    elif arguments.images:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), arguments.images)
            cases: dict[str, dict[str, Any]] = {"workers kept": {"persistent_workers": True}, "as they are made": {}}
            for name, more in cases.items():
                options = {"batch_size": 32, "shuffle": True, "num_workers": arguments.workers, **more}
                title = f"JPEG {SIDE} x {SIDE}, batch 32, {arguments.workers} workers, {name}"
                line, least = row(title, measure(Images(Path(folder)), arguments.repeats, **options))
                print(line, flush=True)
                fails = fails or least < REQUIRED_IMAGES
    sys.exit(fails)


if __name__ == "__main__":
    main()
