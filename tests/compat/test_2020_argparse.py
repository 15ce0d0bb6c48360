"""A Trainer's arguments on the command line, as of 0.7."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import pytest

import leyden as pl

pytestmark = pytest.mark.filterwarnings(r"ignore:\[LEY-former-name\]")


def parsed(*written: str) -> Any:
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--hidden", type=int, default=3)
    parser.add_argument("--gpus", type=int, default=0)
    return pl.Trainer.add_argparse_args(parser).parse_args(written)


def test_arguments_are_literals_or_texts() -> None:
    args = parsed(
        "--max_epochs",
        "4",
        "--limit_train_batches",
        "0.5",
        "--precision",
        "bf16-mixed",
        "--fast_dev_run",
        "--logger",
        "False",
    )
    assert (args.hidden, args.max_epochs, args.limit_train_batches, args.precision) == (3, 4, 0.5, "bf16-mixed")
    assert args.fast_dev_run is True
    assert args.logger is False
    assert args.accelerator == "auto"


def test_a_trainer_takes_what_it_knows() -> None:
    args = parsed(
        "--max_epochs", "4", "--precision", "bf16-mixed", "--logger", "false", "--enable_progress_bar", "false"
    )
    trainer = pl.Trainer.from_argparse_args(args, max_steps=7)
    assert (trainer.max_epochs, trainer.max_steps, trainer.precision, trainer.loggers) == (4, 7, "bf16-mixed", [])
    assert trainer.device.type == "cpu"  # gpus=0, a former name, was among them
