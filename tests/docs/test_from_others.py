"""The programs of docs/from_others.md, run as they stand, train the same weights as those of the other packages."""

from __future__ import annotations

import importlib.util
import re
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from_others.md"
SECTIONS = ("accelerate", "transformers", "keras")


def programs() -> dict[str, tuple[str, str]]:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2 * len(SECTIONS)
    return {name: (blocks[2 * index], blocks[2 * index + 1]) for index, name in enumerate(SECTIONS)}


def weights(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a program in ``folder``; return the state of its ``model``."""
    folder.mkdir()
    (folder / "program.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(folder)
    with torch.random.fork_rng():
        return {
            name: each.detach().clone() for name, each in runpy.run_path("program.py")["model"].state_dict().items()
        }


@pytest.mark.parametrize("package", SECTIONS)
def test_the_half_of_leyden_learns(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = weights(programs()[package][1], tmp_path / "leyden", monkeypatch)
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    error = (x @ found["weight"].T + found["bias"] - x.sum(1, keepdim=True)).square().mean()
    assert error < 3.5  # that of a layer which gives 0 is about 4


@pytest.mark.parametrize("package", SECTIONS)
def test_both_halves_train_the_same_weights(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    theirs, ours = programs()[package]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other package
        expected = weights(theirs, tmp_path / package, monkeypatch)
    found = weights(ours, tmp_path / "leyden", monkeypatch)
    for name in ("weight", "bias"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
