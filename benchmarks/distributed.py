"""Several processes: DDP by a Trainer against DDP by hand, and how the rate grows with the number of processes.

Each contestant trains in processes of its own, started as torchrun would, one contestant after the other in turns; the ratio of
two neighbours is taken, and the median over the turns is shown. On a machine with fewer cores than processes they share them.

    python benchmarks/distributed.py --repeats 7 --plot docs/images/scaling.png
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import by_leyden
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from workloads import WORKLOADS, Task, Workload

WARM_UP, STEPS = 40, 200


class Clock:
    """Notes when the steps between the warm-up and the end were made."""

    def __init__(self, steps: int) -> None:
        self.last, self.count, self.began_s, self.took_s = WARM_UP + steps, 0, 0.0, 0.0

    def __call__(self) -> None:
        self.count += 1
        if self.count == WARM_UP:
            self.began_s = time.perf_counter()
        elif self.count == self.last:
            self.took_s = time.perf_counter() - self.began_s


def by_hand(task: Task, data: Any, batch_size: int, folder: Path) -> None:
    """The loop that people write."""
    dist.init_process_group("gloo")
    sampler: Any = DistributedSampler(data)
    loader = DataLoader(data, batch_size=batch_size, sampler=sampler)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.task = task

        def forward(self, batch: Any) -> Any:
            return self.task.loss(batch)

    ddp = DistributedDataParallel(Loss(), gradient_as_bucket_view=True)
    optimizer = task.optimizer()
    for batch in loader:
        optimizer.zero_grad()
        ddp(batch).backward()
        optimizer.step()
    dist.destroy_process_group()


def by_trainer(bare: bool) -> Callable[[Task, Any, int, Path], None]:
    def run(task: Task, data: Any, batch_size: int, folder: Path) -> None:
        loader = DataLoader(data, batch_size=batch_size, shuffle=True)
        by_leyden(bare, enable_progress_bar=False, enable_model_summary=False, strategy="ddp")(task, loader, folder)()

    return run


CONTESTANTS = {"by hand": by_hand, "leyden": by_trainer(False), "leyden, barebones": by_trainer(True)}


def rank_of(send: Connection, rank: int, ranks: int, port: int, name: str, workload: Workload, steps: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), GROUP_RANK="0",
        MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="benchmark",
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        task, clock = workload.task(), Clock(steps)
        task.tick = clock
        # two steps more than are timed
        data = workload.data((WARM_UP + steps + 2) * ranks)
        CONTESTANTS[name](task, data, workload.batch_size, Path(folder))
    send.send(workload.batch_size * steps / clock.took_s)  # samples per second of this rank
    send.close()
    os._exit(0)


def rate(name: str, ranks: int, workload: Workload, steps: int) -> float:
    """Samples per second of all processes together."""
    fork = multiprocessing.get_context("fork")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipes = [fork.Pipe(duplex=False) for _ in range(ranks)]
    started = [
        fork.Process(target=rank_of, args=(send, rank, ranks, store.port, name, workload, steps))
        for rank, (_, send) in enumerate(pipes)
    ]
    for process in started:
        process.start()
    for _, send in pipes:
        send.close()
    rates = [receive.recv() for receive, _ in pipes]
    for process in started:
        process.join()
    return sum(rates)


def overhead(workloads: dict[str, Workload], ranks: int, repeats: int, steps: int) -> dict[str, dict[str, float]]:
    """Rates relative to the hand-written loop: the median over turns of the ratio within a turn."""
    found: dict[str, dict[str, float]] = {}
    for title, workload in workloads.items():
        turns = [{name: rate(name, ranks, workload, steps) for name in CONTESTANTS} for _ in range(repeats)]
        found[title] = {name: statistics.median(turn[name] / turn["by hand"] for turn in turns) for name in CONTESTANTS}
        cells = "  ".join(f"{name} {value:.2f}" for name, value in found[title].items())
        by_hand_rate = statistics.median(turn["by hand"] for turn in turns)
        print(f"{title:8} {ranks} processes   {cells}   (by hand {by_hand_rate:,.0f} samples/s)", flush=True)
    return found


def scaling(workload: Workload, numbers: list[int], repeats: int, steps: int) -> dict[str, dict[int, float]]:
    """Samples per second with more processes, relative to one of the same contestant."""
    found: dict[str, dict[int, float]] = {name: {} for name in ("by hand", "leyden")}
    turns = [{(name, n): rate(name, n, workload, steps) for name in found for n in numbers} for _ in range(repeats)]
    for name in found:
        for n in numbers:
            found[name][n] = statistics.median(turn[name, n] / turn[name, 1] for turn in turns)
        print(f"{name:8} " + "  ".join(f"{n} x {value:.2f}" for n, value in found[name].items()), flush=True)
    return found


def plot(found: dict[str, dict[int, float]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for (name, rates), color in zip(found.items(), ("#777777", "#2a6f97"), strict=True):
        axes.plot(list(rates), list(rates.values()), marker="o", label=name, color=color)
    cores = os.cpu_count() or 1
    numbers = sorted(next(iter(found.values())))
    axes.plot(numbers, [min(n, cores) for n in numbers], "--", color="#bbbbbb", label=f"ideal on {cores} cores")
    axes.set(
        xlabel="processes", ylabel="samples per second, relative to one process", title=title, xticks=numbers, ylim=0
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workloads", nargs="+", default=["tiny", "mlp", "gpt"], choices=list(WORKLOADS))
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 2, 4], help="of processes, for the scaling")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    print(
        f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, torch {torch.__version__}, gloo, one thread each"
    )
    overhead({name: WORKLOADS[name] for name in given.workloads}, 2, given.repeats, given.steps)
    found = scaling(WORKLOADS["gpt"], given.numbers, given.repeats, max(20, given.steps // 4))
    if given.plot is not None:
        plot(found, "GPT, 2 layers of width 128, DDP over gloo", given.plot)


if __name__ == "__main__":
    main()
