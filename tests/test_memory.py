"""Freed memory: kept where the allocator is glibc's and nobody else decides. Page faults are counted, not timed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from leyden import memory

needs_glibc = pytest.mark.skipif(memory._glibc() is None, reason="the allocator is not glibc's")

# Blocks as a step makes them: activations of 1 MB, all freed at its end.
STEPS = """
import resource, sys
import torch
torch.set_num_threads(1)
from leyden.memory import give_back_freed_memory, keep_freed_memory

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        blocks = [torch.ones(2**18) for _ in range(20)]
        del blocks
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps

kept = keep_freed_memory() if "keep" in sys.argv else False
faults(3)
print(kept, faults(50))
if kept:
    size = lambda: int(open("/proc/self/statm").read().split()[1])
    before = size()
    give_back_freed_memory()
    print(size() < before - 4000)  # pages: most of the 20 MB
"""


def run(*arguments: str, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name} | variables
    command = [sys.executable, "-c", STEPS, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


@needs_glibc
def test_kept_memory_is_not_asked_for_again() -> None:
    kept, faults, given_back = run("keep")
    assert kept == "True"
    assert float(faults) < 50  # of 5,120 pages that a step writes to
    assert given_back == "True"


@needs_glibc
def test_without_it_small_heaps_are_given_back_and_asked_for_again() -> None:
    # glibc's own rule, with its thresholds fixed as they are in a process that has freed nothing yet
    _, faults = run(MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")
    assert float(faults) > 1000


@needs_glibc
@pytest.mark.parametrize(
    "variable", [{"MALLOC_TRIM_THRESHOLD_": "1000000"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}]
)
def test_who_has_set_it_keeps_it(monkeypatch: pytest.MonkeyPatch, variable: dict[str, str]) -> None:
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    assert not memory.can_be_kept()
    assert not memory.keep_freed_memory()


def test_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    memory._glibc.cache_clear()
    monkeypatch.setenv("LD_PRELOAD", str(Path("/nowhere/libjemalloc.so")))
    try:
        assert not memory.keep_freed_memory()
        memory.give_back_freed_memory()
    finally:
        memory._glibc.cache_clear()
