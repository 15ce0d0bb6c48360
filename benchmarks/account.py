"""What the account of a run's time costs: the loop with and without the lines that count.

    python benchmarks/account.py [--steps 500] [--repeats 61]

Two measurements. The lines themselves: those of `leyden.loop.train` that a step executes, in a loop of their own, less the empty
loop. And whole runs: one process, rounds in which a tiny model is trained with the loop as it is and with a copy of it without
these lines, by turns; shown is the median over the rounds of the ratio of their times, and the quartiles. Times are the CPU time
of the thread, which other work on the machine disturbs less than wall time. The second shows more than the first: a clock that
is read between two steps of a network is no longer in the caches.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden
from leyden import loop

torch.set_num_threads(1)


def counts(node: ast.stmt) -> bool:
    """Whether a statement is ``account.x = …`` or ``account.x += …``."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return isinstance(target, ast.Attribute) and ast.unparse(target.value) == "account"


class WithoutAccount(ast.NodeTransformer):
    """Takes the lines that count out of a function."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("body", "orelse"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, [each for each in statements if not counts(each)])
        return super().generic_visit(node)


def lines_of_a_step() -> list[ast.stmt]:
    """The lines that count in the loop over batches, of the branch for automatic optimization in eager."""
    batches = next(node for node in ast.walk(ast.parse(inspect.getsource(loop.train))) if isinstance(node, ast.For))
    nodes = [node for each in batches.body for node in ast.walk(each) if isinstance(node, ast.stmt)]
    return [node for node in nodes if counts(node) and "training_step_s" not in ast.unparse(node)]


def without_account() -> Callable[[Any], None]:
    """`leyden.loop.train` without the lines that count."""
    tree = WithoutAccount().visit(ast.parse(inspect.getsource(loop.train)))
    names = dict(vars(loop))
    exec(compile(ast.fix_missing_locations(tree), "<without account>", "exec"), names)
    train: Callable[[Any], None] = names["train"]
    return train


def seconds_of_lines(lines: list[ast.stmt], times: int = 1_000_000) -> float:
    """Seconds per execution of all lines, less the loop around them; the best of seven."""
    source = "def many(account, clock, times):\n    for _ in range(times):\n        {}\n"
    results = []
    for _ in range(7):
        took = []
        for body in ("; ".join(map(ast.unparse, lines)), "pass"):
            names: dict[str, Any] = {}
            exec(source.format(body), names)
            account = leyden.account.TimeAccount()
            start = time.thread_time()
            names["many"](account, account.clock, times)
            took.append(time.thread_time() - start)
        results.append((took[0] - took[1]) / times)
    return min(results)


class Tiny(leyden.LightningModule):
    """A step of a few hundred microseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def seconds_of_run(train: Callable[[Any], None], steps: int, folder: str) -> float:
    """Seconds of `loop.train` per step."""
    took = 0.0

    def timed(run: Any) -> None:
        nonlocal took
        start = time.thread_time()
        train(run)
        took = time.thread_time() - start

    settings: dict[str, Any] = {f"enable_{name}": False for name in ("progress_bar", "model_summary", "checkpointing")}
    trainer = leyden.Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=folder, **settings)
    data = TensorDataset(torch.randn(8 * steps, 8), torch.randint(0, 2, (8 * steps,)))
    own, loop.train = loop.train, timed
    try:
        trainer.fit(Tiny(), DataLoader(data, batch_size=8))
    finally:
        loop.train = own
    return took / steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=61)
    options = parser.parse_args()
    ways = (loop.train, without_account())
    times: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(-1, options.repeats):
            order = (0, 1) if repeat % 2 else (1, 0)
            took = {way: seconds_of_run(ways[way], options.steps, folder) for way in order}
            times += [[took[0], took[1]]] if repeat >= 0 else []  # the first round warms up
    low, middle, high = statistics.quantiles([one / other for one, other in times], n=4)
    step_s, lines = statistics.median(without for _, without in times), lines_of_a_step()
    lines_s = seconds_of_lines(lines)
    share = f"{100 * lines_s / step_s:.2f} % of a step of {step_s * 1e6:.0f} us"
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPU cores, one thread")
    print(f"{len(lines)} lines of the loop: {lines_s * 1e9:.0f} ns, {share}")
    print(
        f"runs with / without them: {middle:.4f} ({low:.3f} to {high:.3f}, {options.repeats} rounds of {options.steps} steps)"
    )


if __name__ == "__main__":
    main()
