"""ModelCheckpoint on a disk that is looked at after every operation, with writes that fail and processes that are killed."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from leyden.callbacks.model_checkpoint import ModelCheckpoint
from leyden.checkpoint.format import About
from leyden.errors import CheckpointError
from leyden.strategy import SingleDevice

FOLDER = os.path.abspath("run")


class Killed(BaseException):
    """The process is gone."""


@dataclass
class Disk:
    """Files by path: what is in them, or the path that a link leads to. ``watch`` sees it after every change."""

    files: dict[str, Any] = field(default_factory=dict)
    watch: Callable[[str, str], None] = lambda operation, path: None
    operations: int = 0
    kill_before: int = -1

    def read(self, path: str) -> Any:
        content = self.files.get(path)
        return self.files.get(content) if isinstance(content, str) else content

    def do(self, operation: str, path: str, content: Any) -> None:
        self.operations += 1
        if self.operations == self.kill_before:
            raise Killed
        if operation == "remove":
            self.watch(operation, path)
            self.files.pop(path, None)
        else:
            self.files[path] = content
            self.watch(operation, path)

    def exists(self, path: str) -> bool:
        return self.read(path) is not None

    def about(self, path: str) -> About:
        content = self.read(path)
        if content is None:
            raise CheckpointError(f"{path}: no such file.")
        return About(global_step=content["step"], run_id=content["run_id"])


DISK = Disk()


@pytest.fixture(scope="module", autouse=True)
def disk() -> Iterator[None]:
    place = "leyden.callbacks.model_checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{place}.exists", lambda path: DISK.exists(path))
        patch.setattr(f"{place}.remove", lambda path: DISK.do("remove", path, None))
        patch.setattr(f"{place}.copy_checkpoint", lambda source, path: DISK.do("copy", path, DISK.read(source)))
        patch.setattr(f"{place}.link_checkpoint", lambda source, path: DISK.do("link", path, source))
        patch.setattr("leyden.callbacks.checkpoint_name.read_about", lambda path: DISK.about(path))
        patch.setattr("leyden.callbacks.checkpoint_name.exists", lambda path: DISK.exists(path))
        yield


class Process:
    """One process that trains: step after step, with one write in flight at most. The metric is a function of the step."""

    def __init__(self, plan: Plan, run_id: str) -> None:
        self.plan, self.run_id = plan, run_id
        self.callbacks = plan.callbacks()
        self.checkpoint_callbacks = self.callbacks
        self.global_step = self.current_epoch = self.fast_dev_run = 0
        self.num_val_batches: list[int] = []
        self.loggers: list[Any] = []
        self.sanity_checking, self.is_global_zero = False, True
        self.default_root_dir = FOLDER
        self.actions: list[Callable[[], None]] = []
        self.in_flight: tuple[str, Any, Sequence[Callable[[], object]]] | None = None
        self.failure: Exception | None = None
        self.strategy = SingleDevice(torch.device("cpu"))

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(self.plan.values[self.global_step - 1], dtype=torch.float64)}

    def at_step_boundary(self, action: Callable[[], None]) -> None:
        self.actions.append(action)

    def shared_request(self, action: Callable[[], None]) -> Callable[[], None]:
        return lambda: self.at_step_boundary(action)

    def save_checkpoint(self, path: str, weights_only: bool, wait: bool, then: Sequence[Callable[[], object]]) -> None:
        states = {callback.state_key: copy.deepcopy(callback.state_dict()) for callback in self.callbacks}
        content = {"step": self.global_step, "run_id": self.run_id, "states": None if weights_only else states}
        self.write()
        self.check()
        self.in_flight = (path, content, then)
        if wait:
            self.write()
            self.check()

    def write(self) -> None:
        """What the writing thread does."""
        if self.in_flight is None:
            return
        path, content, then = self.in_flight
        self.in_flight = None
        self.plan.writes += 1
        if self.plan.writes in self.plan.failures:
            self.failure = CheckpointError("disk full")
            return
        DISK.do("write", path, {**content, "when": DISK.operations})
        for action in then:
            action()

    def check(self) -> None:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def event(self, name: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self, None, *arguments)
        actions, self.actions = self.actions, []
        self.check()
        for action in actions:
            action()
        if self.plan.hurries and self.global_step % self.plan.hurries == 0:
            self.write()

    def fit(self, resumed_from: Any) -> None:
        if resumed_from is not None:
            self.global_step, self.run_id = resumed_from["step"], resumed_from["run_id"]
            for callback in self.callbacks:
                callback.load_state_dict(copy.deepcopy(resumed_from["states"][callback.state_key]))
        try:
            self.event("setup", "fit")
            self.event("on_fit_start")
            self.event("on_train_start")
            while self.global_step < len(self.plan.values):
                self.global_step += 1
                self.event("on_train_batch_end", None, None, 0)
            self.event("on_train_end")
            self.event("on_fit_end")
            self.write()
            self.check()
        finally:
            self.in_flight = None  # only a kill leaves one, and takes it along
            for callback in self.callbacks:
                callback.teardown(self, None, "fit")  # type: ignore[arg-type]


@dataclass
class Plan:
    """What is trained and saved, and what goes wrong."""

    values: list[float]
    arguments: dict[str, Any]
    second: dict[str, Any] | None = None
    failures: frozenset[int] = frozenset()
    kills: Sequence[int] = ()
    back: int = 0  # how many newer checkpoints are passed over when it goes on
    hurries: int = 0  # the write is done after every so many steps; 0: only when the next one comes
    writes: int = 0

    def callbacks(self) -> list[ModelCheckpoint]:
        first = ModelCheckpoint(FOLDER, **self.arguments)
        return [first] if self.second is None else [first, ModelCheckpoint(FOLDER, **self.second)]

    def run(self, watch: Callable[[str, str], None] = lambda operation, path: None) -> tuple[dict[str, int], Any]:
        """Train to the end, however often that takes; return the files with their steps, and the callbacks' states."""
        global DISK
        DISK = Disk(watch=watch)
        kills = list(self.kills)
        for attempt in range(len(kills) + len(self.failures) + 1):
            DISK.kill_before = DISK.operations + kills.pop(0) if kills else -1
            whole = [content for content in DISK.files.values() if isinstance(content, dict) and content["states"]]
            whole.sort(key=lambda content: content["when"], reverse=True)
            assume(whole or not DISK.files)  # weights alone are no place to go on from
            process = Process(self, run_id=f"run {attempt}")
            try:
                process.fit(whole[min(self.back, len(whole) - 1)] if whole else None)
            except (Killed, CheckpointError):
                continue
            files = {os.path.relpath(path, FOLDER): DISK.read(path)["step"] for path in sorted(DISK.files)}
            return files, [callback.state_dict() for callback in process.callbacks]
        raise AssertionError("something else went wrong than what was planned")


