"""docs/scaling.md: its program prints what it says, and its formulas are those of the plan."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from leyden.planner import plan_memory

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(block, names)
    return {**names, "printed": out.getvalue()}


def test_the_program_prints_the_tables(program: dict[str, Any]) -> None:
    (block,) = re.findall(r"^```text\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert program["printed"] == block


def test_the_formulas(program: dict[str, Any]) -> None:
    model = program["small"]
    count = sum(parameter.numel() for parameter in model.parameters())
    options: dict[str, Any] = {"devices": 8, "verbose": False, "device_type": "cpu"}
    mixed, plain, half = (
        plan_memory(model, precision=name, **options) for name in ("bf16-mixed", "32-true", "bf16-true")
    )
    single = plain.row("single")
    assert single.parameters + single.gradients + (single.optimizer_state or 0) == pytest.approx(16 * count, rel=1e-6)
    single = half.row("single")
    assert single.parameters + single.gradients + (single.optimizer_state or 0) == pytest.approx(8 * count, rel=1e-6)
    share = 7 / 8
    root = count - sum(parameter.numel() for parameter in model.blocks.parameters())
    for found, strategy, factor in ((mixed, "ddp", 8), (mixed, "fsdp", 8), (plain, "fsdp", 12)):
        once = 0 if strategy == "ddp" else (factor - 4) / 2 * root
        assert found.row(strategy).communication == pytest.approx(share * (factor * count - once), rel=1e-3)


def test_every_column_is_told_of(program: dict[str, Any]) -> None:
    table = PAGE.split("| column | per rank |\n")[1].split("\n\n")[0]
    told = re.findall(r"^\| ([a-z]+) \|", table, flags=re.MULTILINE)
    headings = program["plan"].headings()
    assert [name for name in headings if name not in ("strategy", "ranks", "fits", "casts")] == [
        name for name in told if name != "casts"
    ]


def test_the_measured_table_is_what_the_tests_allow() -> None:
    rows = [line.split(" | ") for line in PAGE.split("off by |\n")[1].split("\n\n")[0].splitlines()[1:]]
    assert len(rows) == 10
    for *about, off in rows:
        allowed = 1.0 if "fsdp" in about[0] and "mixed" in about[3] else 0.1
        assert abs(float(off.split(" %")[0].replace("−", "-"))) <= allowed
