"""What the loggers' tests share."""

from __future__ import annotations

import warnings

import pytest


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number TensorBoard's files from 0: those of one second are read in the order of their names, where 10 is before 9."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from tensorboard.summary.writer import event_file_writer
        except ImportError:
            return
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
