"""docs/resume.md: its programs run and are exact, and the names and numbers on it are those of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from faults.program import CASES
from leyden import policies
from leyden.callbacks import ModelCheckpoint, Preemption
from leyden.data import generators
from quiet import make_trainer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "resume.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)

SCRIPT = """
import time
import torch
from torch.utils.data import DataLoader, TensorDataset
import leyden as L


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        time.sleep(0.004)  # long enough to be killed
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


L.seed_everything(0)
data = TensorDataset(torch.randn(120, 4))
model, train_loader, val_loader = Net(), DataLoader(data, batch_size=2, shuffle=True), DataLoader(data, batch_size=60)
"""


class Killed(Exception):
    """Stands for the end of a process."""


class Kill(L.Callback):
    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise Killed


def trained(folder: Path, kill_at: int | None, make: Callable[[], Any], loader: Callable[[], Any]) -> Any:
    """Train for two epochs, killed once and begun again if asked; return the module and its callbacks."""
    for at in (kill_at, None) if kill_at is not None else (None,):
        torch.manual_seed(3)
        module, *callbacks = make()
        keeps = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
        trainer = make_trainer(folder, keeps, *callbacks, Kill(at), max_epochs=2, enable_checkpointing=None)
        try:
            trainer.fit(module, loader(), ckpt_path="last")
        except Killed:
            assert at is not None
    return module, callbacks


def test_a_script_with_the_first_lines_is_exact_when_it_is_killed(tmp_path: Path) -> None:
    first, *_, check = BLOCKS
    (tmp_path / "train.py").write_text(SCRIPT + first, encoding="utf-8")
    (tmp_path / "check.py").write_text(check + "\nprint(codes)\n", encoding="utf-8")
    # not strict about warnings: Python is started and killed here, and may complain of that
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "check.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    codes = re.findall(r"^\[(.*)\]$", done.stdout, flags=re.MULTILINE)[-1].split(", ")
    assert codes[0] == codes[-1] == "0"
    assert codes[1] != "0", "it was over before it was killed"
    state = L.load_checkpoint(tmp_path / "killed" / "checkpoints" / "last.ckpt")
    assert (state["epoch"], state["global_step"]) == (9, 600)


def test_the_stream_goes_on_at_its_place(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(BLOCKS[1], names)
    (tmp_path / "lines").write_text("".join(f"{number}\n" for number in range(14)), encoding="utf-8")

    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(1, 1)
            self.seen: list[list[float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(batch.flatten().tolist())
            return self.net(batch / 10).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def loader() -> Any:
        return DataLoader(names["Lines"](tmp_path / "lines"), batch_size=4)

    whole, _ = trained(tmp_path / "whole", None, lambda: [Net()], loader)
    assert [len(batch) for batch in whole.seen] == 2 * [4, 4, 4, 2]
    for kill_at in (1, 3, 4, 6):
        rest, _ = trained(tmp_path / f"killed{kill_at}", kill_at, lambda: [Net()], loader)
        assert rest.seen == whole.seen[kill_at:]
        assert torch.equal(rest.net.weight, whole.net.weight)


def test_state_of_your_own_is_kept(tmp_path: Path) -> None:
    names: dict[str, Any] = {"torch": torch, "L": L}
    exec(BLOCKS[2], names)

    def make() -> list[Any]:
        return [names["Noisy"](), names["CountBatches"]()]

    def loader() -> Any:
        return DataLoader(TensorDataset(torch.arange(12.0).reshape(-1, 1) / 12), batch_size=3, shuffle=True)

    whole, [whole_count] = trained(tmp_path / "whole", None, make, loader)
    rest, [rest_count] = trained(tmp_path / "killed", 5, make, loader)
    assert torch.equal(rest.net.weight, whole.net.weight)
    assert rest.samples == whole.samples == 24
    assert rest_count.batches == whole_count.batches == 8


def test_all_blocks_are_looked_at_here() -> None:
    assert len(BLOCKS) == 4


def test_the_warnings_are_those_of_the_code() -> None:
    def codes_in(*places: str) -> set[str]:
        files = [file for place in places for file in (ROOT / "src" / "leyden").glob(place)]
        return {
            code for file in files for code in re.findall(r"warn\(\s*\"([a-z-]+)\"", file.read_text(encoding="utf-8"))
        }

    table = "\n".join(re.findall(r"^\|(.*?)\|", PAGE.split("\n## Warnings\n")[1], flags=re.MULTILINE))
    listed = set(re.findall(r"`([a-z-]+)`", table))
    assert listed <= codes_in("**/*.py")
    of_resuming = codes_in("checkpoint/*.py", "data/read*.py", "data/indexed.py", "metrics_state.py", "policies.py")
    assert of_resuming | codes_in("halving.py", "callbacks/preemption.py", "callbacks/model_checkpoint.py") <= listed
    for code in re.findall(r"warning\s+`([a-z-]+)`", PAGE):
        assert code in listed


def test_the_numbers_and_names_are_those_of_the_code() -> None:
    text = re.sub(r"\s+", " ", PAGE)
    assert f"in {len(CASES)} settings" in text
    assert f"after {policies.MAX_SKIPS_IN_A_ROW} in a row" in text
    assert f"after {policies.MAX_ROLLBACKS} times" in text
    assert {4: "four"}[generators._MAX_DEPTH] in text.split("to a depth of ")[1][:5]
    [job] = re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    for line in job.splitlines():
        assert line in (Preemption.__doc__ or "")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", PAGE))))
def test_links_lead_somewhere(target: str) -> None:
    name, _, anchor = target.partition("#")
    if name.startswith("https://"):
        return
    file = (ROOT / "docs" / name) if name else ROOT / "docs" / "resume.md"
    assert file.exists()
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not anchor or anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
