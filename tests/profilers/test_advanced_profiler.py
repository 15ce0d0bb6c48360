"""Functions are listed under the action that called them, once."""

from __future__ import annotations

import pstats
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.errors import ConfigurationError
from leyden.profilers import AdvancedProfiler
from profiled import EPOCHS, TRAIN, VAL, Net, batches, make_trainer

torch.set_num_threads(1)


def known_part() -> None: ...


def another_part() -> None: ...


def calls(summary: str, action: str, function: str) -> int:
    """How often the report says that ``function`` was called in ``action``."""
    parts = re.split(r"^(\S.*)\n-+$", summary, flags=re.MULTILINE)
    listing = dict(zip(parts[1::2], parts[2::2], strict=True)).get(action, "")
    found = re.search(rf"^ +(\d+) .*\({function}\)$", listing, flags=re.MULTILINE)
    return int(found[1]) if found else 0


def test_functions_are_counted_by_action(tmp_path: Path) -> None:
    class Helped(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            known_part()
            with self.trainer.profiler.profile("part"):
                another_part()
            known_part()
            return super().training_step(batch, batch_idx)

    profiler = AdvancedProfiler(functions=1000)
    make_trainer(tmp_path, profiler=profiler, num_sanity_val_steps=0).fit(Helped(), batches(TRAIN), batches(VAL))
    text, step = profiler.summary(), "[LightningModule]Helped.training_step"
    assert calls(text, step, "known_part") == 2 * EPOCHS * TRAIN
    assert calls(text, step, "another_part") == 0  # it belongs to the action inside
    assert calls(text, "part", "another_part") == EPOCHS * TRAIN
    assert calls(text, "[LightningModule]Helped.validation_step", "validation_step") == EPOCHS * VAL
    assert calls(text, "backward", "backward") == EPOCHS * TRAIN


def test_an_outer_action_goes_on_after_an_inner_one() -> None:
    profiler = AdvancedProfiler(functions=1000)
    with profiler.profile("outer"):
        with profiler.profile("inner"):
            another_part()
        known_part()
        assert calls(profiler.summary(), "outer", "known_part") == 1  # reading does not stop it
        known_part()
    assert calls(profiler.summary(), "outer", "known_part") == 2
    assert calls(profiler.summary(), "outer", "another_part") == 0


def test_an_action_that_was_left_open_ends_with_the_outer_one() -> None:
    profiler = AdvancedProfiler(functions=1000)
    profiler.start("outer")
    profiler.start("inner")
    profiler.stop("outer")
    known_part()
    assert "known_part" not in profiler.summary()


def test_an_error_leaves_no_profile_running(tmp_path: Path) -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.trainer.profiler.start("left open")
            raise KeyError("broken")

    profiler = AdvancedProfiler(functions=1000)
    with pytest.raises(KeyError):
        make_trainer(tmp_path, profiler=profiler, limit_val_batches=0).fit(Broken(), batches(1))
    known_part()
    assert "known_part" not in profiler.summary()


def test_the_number_of_functions_is_limited() -> None:
    profiler = AdvancedProfiler(functions=1)
    with profiler.profile("part"):
        known_part()
        another_part()
    assert len(re.findall(r"^ +\d+ .*\(\w+\)$", profiler.summary(), flags=re.MULTILINE)) <= 1


@pytest.mark.parametrize("functions", [0, -1, 1.5, True])
def test_a_wrong_number_of_functions_is_refused(functions: Any) -> None:
    with pytest.raises(ConfigurationError, match="functions"):
        AdvancedProfiler(functions=functions)


@pytest.mark.parametrize("folder", [None, "profiles"])
def test_profiles_are_dumped_for_other_tools(folder: str | None, tmp_path: Path) -> None:
    profiler = AdvancedProfiler(tmp_path / folder if folder else None, "net", dump_stats=True)
    make_trainer(tmp_path, profiler=profiler, num_sanity_val_steps=0).fit(Net(), batches(TRAIN), batches(VAL))
    step = tmp_path / (folder or "") / "fit-net.LightningModule_Net.training_step.prof"
    assert step in profiler.dumps
    assert sorted(profiler.dumps) == sorted(step.parent.glob("*.prof"))
    counts = {name: calls for (_, _, name), (calls, *_) in pstats.Stats(str(step)).stats.items()}  # type: ignore[attr-defined]
    assert counts["training_step"] == EPOCHS * TRAIN


def test_profiles_are_not_dumped_unasked_nor_in_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path, profiler="advanced").fit(Net(), batches(TRAIN), batches(VAL))
    trial = AdvancedProfiler(dump_stats=True)
    make_trainer(tmp_path, profiler=trial, fast_dev_run=True).fit(Net(), batches(TRAIN), batches(VAL))
    assert trial.dumps == []
    assert list(tmp_path.rglob("*.prof")) == []
