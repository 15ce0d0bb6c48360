from __future__ import annotations

import builtins
import csv
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leyden.errors import ConfigurationError, MetricError
from leyden.loggers import CSVLogger


def read(path: Path | str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def metrics_file(tmp_path: Path) -> Path:
    return tmp_path / "lightning_logs" / "version_0" / "metrics.csv"


def test_one_row_for_each_call(tmp_path: Path, metrics_file: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.1, "epoch": 0.0}, step=1)
    logger.log_metrics({"loss": torch.tensor(0.25), "epoch": 0.0}, step=2)  # type: ignore[dict-item]
    logger.log_metrics({"val": math.inf, "epoch": 0.0}, step=2)
    logger.save()
    assert metrics_file.read_text() == "step,loss,epoch,val\n1,0.1,0,\n2,0.25,0,\n2,,0,inf\n"


def test_floats_are_read_back_bit_equal(tmp_path: Path, metrics_file: Path) -> None:
    values = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    logger = CSVLogger(tmp_path)
    for step, value in enumerate(values):
        logger.log_metrics({"loss": value}, step=step)
    logger.finalize("success")
    assert [float(row["loss"]) for row in read(metrics_file)] == values


names = st.sampled_from(["a", "b", 'c,"d', "e f", "épée"])
row_lists = st.lists(st.tuples(st.dictionaries(names, st.floats(allow_nan=False), max_size=4), st.booleans()))


@settings(max_examples=60, deadline=None)
@given(rows=row_lists, flush_every=st.integers(1, 5))
def test_against_a_list_of_rows(rows: list[tuple[dict[str, float], bool]], flush_every: int) -> None:
    """Whatever the columns, saves and restarts: every row is there, in order, with its own values."""
    with tempfile.TemporaryDirectory() as root:
        logger = CSVLogger(root, version="v", flush_logs_every_n_steps=flush_every)
        for step, (metrics, restart) in enumerate(rows):
            logger.log_metrics(metrics, step=step)
            if restart:
                logger.save()
                logger = CSVLogger(root, version="v", flush_logs_every_n_steps=flush_every)
        logger.save()
        if not rows:
            return
        found = read(f"{root}/lightning_logs/v/metrics.csv")
    expected = [{"step": float(step), **metrics} for step, (metrics, _) in enumerate(rows)]
    assert [{name: float(cell) for name, cell in row.items() if cell} for row in found] == expected
    columns = {name for row in expected for name in row}
    assert all(set(row) == columns for row in found)


@pytest.mark.parametrize("torn", ["7,0.1", "7,0.12,0.5", ""])
def test_continues_a_file_and_drops_a_torn_last_line(tmp_path: Path, metrics_file: Path, torn: str) -> None:
    first = CSVLogger(tmp_path)
    first.log_metrics({"loss": 1.0, "acc": 0.5}, step=6)
    first.finalize("interrupted")
    with open(metrics_file, "a") as file:
        file.write(torn)
    second = CSVLogger(tmp_path, version=first.version)
    second.log_metrics({"acc": 0.75, "f1": 0.1}, step=7)
    second.save()
    assert read(metrics_file) == [
        {"step": "6", "loss": "1.0", "acc": "0.5", "f1": ""},
        {"step": "7", "loss": "", "acc": "0.75", "f1": "0.1"},
    ]


def test_a_header_torn_off_is_written_again(tmp_path: Path, metrics_file: Path) -> None:
    metrics_file.parent.mkdir(parents=True)
    metrics_file.write_text("step,lo")
    logger = CSVLogger(tmp_path, version=0)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    assert metrics_file.read_text() == "step,loss\n1,1.0\n"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    modes: list[str] = []
    real = builtins.open

    def counted(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith(("metrics.csv", ".tmp")):
            modes.append(mode)
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", counted)
    return modes


def test_many_rows_cost_few_appends_and_no_rewrite(tmp_path: Path, opened: list[str]) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=100)
    logger.log_metrics({"loss": 0.0}, step=0)
    logger.save()
    opened.clear()
    for step in range(1, 1001):
        logger.log_metrics({"loss": 0.5}, step=step)
    assert opened == ["a"] * 10


def test_rows_far_apart_are_flushed_by_steps(tmp_path: Path, metrics_file: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=100)
    logger.log_metrics({"loss": 1.0}, step=50)
    assert not metrics_file.exists()
    logger.log_metrics({"loss": 1.0}, step=150)
    assert len(read(metrics_file)) == 2


def test_a_failed_rewrite_leaves_the_old_file_and_the_rows(
    tmp_path: Path, metrics_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    logger.log_metrics({"acc": 1.0}, step=2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            logger.save()
        assert metrics_file.read_text() == "step,loss\n1,1.0\n"
    logger.save()
    assert [row["step"] for row in read(metrics_file)] == ["1", "2"]


def test_steps_are_counted_where_none_is_given(tmp_path: Path, metrics_file: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0})
    logger.log_metrics({"a": 2.0})
    logger.log_metrics({"a": 3.0, "step": 9.0})
    logger.save()
    assert [row["step"] for row in read(metrics_file)] == ["0", "1", "9"]


def test_hyperparameters_are_merged_and_written_at_once(tmp_path: Path, metrics_file: Path) -> None:
    logger = CSVLogger(tmp_path, prefix="p")
    logger.log_hyperparams({"lr": 1e-5})
    logger.log_hyperparams({"depth": 3}, {"acc": 0.5})
    logger.save()
    assert (metrics_file.parent / "hparams.yaml").read_text() == "lr: 1.0e-05\ndepth: 3\n"
    assert read(metrics_file) == [{"step": "0", "p-acc": "0.5"}]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="flush_logs_every_n_steps=0"):
        CSVLogger(tmp_path, flush_logs_every_n_steps=0)
    with pytest.raises(MetricError, match="'loss'"):
        CSVLogger(tmp_path).log_metrics({"loss": "high"})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []
