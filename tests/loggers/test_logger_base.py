from __future__ import annotations

import argparse
import enum
import math
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leyden.errors import MetricError
from leyden.loggers import CSVLogger, Logger, TensorBoardLogger
from leyden.loggers.logger import VersionFolder, flat_hyperparams, plain_hyperparams, scalar, to_yaml

FILE_LOGGERS = [CSVLogger, TensorBoardLogger]


def take_version(root: str, barrier: Any, results: Any) -> None:
    folder = VersionFolder(root, "runs", None)
    barrier.wait()
    results.put(folder.version)


def test_processes_that_race_get_different_versions(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=take_version, args=(str(tmp_path), barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    versions = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert versions == [0, 1, 2, 3]


def test_next_version_follows_the_highest_and_ignores_other_names(tmp_path: Path) -> None:
    for name in ("version_0", "version_7", "version_x", "version_12b", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert VersionFolder(tmp_path, "runs", None).version == 8


@pytest.mark.parametrize("kind", FILE_LOGGERS)
@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("lightning_logs", None, "lightning_logs/version_0"),
        ("runs", 5, "runs/version_5"),
        ("runs", "first try", "runs/first try"),
        ("", 2, "version_2"),
        (None, None, "version_0"),
    ],
)
def test_log_dir(kind: Any, tmp_path: Path, name: str | None, version: int | str | None, expected: str) -> None:
    logger = kind(tmp_path, name=name, version=version)
    assert Path(logger.log_dir) == tmp_path / expected
    assert logger.save_dir == str(tmp_path)
    assert Path(logger.root_dir) == (tmp_path / expected).parent


@pytest.mark.parametrize("kind", FILE_LOGGERS)
def test_a_logger_that_never_writes_makes_nothing(kind: Any, tmp_path: Path) -> None:
    logger = kind(tmp_path)
    logger.log_hyperparams({})
    logger.log_graph(torch.nn.Linear(1, 1))
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", FILE_LOGGERS)
def test_a_copy_on_another_rank_takes_the_version_and_writes_nothing(kind: Any, tmp_path: Path) -> None:
    first, copy = kind(tmp_path), kind(tmp_path)
    first.log_metrics({"loss": 1.0}, step=1)
    first.finalize("success")
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    copy.adopt_version(first.version)
    copy.log_metrics({"loss": 2.0}, step=2)
    copy.log_hyperparams({"lr": 0.1}, {"loss": 1.0})
    copy.log_graph(torch.nn.Linear(1, 1))
    copy.save()
    copy.finalize("success")
    assert copy.log_dir == first.log_dir
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before


def test_the_base_needs_only_four_things() -> None:
    class Memory(Logger):
        name = "memory"
        version = 1

        def __init__(self) -> None:
            self.rows: list[tuple[int | None, dict[str, float]]] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.rows.append((step, dict(metrics)))

        def log_hyperparams(self, params: Any, metrics: Any = None) -> None:
            pass

    logger = Memory()
    logger.log_metrics({"a": 1.0}, step=3)
    logger.finalize("failed")
    assert logger.rows == [(3, {"a": 1.0})]
    assert (logger.save_dir, logger.log_dir, logger.experiment) == (None, None, None)
    with pytest.raises(TypeError):
        Logger()  # type: ignore[abstract]


@pytest.mark.parametrize(
    "value", [2, 2.0, True + 1, torch.tensor(2.0), torch.tensor([2]), np.float32(2), np.array([2])]
)
def test_scalar_takes_one_number_in_any_wrapping(value: Any) -> None:
    number = scalar("a", value)
    assert number == 2
    assert type(number) in (int, float)


@pytest.mark.parametrize("value", ["2", None, torch.zeros(2), np.zeros(0), {"a": 1}, 1j])
def test_scalar_refuses_the_rest_by_name(value: Any) -> None:
    with pytest.raises(MetricError, match="'train/loss'"):
        scalar("train/loss", value)


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Size:
    width: int
    height: tuple[int, ...]


def test_hyperparameters_become_plain_data() -> None:
    given = {
        "lr": 0.1,
        "path": Path("a/b"),
        "colour": Colour.RED,
        "size": Size(3, (1, 2)),
        "activation": torch.nn.ReLU,
        "dtype": torch.float32,
        "weights": torch.tensor([1.0, 2.0]),
        "big": torch.zeros(100, 100),
        "nested": {1: {"a": None}},
        "namespace": argparse.Namespace(b=True),
        "set": {2, 1},
    }
    plain = plain_hyperparams(given)
    assert plain == {
        "lr": 0.1,
        "path": "a/b",
        "colour": "red",
        "size": {"width": 3, "height": [1, 2]},
        "activation": "torch.nn.modules.activation.ReLU",
        "dtype": "torch.float32",
        "weights": [1.0, 2.0],
        "big": "tensor(100, 100)",
        "nested": {"1": {"a": None}},
        "namespace": {"b": True},
        "set": [1, 2],
    }
    flat = flat_hyperparams(plain)
    assert flat["nested/1/a"] == "None"
    assert flat["size/height"] == "[1, 2]"
    assert flat["namespace/b"] is True
    assert plain_hyperparams(argparse.Namespace(lr=1)) == {"lr": 1}


def test_yaml() -> None:
    plain = {
        "lr": 1e-05,
        "big": 1e20,
        "exact": 0.1,
        "nan": math.nan,
        "minus": -math.inf,
        "no": True,
        "text": 'a: "b"\n# é\u2028',
        "null": None,
        "net": {"layers": [1, 2.5, {"a b": []}], "empty": {}},
    }
    assert to_yaml(plain).splitlines() == [
        "lr: 1.0e-05",
        "big: 1.0e+20",
        "exact: 0.1",
        "nan: .nan",
        "minus: -.inf",
        '"no": true',
        r'text: "a: \"b\"\n# é\u2028"',
        '"null": null',
        "net:",
        '  layers: [1, 2.5, {"a b": []}]',
        "  empty: {}",
    ]
    assert to_yaml({}) == "{}\n"
