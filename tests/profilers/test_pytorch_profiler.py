"""Traces are valid, and hold the actions of the steps that the schedule records."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, schedule

from leyden.errors import ConfigurationError
from leyden.profilers import PyTorchProfiler
from leyden.profilers.pytorch import _SORTABLE
from profiled import TRAIN, VAL, Net, batches, make_trainer

torch.set_num_threads(1)


STEP = "[LightningModule]Net.training_step"


def names(trace: Path) -> Counter[str]:
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_the_trace_holds_the_recorded_batches(tmp_path: Path) -> None:
    profiler = PyTorchProfiler()
    trainer = make_trainer(tmp_path, profiler=profiler, max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(Net(), batches(6), batches(VAL))
    assert profiler.traces == [tmp_path / "fit-trace.0.pt.trace.json"]
    found = names(profiler.traces[0])
    # batch 0 is passed over, 1 warms up, 2 to 4 are recorded; of these, only 3 ends a window
    assert {name for name in found if name.startswith("ProfilerStep")} == {f"ProfilerStep#{n}" for n in (2, 3, 4)}
    assert (found[STEP], found["backward"], found["next_batch"], found["optimizer_step"]) == (3, 3, 3, 1)
    assert found["validation"] == 0
    summary = profiler.summary()
    assert STEP in summary
    assert summary.endswith(f"Trace: {profiler.traces[0]}")


def test_every_cycle_gives_a_trace(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path / "traces", "net", schedule=schedule(wait=0, warmup=1, active=1, repeat=2))
    make_trainer(tmp_path, profiler=profiler, max_epochs=1, limit_val_batches=0).fit(Net(), batches(TRAIN))
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == [
        "fit-net.0.pt.trace.json",
        "fit-net.1.pt.trace.json",
        "fit-net.txt",
    ]
    assert [names(trace)[STEP] for trace in profiler.traces] == [1, 1]
    assert (tmp_path / "traces" / "fit-net.txt").read_text(encoding="utf-8").count("Trace: ") == 2


def test_a_cycle_that_the_run_cuts_short_is_kept(tmp_path: Path) -> None:
    profiler = PyTorchProfiler()
    make_trainer(tmp_path, profiler=profiler, max_epochs=1, limit_val_batches=0).fit(Net(), batches(3))
    assert [names(trace)[STEP] for trace in profiler.traces] == [1]


def test_a_run_that_is_too_short_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = PyTorchProfiler(schedule=schedule(wait=5, warmup=1, active=1))
    make_trainer(tmp_path, profiler=profiler, max_epochs=1, limit_val_batches=0).fit(Net(), batches(2))
    assert profiler.traces == []
    assert capsys.readouterr().out == "PyTorchProfiler: 2 batches ran, of which the schedule recorded none.\n"


def test_evaluation_batches_are_the_steps_of_test(tmp_path: Path) -> None:
    profiler = PyTorchProfiler()
    make_trainer(tmp_path, profiler=profiler).test(Net(), batches(6))
    assert profiler.traces == [tmp_path / "test-trace.0.pt.trace.json"]
    assert names(profiler.traces[0])["[LightningModule]Net.test_step"] == 3


def test_a_trial_run_writes_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    profiler = PyTorchProfiler()
    make_trainer(tmp_path, profiler=profiler, fast_dev_run=5).fit(Net(), batches(5), batches(1))
    assert list(tmp_path.iterdir()) == []
    assert STEP in capsys.readouterr().out


def test_after_an_error_another_run_can_be_profiled(tmp_path: Path) -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.trainer.profiler.start("left open")
            if batch_idx == 3:
                raise KeyError("broken")
            return super().training_step(batch, batch_idx)

    profiler = PyTorchProfiler()
    trainer = make_trainer(tmp_path, profiler=profiler, max_epochs=1, limit_val_batches=0)
    with pytest.raises(KeyError):
        trainer.fit(Broken(), batches(5))
    assert not torch.autograd._profiler_enabled()
    trainer.fit(Net(), batches(5))
    assert [names(trace)[STEP] for trace in profiler.traces] == [3]


def test_a_trace_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    profiler = PyTorchProfiler(tmp_path / "file" / "traces")
    trainer = make_trainer(tmp_path, profiler=profiler, max_epochs=1, limit_val_batches=0)
    with pytest.raises(NotADirectoryError):
        trainer.fit(Net(), batches(8))
    assert trainer.global_step == 5  # the batch after which the cycle was complete
    assert not torch.autograd._profiler_enabled()


def test_torchs_options_are_passed_on(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(record_shapes=True, activities=[ProfilerActivity.CPU], row_limit=3)
    make_trainer(tmp_path, profiler=profiler, max_epochs=1, limit_val_batches=0).fit(Net(), batches(TRAIN))
    events = json.loads(profiler.traces[0].read_text(encoding="utf-8"))["traceEvents"]
    linear = next(event for event in events if event["name"] == "aten::linear")
    assert linear["args"]["Input Dims"][0] == [1, 2]


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'record_shapes'"):
        PyTorchProfiler(record_shape=True)


def test_traces_have_the_names_that_tensorboards_plugin_looks_for(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(schedule=schedule(wait=0, warmup=1, active=1, repeat=2))
    make_trainer(tmp_path, profiler=profiler, max_epochs=1, limit_val_batches=0).fit(Net(), batches(TRAIN))
    # torch-tb-profiler: worker, dot, span, ending
    found = [re.fullmatch(r"(.*?)(\.\d+)?\.pt\.trace\.json(?:\.gz)?", trace.name) for trace in profiler.traces]
    assert [match and match.groups() for match in found] == [("fit-trace", ".0"), ("fit-trace", ".1")]
    assert all(trace.parent == tmp_path for trace in profiler.traces)


def test_memory_and_operations_are_columns_of_the_report(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(profile_memory=True, with_flops=True, sort_by="self_cpu_memory_usage")
    make_trainer(tmp_path, profiler=profiler, max_epochs=1, limit_val_batches=0).fit(Net(), batches(TRAIN))
    assert "CPU Mem" in profiler.summary()
    assert "FLOPs" in profiler.summary()


def test_somebody_may_look_at_each_cycle(tmp_path: Path) -> None:
    seen: list[tuple[Any, list[Path]]] = []
    profiler = PyTorchProfiler(on_trace_ready=lambda torchs: seen.append((torchs, list(profiler.traces))))
    make_trainer(tmp_path, profiler=profiler, max_epochs=1, limit_val_batches=0).fit(Net(), batches(TRAIN))
    assert [(type(torchs), traces) for torchs, traces in seen] == [(torch.profiler.profile, profiler.traces)]


def test_an_error_of_who_looks_is_raised(tmp_path: Path) -> None:
    def look(_: Any) -> None:
        raise KeyError("broken")

    trainer = make_trainer(tmp_path, profiler=PyTorchProfiler(on_trace_ready=look), max_epochs=1, limit_val_batches=0)
    with pytest.raises(KeyError, match="broken"):
        trainer.fit(Net(), batches(8))
    assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sort_by": "cpu_time_totals"}, "Did you mean 'cpu_time_total'"),
        ({"row_limit": -2}, "row_limit=-2 is not valid"),
        ({"schedule": 3}, "schedule=3 is not valid"),
        ({"on_trace_ready": "print"}, "on_trace_ready='print' is not valid"),
    ],
)
def test_what_would_fail_with_the_first_trace_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PyTorchProfiler(**options)


def test_every_column_can_be_sorted_by() -> None:
    with torch.profiler.profile(profile_memory=True, with_flops=True) as torchs:
        torch.ones(2, 2) @ torch.ones(2, 2)
    for column in _SORTABLE:
        assert "aten::mm" in torchs.key_averages().table(sort_by=column)
