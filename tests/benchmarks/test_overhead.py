"""benchmarks/overhead.py and gpu.py run, and everyone in them trains the same model. Nothing here looks at how fast it was."""

from __future__ import annotations

import importlib
import json
import logging
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = tuple(path.stem for path in FOLDER.glob("*.py"))
SET_BY_SCRIPTS = (
    "COLUMNS", "TERM", "KERAS_BACKEND",
    "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_AUTOGRAD_CACHE",
)  # fmt: skip
Import = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Imports a script of the folder as `python benchmarks/….py` would."""
    present = {name: sys.modules.pop(name) for name in SCRIPTS if name in sys.modules}
    monkeypatch.syspath_prepend(FOLDER)
    for name in SET_BY_SCRIPTS:  # so that it is put back, whatever a script sets
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)
    for name in SCRIPTS:
        sys.modules.pop(name, None)
    sys.modules.update(present)


def tables(printed: str) -> list[list[list[str]]]:
    """The Markdown tables in a text: rows of cells, the head first."""
    found: list[list[list[str]]] = []
    inside = False
    for line in printed.splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        inside = line.startswith("|")
    return found


@pytest.mark.parametrize("kind", ["tiny", "mlp", "cnn", "gpt", "lstm"])
def test_everyone_trains_the_same_model(script: Import, kind: str, tmp_path: Path) -> None:
    workload = script("workloads").WORKLOADS[kind]
    measure, loss_after = script("measure"), script("workloads").loss_after
    contestants = script("contestants")
    bare = contestants.by_leyden(bare=True, fused_optimizer=False)
    everyone = [one for one in contestants.own_contestants() if not one.compiled]
    everyone.append(contestants.Contestant("leyden, bare, not fused", bare, "leyden", exact=True))
    assert sum(one.exact for one in everyone) == 3
    steps, losses, weights = 6, {}, {}
    for number, contestant in enumerate(everyone):
        folder = tmp_path / str(number)
        folder.mkdir()
        task = measure.train_once(contestant, workload, steps, folder)
        losses[contestant.name] = loss_after(task, workload.data(steps))
        weights[contestant.name] = torch.cat([value.detach().flatten() for value in task.parameters()])
    untrained = loss_after(workload.task(), workload.data(steps))
    truth = contestants.BY_HAND
    for contestant in everyone:
        name = contestant.name
        if contestant.exact:
            assert losses[name] == losses[truth], name
            assert torch.equal(weights[name], weights[truth]), name
        # far closer to what was trained by hand than that is to where it began
        assert abs(losses[name] - losses[truth]) < 0.02 * abs(untrained - losses[truth]), name


@pytest.mark.filterwarnings("default")  # theirs are no faults of ours
def test_peers_train_nearly_the_same_model(script: Import, tmp_path: Path) -> None:
    everyone = script("peers").peers()
    if not everyone:
        pytest.skip("no other trainer is installed; make bench installs them")
    workload = script("workloads").WORKLOADS["tiny"]
    measure, loss_after = script("measure"), script("workloads").loss_after
    by_hand = script("contestants").own_contestants()[0]
    truth = loss_after(measure.train_once(by_hand, workload, 200, tmp_path), workload.data(200))
    untrained = loss_after(workload.task(), workload.data(200))
    for number, contestant in enumerate(everyone):
        folder = tmp_path / str(number)
        folder.mkdir()
        loss = loss_after(measure.train_once(contestant, workload, 200, folder), workload.data(200))
        assert abs(loss - truth) < 0.2 * abs(untrained - truth), contestant.name


def test_a_quick_run_prints_tables(script: Import, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--quick", "--repeats", "2", "--shorten", "100", "--workloads", "tiny", "cnn", "--only", "default"]

    code = script("overhead").main([*arguments, "--json", str(path)])

    assert code == 0
    found = tables(capsys.readouterr().out)
    assert len(found) == 4, "two workloads, all ratios, and where the default settings stand"
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}
        assert set(table[1][1:]) == {"---:"}
    for table in found[:2]:
        assert [row[0] for row in table[2:]] == ["PyTorch, by hand", "leyden, default"]
        assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in table[2:])
        assert table[2][2] == "1.00", "the hand-written loop against itself"
    assert found[2][0][1:] == ["tiny", "cnn"]
    data = json.loads(path.read_text())
    assert list(data["workloads"]) == ["tiny", "cnn"]
    for results in data["workloads"].values():
        for result in results.values():
            assert len(result["steps_per_s"]) == 2
            assert result["failed"] is None
            assert all(math.isfinite(rate) and rate > 0 for rate in result["steps_per_s"])


def test_calls_and_frames_are_counted(script: Import, tmp_path: Path) -> None:
    overhead, contestants = script("overhead"), script("contestants")
    chosen = [one for one in contestants.own_contestants() if not one.compiled]
    counts = overhead.count(chosen, tmp_path)
    assert counts[contestants.BY_HAND][0] > 50
    assert counts[contestants.BY_HAND][1] == 0
    assert counts[contestants.DEFAULT][1] == 3
    [table] = tables(script("report").count_table(counts))
    assert table[2][2] == "+0"


def test_a_picture_is_drawn(script: Import, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report, Result = script("report"), script("measure").Result
    results = {report.BY_HAND: Result([2.0, 4.0]), report.DEFAULT: Result([3.0, 4.0]), "other": Result(failed="lost")}
    groups = {report.BY_HAND: "by hand", report.DEFAULT: "leyden", "other": "peer"}
    data = report.as_data({"tiny": results}, {}, groups, "")
    assert data["workloads"]["tiny"][report.DEFAULT]["ratios"] == [1.0, 1.5]
    report.plot(data, {"tiny": "MLP, batch 8"}, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


# The turns


class Lanes:
    """Opens lanes to threads of this process, whose runs note their steps and nothing else."""

    def __init__(self, measure: ModuleType, steps: dict[str, int]) -> None:
        self.measure = measure
        self.steps = steps
        self.order: list[str] = []

    def __call__(self, contestant: Any, steps: int, folder: Path) -> Any:
        ours, theirs = multiprocessing.Pipe()

        def build(tick: Callable[[], None]) -> Callable[[], None]:
            made = self.steps.get(contestant.name, steps)
            if made < 0:
                raise ValueError("no such thing")

            def run() -> None:
                for _ in range(made):
                    tick()
                    self.order.append(contestant.name)

            return run

        threading.Thread(target=self.measure.serve, args=(theirs, build), daemon=True).start()
        return self.measure.Lane(ours)


def idle(script: Import, *names: str) -> list[Any]:
    return [script("contestants").Contestant(name, None, "peer") for name in names]


def test_a_lane_stops_where_it_is_told_to(script: Import, tmp_path: Path) -> None:
    lanes = Lanes(script("measure"), {})
    lane = lanes(*idle(script, "a"), 10, tmp_path)
    lane.wait_until_ready()
    made = []
    for steps in (3, 4, 1):
        assert lane.advance(steps) > 0
        made.append(len(lanes.order))
    lane.finish()
    assert made == [3, 7, 8]
    assert len(lanes.order) == 10


def test_contestants_take_turns_and_the_order_rotates(script: Import, tmp_path: Path) -> None:
    measure = script("measure")
    race = measure.Race(script("workloads").WORKLOADS["tiny"], idle(script, "a", "b", "c"), 2, tmp_path, shorten=100)
    lanes = Lanes(measure, {})
    results = race.run(lanes)
    begun = 3 * race.warm_up
    turns = [lanes.order[begun + race.turn * number] for number in range(9)]
    assert "".join(turns) == "abc" + "bca" + "cab"
    assert {name: len(result.steps_per_s) for name, result in results.items()} == {"a": 2, "b": 2, "c": 2}
    assert lanes.order.count("a") == race.warm_up + 3 * race.turn + 2


def test_who_fails_is_named_and_the_others_go_on(script: Import, tmp_path: Path) -> None:
    measure, report = script("measure"), script("report")
    everyone = idle(script, report.BY_HAND, "at once", "too short")
    race = measure.Race(script("workloads").WORKLOADS["tiny"], everyone, 2, tmp_path, shorten=100)
    results = race.run(Lanes(measure, {"at once": -1, "too short": 9}))
    assert results[report.BY_HAND].failed is None
    assert results["at once"].failed == "ValueError: no such thing"
    assert results["too short"].failed == "the run ended too early"
    [table] = tables(report.speed_table("title", results))
    assert [row[1] for row in table[3:]] == ["failed", "failed"]


def test_a_process_that_ends_is_noticed(script: Import, tmp_path: Path) -> None:
    measure = script("measure")
    [nobody] = idle(script, "nobody knows this name")
    with measure.processes("tiny") as open_lane, pytest.raises(measure.LaneError, match="its process ended"):
        open_lane(nobody, 10, tmp_path).wait_until_ready()


# On a GPU


def test_the_script_for_gpus_says_where_there_is_none(
    script: Import, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script("gpu").main([]) == 2
    assert "No CUDA device" in capsys.readouterr().err


def test_the_large_models_are_the_known_ones(script: Import) -> None:
    large = script("large")
    with torch.device("meta"):
        sizes = [sum(value.numel() for value in make().parameters()) for make in (large.resnet, large.gpt2_small)]
    assert sizes == [25_557_032, 124_439_808]


def test_the_script_for_gpus_runs_on_a_cpu(
    script: Import, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "WORKERS", {})
    path = tmp_path / "figures.json"
    chosen = ["--workloads", "tiny", "resnet50", "gpt2", "--only", "leyden, default"]
    assert gpu.main(["--device", "cpu", "--tiny", "--repeats", "1", *chosen, "--json", str(path)]) == 0
    found = tables(capsys.readouterr().out)
    assert [[row[0] for row in table[2:]] for table in found] == [["PyTorch, by hand", "leyden, default"]] * 3
    for results in json.loads(path.read_text())["workloads"].values():
        assert all(len(result["steps_per_s"]) == 1 and result["failed"] is None for result in results.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_script_for_gpus_on_one(script: Import, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert script("gpu").main(["--tiny", "--repeats", "1", "--json", str(path)]) == 0
    for results in json.loads(path.read_text())["workloads"].values():
        assert results["leyden, default"]["waits_per_step"] == 0.0
        assert results["leyden, default"]["peak_mb"][0] > 0
