"""Several processes log as one: one version, one writer, no folder left empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leyden.loggers import CSVLogger, TensorBoardLogger
from leyden.loggers.logger import Logger


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("version", [0, None])
def test_a_copy_leaves_the_number_that_it_took(kind: Any, version: int | None, tmp_path: Path) -> None:
    first, copy = (kind(str(tmp_path), name="runs") for _ in range(2))
    assert isinstance(first, Logger)
    assert (first.version, copy.version) == (0, 1)
    copy.adopt_version(version)
    copy.log_metrics({"loss": 1.0}, 1)
    copy.save()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]
    if version is not None:
        assert copy.log_dir == first.log_dir


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_folder_with_something_in_it_stays(kind: Any, tmp_path: Path) -> None:
    logger = kind(str(tmp_path), name="runs")
    Path(logger.log_dir).mkdir(exist_ok=True)
    Path(logger.log_dir, "mine.txt").touch()
    logger.adopt_version(None)
    assert Path(logger.log_dir, "mine.txt").exists()
