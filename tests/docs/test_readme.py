"""The README's program is a program: it runs as it is printed, and learns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def program() -> str:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return code


def test_the_program_learns_in_a_fresh_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program()], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    accuracy = float(re.findall(r"tensor\(([\d.]+)\)", done.stdout)[-1])
    assert accuracy > 0.9
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))


def test_the_program_is_short() -> None:
    lines = [line for line in program().splitlines() if line.strip()]
    assert len(lines) <= 30


def test_the_pages_that_it_names_are_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[2] / target).exists(), target