def kept(scores: dict[int, float], k: int, mode: str) -> set[int]:
    """The model: the steps of the best k so far; NaN last, earlier before later."""
    sign = 1 if mode == "min" else -1
    order = sorted(scores, key=lambda s: (math.isnan(scores[s]), 0 if math.isnan(scores[s]) else sign * scores[s], s))
    return set(order if k == -1 else order[:k])


scores = st.one_of(st.integers(0, 3).map(float), st.sampled_from([math.nan, math.inf]))
policies = st.fixed_dictionaries(
    {
        "monitor": st.just("loss"),
        "filename": st.sampled_from(["a-{step}", "a-{loss}", "a"]),
        "mode": st.sampled_from(["min", "max"]),
        "save_top_k": st.sampled_from([-1, 0, 1, 2]),
        "save_last": st.sampled_from([None, True, "link"]),
        "every_n_train_steps": st.sampled_from([1, 2]),
        "save_weights_only": st.booleans(),
        "background": st.booleans(),
    }
)
seconds = st.none() | st.fixed_dictionaries(
    {
        "filename": st.sampled_from(["a-{step}", "b-{step}", "b-{loss}", "b"]),
        "save_top_k": st.sampled_from([-1, 1]),
        "every_n_train_steps": st.sampled_from([1, 3]),
    }
)
plans = st.builds(
    Plan,
    values=st.lists(scores, min_size=1, max_size=9),
    arguments=policies,
    second=seconds,
    failures=st.frozensets(st.integers(1, 20), max_size=2),
    kills=st.lists(st.integers(1, 12), max_size=3),
    back=st.integers(0, 2),
    hurries=st.integers(0, 3),
)


