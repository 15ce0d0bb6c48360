"""The same comparison on a GPU, with ResNet-50 and a GPT of GPT-2's small size in bf16: speed, utilisation, memory, waits.

    python benchmarks/gpu.py [--repeats 3] [--workloads tiny … gpt2] [--json PATH]
    python benchmarks/gpu.py --device cpu --tiny        # tries the script where there is no GPU; its figures mean nothing

One process; the contestants train one after the other, in an order that rotates from round to round. The host waits for the
device at the two ends of what is timed, and nowhere between. Exit code 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contestants import Clock, Compiled, default_options, modules_of
from large import LARGE, LARGE_TINY
from measure import off_screen
from report import table, versions
from torch.utils.data import DataLoader, RandomSampler
from workloads import WORKLOADS, Task, Workload

import leyden

MOST_SAMPLES = 1024
"""Of the large workloads, which are read several times: 600 MB of images."""
WORKERS = {"resnet50": 8}
SYNC_STEPS = 20
"""Steps in which waits are counted; fewer than `log_every_n_steps`, so that there should be none."""
SAMPLE_EVERY_S = 0.05


@dataclass(frozen=True)
class Setting:
    """Where and how a workload is trained.

    Attributes:
        device: a CUDA device, or the CPU to try the script.
        bf16: whether the forward pass runs under autocast.
        folder: where files go.
    """

    device: torch.device
    bf16: bool
    folder: Path

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def trainer_options(self) -> dict[str, Any]:
        """What leyden's and Lightning's Trainer are told alike."""
        accelerator = "cpu" if self.device.type == "cpu" else "cuda"
        precision = "bf16-mixed" if self.bf16 else "32-true"
        return {"accelerator": accelerator, "devices": 1, "max_epochs": 1, "precision": precision}


Make = Callable[[Task, "DataLoader[Any]", Setting], Callable[[], object]]


def by_hand(compiled: bool) -> Make:
    def make(task: Task, batches: DataLoader[Any], setting: Setting) -> Callable[[], object]:
        task.to(setting.device)
        optimizer = task.optimizer()
        compute: Any = torch.compile(task.compute) if compiled else task.compute

        def run() -> None:
            task.train()
            for batch in batches:
                task.tick()
                moved = [part.to(setting.device, non_blocking=True) for part in batch]
                optimizer.zero_grad()
                with setting.autocast():
                    loss = compute(moved)
                loss.backward()
                optimizer.step()

        return run

    return make


def by_leyden(compiled: bool) -> Make:
    def make(task: Task, batches: DataLoader[Any], setting: Setting) -> Callable[[], object]:
        options = default_options(setting.folder) | setting.trainer_options()
        module = Compiled(task) if compiled else modules_of(leyden.LightningModule)(task, True)
        if compiled:
            options["callbacks"].append(Clock())
        trainer = leyden.Trainer(compile=compiled, **options)
        return lambda: trainer.fit(module, batches)

    return make


def by_lightning(task: Task, batches: DataLoader[Any], setting: Setting) -> Callable[[], object]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    trainer = Trainer(
        default_root_dir=setting.folder,
        logger=CSVLogger(str(setting.folder)),
        callbacks=[ModelCheckpoint(dirpath=setting.folder / "checkpoints")],
        **setting.trainer_options(),
    )
    module = modules_of(LightningModule)(task, True)
    return lambda: trainer.fit(module, batches)


def contestants() -> dict[str, Make]:
    found = {
        "PyTorch, by hand": by_hand(compiled=False),
        "by hand, torch.compile": by_hand(compiled=True),
        "leyden, default": by_leyden(compiled=False),
        "leyden, compile=True": by_leyden(compiled=True),
    }
    if importlib.util.find_spec("lightning") is not None:
        found["Lightning, default"] = by_lightning
    return found


class Utilisation:
    """Samples how busy the GPU is, in a thread; None where nvidia-ml-py is missing or there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ended = threading.Event()
        self._samples: list[int] = []
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if device.type == "cuda" and importlib.util.find_spec("pynvml") is not None:
            self._thread.start()

    def percent(self) -> float | None:
        """End, and return the mean."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        return statistics.mean(self._samples) if self._samples else None

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            self._samples.append(torch.cuda.utilization(self._device))


@dataclass
class Result:
    """What was measured of one contestant; one number for each round."""

    steps_per_s: list[float] = field(default_factory=list)
    utilisation: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    set_up_s: list[float] = field(default_factory=list)
    waits_per_step: float | None = None
    failed: str | None = None


class Window:
    """The clock: opens after the warm-up and closes after the turn, and waits for the device at both."""

    def __init__(self, device: torch.device, warm_up: int, turn: int) -> None:
        self.device = device
        self.seconds = 0.0
        self.peak_mb = 0.0
        self.utilisation: float | None = None
        self._opens, self._closes = warm_up + 1, warm_up + turn + 1
        self._steps = 0
        self._since = 0.0
        self._sampler: Utilisation | None = None

    def tick(self) -> None:
        self._steps += 1
        if self._steps == self._opens:
            self._sampler = Utilisation(self.device)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
            self._since = time.perf_counter()
        elif self._steps == self._closes:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                self.peak_mb = torch.cuda.max_memory_allocated(self.device) / 1e6
            self.seconds = time.perf_counter() - self._since
            assert self._sampler is not None
            self.utilisation = self._sampler.percent()


class Waits:
    """Counts where the host waits for the device, by torch's own warnings."""

    def __init__(self, device: torch.device, warm_up: int, turn: int) -> None:
        self.on_gpu = device.type == "cuda"
        self._opens, self._closes = warm_up + 1, warm_up + turn + 1
        self._steps = 0

    def tick(self) -> None:
        self._steps += 1
        if self.on_gpu and self._steps in (self._opens, self._closes):
            torch.cuda.set_sync_debug_mode("warn" if self._steps == self._opens else "default")

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[Any]]:
        """Yield a list that has the waits in it afterwards."""
        found: list[Any] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield found
            finally:
                if self.on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
        found += [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]


