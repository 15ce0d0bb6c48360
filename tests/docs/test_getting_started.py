"""The program of docs/getting_started.md runs block by block, and its folder holds what the page says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "getting_started.md"


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text("\n".join(blocks), encoding="utf-8")
    names = runpy.run_path("program.py", run_name="__main__")

    assert names["result"]["test_acc"] > 0.9
    assert names["trainer"].current_epoch == 8
    assert names["trainer"].global_step == 8 * len(names["train"])
    assert [path.name for path in sorted(Path("lightning_logs").iterdir())] == ["version_0", "version_1"]
    run_folder = Path("lightning_logs/version_0")
    assert list(run_folder.glob("events.out.tfevents.*"))
    assert (run_folder / "hparams.yaml").read_text(encoding="utf-8").splitlines() == [
        "width: 32",
        "learning_rate: 0.01",
    ]
    checkpoints = sorted(path.name for path in (run_folder / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    assert re.fullmatch(r"epoch=\d+-step=\d+\.ckpt", checkpoints[0])
    assert checkpoints[1] == "last.ckpt"
