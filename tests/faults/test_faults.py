"""A share of the kills that ``make faults`` does in full."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("driver.py")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither fork nor SIGKILL")
def test_a_killed_run_that_goes_on_ends_bit_for_bit_like_an_undisturbed_one() -> None:
    done = subprocess.run([sys.executable, str(DRIVER), "--share", "24"], capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = re.search(r"^(\d+) kills, 0 lives differ", done.stdout, re.MULTILINE)
    assert found is not None
    assert int(found[1]) >= 100
