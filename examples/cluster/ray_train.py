"""Train with Ray Train: Ray starts the ranks as workers of its cluster, and leyden joins them.

    pip install "ray[train]"
    python ray_train.py                              two workers on the CPUs of this machine
    python ray_train.py --workers 8 --gpus --out /shared/waves       eight workers with a GPU each, anywhere in the cluster

Ray Train sets RANK, WORLD_SIZE and so on, and makes torch's process group before it calls the function below.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray  # type: ignore[import-not-found]
from ray.train import FailureConfig, RunConfig, ScalingConfig  # type: ignore[import-not-found]
from ray.train.torch import TorchTrainer  # type: ignore[import-not-found]

FOLDER = Path(__file__).resolve().parent


def train_loop(config: dict[str, Any]) -> None:
    """What each worker runs. Workers are other processes, maybe on other machines: import what they need in here."""
    from train import main

    accuracy = main(config["arguments"])
    ray.train.report({"val_acc": accuracy})


def run(arguments: Sequence[str] | None = None) -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description="Train a small network on waves with Ray Train.")
    parser.add_argument("--workers", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--gpus", action="store_true", help="a GPU for each; without: on CPUs")
    parser.add_argument("--epochs", type=int, default=5, help="in all (default: 5)")
    parser.add_argument("--out", default=str(Path.cwd() / "runs/waves"), help="folder that all machines share")
    args = parser.parse_args(arguments)

    ray.init(runtime_env={"working_dir": str(FOLDER)})  # every worker gets train.py
    # devices stays "auto": how many workers a machine gets is Ray's decision.
    train_arguments = ["--accelerator", "cuda" if args.gpus else "cpu", "--epochs", str(args.epochs), "--out", args.out]
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"arguments": train_arguments},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpus),
        # a worker that was lost: all start again, and go on from the newest checkpoint
        run_config=RunConfig(name="ray", storage_path=args.out, failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    run()