@settings(max_examples=600, deadline=None)
@given(plans)
def test_at_every_instant_the_best_and_the_last_are_on_the_disk(plan: Plan) -> None:
    policy = plan.arguments
    k, mode, n = policy["save_top_k"], policy["mode"], policy["every_n_train_steps"]
    plan.second = plan.second and {**plan.second, "filename": "b-{step}"}  # to tell the files apart
    plan.arguments["save_weights_only"], plan.back = False, 0  # every save is one to go on from, and is gone on from
    last = os.path.join(FOLDER, "last.ckpt")
    done = 0  # the trigger whose file was written last

    def best(until: int) -> set[int]:
        return kept({step: plan.values[step - 1] for step in range(n, until + 1, n)}, k, mode)

    def watch(operation: str, path: str) -> None:
        nonlocal done
        there = {DISK.read(file)["step"] for file in DISK.files if DISK.read(file) and "/b-" not in file}
        if operation == "write" and "/b-" not in path:
            assert done <= DISK.read(path)["step"] or done not in there, "an older state came after a newer one"
            done = DISK.read(path)["step"]
        if operation == "remove" and "/b-" not in path and DISK.exists(path) and path != last:
            assert DISK.read(path)["step"] not in best(done), "one of the best is deleted"
        # a trigger that writes nothing changes neither
        assert best(done - done % n) <= there, "one of the best is missing"
        if policy["save_last"] and last in DISK.files:
            assert DISK.read(last) is not None, "last leads nowhere"
            assert DISK.read(last)["step"] in (done, done - n, done - done % n), "last is not the last"

    plan.run(watch)


# A name that is wanted again while its file, older than the resume, still waits to be deleted.
AGAIN = Plan(
    values=[3.0, 1.0, 3.0],
    arguments={"monitor": "loss", "save_top_k": 0, "every_n_train_steps": 1},
    second={"filename": "b-{loss}", "every_n_train_steps": 1},
    kills=[2],
)


@settings(max_examples=600, deadline=None)
@given(plans)
@example(AGAIN)
def test_a_run_that_was_killed_ends_like_one_that_was_not(plan: Plan) -> None:
    plan.arguments["save_weights_only"], plan.back = False, 0
    undisturbed = Plan(plan.values, plan.arguments, plan.second, hurries=plan.hurries).run()
    assert json.dumps(plan.run()) == json.dumps(undisturbed)  # where NaN is NaN


@settings(max_examples=600, deadline=None)
@given(plans)
def test_a_run_that_goes_on_from_an_older_checkpoint_overwrites_what_it_had_written_since(plan: Plan) -> None:
    plan.arguments["filename"] = "a-{step}"
    plan.second = plan.second and {**plan.second, "filename": "b-{step}"}
    files, states = Plan(plan.values, plan.arguments, plan.second, hurries=plan.hurries).run()
    files_again, states_again = plan.run()
    # What was written after the older checkpoint and is not wanted again stays: nobody knows of it.
    left_behind = files_again.keys() - files.keys()
    assert {name: step for name, step in files_again.items() if name not in left_behind} == files
    assert plan.back or not left_behind
    assert json.dumps([each["history"] for each in states_again]) == json.dumps([each["history"] for each in states])


@settings(max_examples=200, deadline=None)
@given(plans)
def test_what_is_written_behind_does_not_depend_on_when(plan: Plan) -> None:
    behind, waiting = {**plan.arguments, "background": True}, {**plan.arguments, "background": False}
    expected = json.dumps(Plan(plan.values, waiting, plan.second).run())
    assert json.dumps(Plan(plan.values, behind, plan.second, hurries=plan.hurries).run()) == expected