def loader(kind: str, workload: Workload, data: Any, steps: int, device: torch.device) -> DataLoader[Any]:
    """Read the data as often as the steps need, in a random order, from pinned memory."""
    order = RandomSampler(data, num_samples=steps * workload.batch_size, generator=torch.Generator().manual_seed(2))
    workers = min(WORKERS.get(kind, 0), os.cpu_count() or 1)
    return DataLoader(data, workload.batch_size, sampler=order, num_workers=workers, pin_memory=device.type == "cuda")


def measure(kind: str, workload: Workload, makers: dict[str, Make], arguments: Any, folder: Path) -> dict[str, Result]:
    """Let everyone train `arguments.repeats` times, after once to warm up, and once more to count waits."""
    device, turn = torch.device(arguments.device), workload.turn
    steps = workload.warm_up + turn + 2
    data = workload.data(min(steps, max(1, MOST_SAMPLES // workload.batch_size)) if kind in LARGE else steps)
    results = {name: Result() for name in makers}
    names = list(makers)
    for number in range(arguments.repeats + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            result, own = results[name], folder / f"{kind}-{number}-{names.index(name)}"
            own.mkdir()
            setting = Setting(device, kind in LARGE, own)
            window = Window(device, workload.warm_up, turn)
            start = time.perf_counter()
            if result.failed is None and train(makers[name], workload, kind, data, steps, setting, window, result):
                rate = turn / window.seconds
                result.set_up_s.append(time.perf_counter() - start - steps / rate)
                if number > 0:
                    result.steps_per_s.append(rate)
                    result.peak_mb.append(window.peak_mb)
                    result.utilisation += [] if window.utilisation is None else [window.utilisation]
    for name, result in results.items():
        own = folder / f"{kind}-waits-{names.index(name)}"
        own.mkdir()
        waits = Waits(device, workload.warm_up, SYNC_STEPS)
        steps = workload.warm_up + SYNC_STEPS + 2
        with waits.counted() as found:
            if result.failed is None:
                train(makers[name], workload, kind, data, steps, Setting(device, kind in LARGE, own), waits, result)
        result.waits_per_step = len(found) / SYNC_STEPS if waits.on_gpu else None
    return results


def train(
    make: Make, workload: Workload, kind: str, data: Any, steps: int, setting: Setting, clock: Any, result: Result
) -> bool:
    """Train once; whether it worked."""
    torch.compiler.reset()
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    task = workload.task()
    task.tick = clock.tick
    try:
        with off_screen():
            make(task, loader(kind, workload, data, steps, setting.device), setting)()
    except Exception as error:  # noqa: BLE001  # the others go on
        result.failed = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return result.failed is None


def result_table(title: str, results: dict[str, Result]) -> str:
    base = next(iter(results.values())).steps_per_s
    rows = []
    for name, result in results.items():
        if result.failed is not None or not base:
            rows.append([name, "failed", *[""] * 6, str(result.failed).replace("|", "/")])
            continue
        ratios = sorted(own / other for own, other in zip(result.steps_per_s, base, strict=True))
        rows.append(
            [
                name,
                f"{statistics.median(result.steps_per_s):.1f}",
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                f"{statistics.mean(result.utilisation):.0f} %" if result.utilisation else "–",
                f"{statistics.median(result.peak_mb):.0f}" if any(result.peak_mb) else "–",
                "–" if result.waits_per_step is None else f"{result.waits_per_step:.2f}",
                f"{result.set_up_s[0]:.1f}",
                f"{statistics.median(result.set_up_s[1:]):.1f}",
            ]
        )
    head = [title, "steps/s", "ratio", "lowest and highest", "GPU busy", "peak, MB", "waits per step"]
    return table([*head, "first set-up, s", "set-up, s"], rows)


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [*WORKLOADS, *LARGE]
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the script (default: cuda)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count, after one to warm up (default: 3)")
    parser.add_argument("--workloads", nargs="+", default=names, choices=names)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="contestants whose names contain one of these")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps, to try the script")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args(given)
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    return arguments


def chosen_workloads(arguments: argparse.Namespace) -> dict[str, Workload]:
    known = WORKLOADS | LARGE
    if not arguments.tiny:
        return {kind: known[kind] for kind in arguments.workloads}
    small = {kind: Workload(w.title, 2, w.net, w.samples, warm_up=2, turn=2) for kind, w in WORKLOADS.items()}
    return {kind: (small | LARGE_TINY)[kind] for kind in arguments.workloads}


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("No CUDA device. To try the script without one: --device cpu --tiny", file=sys.stderr)
        return 2
    logging.disable(logging.WARNING)
    os.environ.setdefault("COLUMNS", "120")
    found = {
        name: make for number, (name, make) in enumerate(contestants().items())
        if number == 0 or not arguments.only or any(text in name for text in arguments.only)
    }  # fmt: skip
    where = torch.cuda.get_device_name(arguments.device) if arguments.device != "cpu" else "no GPU: nothing is measured"
    print(", ".join(f"{name} {number}" for name, number in versions().items()))
    print(f"{where}; {os.cpu_count()} CPU cores; {arguments.repeats} rounds", flush=True)
    everything: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, workload in chosen_workloads(arguments).items():
            results = measure(kind, workload, found, arguments, Path(folder))
            everything[kind] = {name: vars(result) for name, result in results.items()}
            print("\n" + result_table(f"{workload.title}{', bf16' * (kind in LARGE)}", results), flush=True)
    if arguments.json:
        data = {"device": where, "versions": versions(), "command": " ".join(sys.argv), "workloads": everything}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")
    failed = [name for results in everything.values() for name, result in results.items() if result["failed"]]
    return int(any(name != "Lightning, default" for name in failed))


if __name__ == "__main__":
    sys.exit(main())
