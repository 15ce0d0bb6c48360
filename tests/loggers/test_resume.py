"""Loggers of a run that goes on from a checkpoint in the same folder: what came after the checkpoint is written anew."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leyden.checkpoint.format import decode, encode
from leyden.loggers import CSVLogger, Logger, TensorBoardLogger
from leyden.loggers.dummy import DummyLogger
from leyden.loggers.logger import capture_loggers, resume_loggers

Row = tuple[dict[str, float], int]


def csv_logger(root: Path | str, flush_every: int = 100) -> CSVLogger:
    return CSVLogger(root, name="", version="v", flush_logs_every_n_steps=flush_every)


def log(logger: Logger, rows: list[Row]) -> None:
    for metrics, step in rows:
        logger.log_metrics(metrics, step)


def through_a_file(states: Any) -> Any:
    return decode(*encode({"loggers": states}))["loggers"]


# Steps go up and down, as when the step values of a validation have its batches as steps.
rows_of_a_run = st.lists(
    st.tuples(st.dictionaries(st.sampled_from(["a", "b", 'c,"d\ne', "lr"]), st.floats(), max_size=3), st.integers(0, 9)),
    max_size=12,
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    rows=rows_of_a_run, flush_every=st.integers(1, 4), at=st.integers(0, 12), killed=st.integers(0, 12), torn=st.integers(0, 12),
    second=st.integers(0, 12),
)  # fmt: skip
def test_the_file_is_that_of_an_undisturbed_run(
    rows: list[Row], flush_every: int, at: int, killed: int, torn: int, second: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        undisturbed = csv_logger(whole)
        log(undisturbed, rows)
        undisturbed.finalize("success")

        logger = csv_logger(broken, flush_every)
        log(logger, rows[:at])
        state = through_a_file(capture_loggers([logger]))
        log(logger, rows[at : at + killed])  # and then nothing more: a killed process does not finalize
        file = broken / "v" / "metrics.csv"
        if file.exists() and at + killed > at:
            with open(file, "a", encoding="utf-8") as stream:
                stream.write("7,0.12,0.5,11.5"[:torn])
        for _ in range(2):  # killed once more on the same way
            logger = csv_logger(broken, flush_every)
            resume_loggers([logger], state, global_step=9)
            log(logger, rows[at : at + second])
        logger = csv_logger(broken, flush_every)
        resume_loggers([logger], state, global_step=9)
        log(logger, rows[at:])
        logger.finalize("success")
        found = file.read_bytes() if file.exists() else None
        expected = whole / "v" / "metrics.csv"
        assert (found or None) == (expected.read_bytes() if expected.exists() else None)


def test_without_a_state_later_steps_are_dropped(tmp_path: Path) -> None:
    logger = csv_logger(tmp_path)
    log(logger, [({"a": 1.0}, 1), ({"a": 2.0}, 2), ({"b": 3.0}, 3)])
    logger.finalize("failed")
    logger = csv_logger(tmp_path)
    logger.resume_from(2, {})
    assert (tmp_path / "v" / "metrics.csv").read_text() == "step,a\n1,1.0\n2,2.0\n"
    log(logger, [({"a": 4.0}, 3)])
    logger.save()
    assert (tmp_path / "v" / "metrics.csv").read_text() == "step,a\n1,1.0\n2,2.0\n3,4.0\n"


def test_the_file_of_another_run_loses_nothing_of_earlier_steps(tmp_path: Path) -> None:
    first = csv_logger(tmp_path / "first")
    log(first, [({"a": 1.0}, 1)])
    state = capture_loggers([first])
    other = csv_logger(tmp_path / "other")
    log(other, [({"a": 5.0}, 1), ({"a": 6.0}, 2), ({"a": 7.0}, 9)])
    other.finalize("success")
    resume_loggers([csv_logger(tmp_path / "other")], state, global_step=2)
    assert (tmp_path / "other" / "v" / "metrics.csv").read_text() == "step,a\n1,5.0\n2,6.0\n"


def test_a_moved_folder_is_known_by_its_rows(tmp_path: Path) -> None:
    first = csv_logger(tmp_path / "first")
    log(first, [({"a": 1.0}, 5)])
    state = capture_loggers([first])
    log(first, [({"a": 2.0}, 1)])
    first.finalize("failed")
    shutil.move(tmp_path / "first", tmp_path / "moved")
    resume_loggers([csv_logger(tmp_path / "moved")], state, global_step=5)
    assert (tmp_path / "moved" / "v" / "metrics.csv").read_text() == "step,a\n5,1.0\n"


def test_a_file_that_was_continued_before_keeps_all_its_rows(tmp_path: Path) -> None:
    first = csv_logger(tmp_path)
    log(first, [({"a": 1.0}, 50)])
    first.finalize("success")
    second = csv_logger(tmp_path)
    state = capture_loggers([second])
    log(second, [({"a": 2.0}, 1)])
    second.finalize("failed")
    resume_loggers([csv_logger(tmp_path)], state, global_step=0)
    assert (tmp_path / "v" / "metrics.csv").read_text() == "step,a\n50,1.0\n"


def test_a_new_version_is_not_made_for_it(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    state = capture_loggers([logger])
    resume_loggers([logger], state, 3)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_counted_on(tmp_path: Path) -> None:
    logger = csv_logger(tmp_path)
    for _ in range(3):
        logger.log_metrics({"a": 1.0})
    state = capture_loggers([logger])
    logger = csv_logger(tmp_path)
    resume_loggers([logger], state, 3)
    logger.log_metrics({"a": 1.0})
    logger.save()
    assert (tmp_path / "v" / "metrics.csv").read_text().split() == ["step,a", "0,1.0", "1,1.0", "2,1.0", "3,1.0"]


def test_silent_copies_touch_nothing(tmp_path: Path) -> None:
    logger = csv_logger(tmp_path)
    log(logger, [({"a": 1.0}, 1)])
    logger.finalize("failed")
    for copy in (csv_logger(tmp_path), TensorBoardLogger(tmp_path, name="", version="v")):
        copy.adopt_version("v")
        resume_loggers([copy], capture_loggers([copy]), 0)
    assert (tmp_path / "v" / "metrics.csv").read_text() == "step,a\n1,1.0\n"


def test_each_logger_gets_the_state_of_its_class(tmp_path: Path) -> None:
    class Noting(DummyLogger):
        def __init__(self, number: int) -> None:
            self.number, self.got = number, {}  # type: ignore[var-annotated]

        def state_dict(self) -> dict[str, Any]:
            return {"number": self.number}

        def resume_from(self, global_step: int, state: Any) -> None:
            self.got = {"step": global_step, **state}

    states = through_a_file(capture_loggers([Noting(1), csv_logger(tmp_path), Noting(2)]))
    again = [Noting(0), Noting(0), Noting(0)]
    resume_loggers([DummyLogger(), *again], states, 4)
    assert [each.got for each in again] == [{"step": 4, "number": 1}, {"step": 4, "number": 2}, {"step": 4}]
    json.dumps(states)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder))
        events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def tensorboard_logger(root: Path, **options: Any) -> TensorBoardLogger:
    return TensorBoardLogger(root, name="", version="v", **options)


def test_tensorboard_hides_the_lost_future(tmp_path: Path) -> None:
    logger = tensorboard_logger(tmp_path)
    log(logger, [({"a": 1.0}, 1), ({"a": 2.0}, 2)])
    state = through_a_file(capture_loggers([logger]))
    log(logger, [({"a": 30.0}, 3), ({"a": 40.0}, 4)])
    logger.save()  # and no more: killed
    again = tensorboard_logger(tmp_path)
    resume_loggers([again], state, 2)
    log(again, [({"a": 3.0}, 3)])
    again.finalize("success")
    again.log_metrics({"a": 4.0})  # opens one more file, which hides nothing
    again.finalize("success")
    assert scalars(tmp_path / "v", "a") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    logger.finalize("failed")


def test_tensorboard_purges_from_the_users_step_if_given(tmp_path: Path) -> None:
    logger = tensorboard_logger(tmp_path)
    log(logger, [({"a": 1.0}, 1), ({"a": 2.0}, 2)])
    logger.finalize("failed")
    again = tensorboard_logger(tmp_path, purge_step=2)
    again.resume_from(2, {})
    log(again, [({"a": 3.0}, 3)])
    again.finalize("success")
    assert scalars(tmp_path / "v", "a") == [(1, 1.0), (3, 3.0)]


@pytest.mark.parametrize("make", [csv_logger, tensorboard_logger])
def test_a_capture_brings_everything_to_the_disk(tmp_path: Path, make: Any) -> None:
    logger = make(tmp_path)
    log(logger, [({"a": 1.0}, 1)])
    capture_loggers([logger])
    if isinstance(logger, CSVLogger):
        assert (tmp_path / "v" / "metrics.csv").read_text() == "step,a\n1,1.0\n"
    else:
        assert scalars(tmp_path / "v", "a") == [(1, 1.0)]
    logger.finalize("success")
