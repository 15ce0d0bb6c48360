"""The same programs under Lightning and under leyden return the same, but for differences that are stated one by one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent / "both"
PROGRAMS = sorted(file.stem for file in HERE.glob("p[0-9][0-9]_*.py"))


def _differences() -> ModuleType:
    spec = importlib.util.spec_from_file_location("both_differences", HERE / "differences.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


differences = _differences()
pytestmark = pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each program returns under each package; both processes run side by side."""
    folder = tmp_path_factory.mktemp("both")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    environment.pop("PYTHONWARNINGS", None)
    running = {}
    for package in ("lightning", "leyden"):
        command = [
            sys.executable,
            str(HERE / "run.py"),
            package,
            str(folder / f"{package}.json"),
            str(folder / package),
        ]
        with open(folder / f"{package}.txt", "w") as said:
            running[package] = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=said, stderr=subprocess.STDOUT
            )
    for package, process in running.items():
        assert process.wait(timeout=300) == 0, (folder / f"{package}.txt").read_text()[-5000:]
    return {package: json.loads((folder / f"{package}.json").read_text()) for package in running}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_does_the_same_under_both_packages(program: str, results: dict[str, dict[str, Any]]) -> None:
    lightning, leyden = (results[package][program] for package in ("lightning", "leyden"))
    for package, found in (("lightning", lightning), ("leyden", leyden)):
        assert "raised" not in found, f"under {package}: {found.get('raised')}"
    met: set[Any] = set()
    unequal = list(differences.compare(program, lightning, leyden, met))
    assert not unequal, "\n".join(unequal)
    stated = {each for each in differences.DIFFERENCES if each.where.startswith(program[:3])}
    assert stated <= met, f"never met: {[each.where for each in stated - met]}"


def test_differences_are_stated_for_programs_that_exist() -> None:
    for difference in differences.DIFFERENCES:
        number = difference.where[:3]
        assert number == r"p\d" or any(program.startswith(number) for program in PROGRAMS), difference.where
