"""The page on profilers: its code runs, and it names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from leyden.callbacks import ThroughputMonitor
from leyden.profilers import _NAMES, PyTorchProfiler
from leyden.throughput import _PEAKS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "profilers.md").read_text(encoding="utf-8")


def test_the_code_runs() -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert isinstance(names["profiler"], PyTorchProfiler)
    monitor = names["monitor"]
    assert isinstance(monitor, ThroughputMonitor)
    assert monitor._workload.after_batch({"input_ids": torch.ones(4, 32)}).tokens == 128


def test_every_profiler_is_there() -> None:
    assert re.findall(r'^\|.*profiler="(\w+)"', PAGE, flags=re.MULTILINE) == list(_NAMES)


def test_the_devices_are_those_of_the_table() -> None:
    listed = re.findall(r"\b[A-Z]+\d+[A-Z]*\b|\b\d090\b", " ".join(PAGE.split()).split("knows the dense figures of")[1])
    missing = [pattern for pattern in _PEAKS if not any(re.search(rf"\b{name}(?![0-9])", pattern) for name in listed)]
    assert not missing
    unknown = [name for name in listed if not any(name in pattern for pattern in _PEAKS)]
    assert not unknown
