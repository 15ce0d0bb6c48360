"""A small run in processes of its own that get signals from outside.

As a program it is a warm process: it imports torch once and forks a process for every line of JSON that it reads.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint

EPOCHS, BATCHES, VAL_BATCHES = 3, 8, 3
TIMEOUT_S = 60.0
# Where signals are sent; after the "d" of on_fit_end one may come too late to be handled.
KINDS = {"t": "training_step", "v": "validation_step", "s": "on_save_checkpoint", "e": "on_train_epoch_end"}

_told = -1  # where events are written; none in a process that nobody watches


def tell(kind: str) -> None:
    if _told >= 0:
        os.write(_told, kind.encode())


class Net(L.LightningModule):
    """Dropout and BatchNorm, so that a step that is missing or done twice shows in every weight."""

    def __init__(self, step_s: float) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)
        )
        self.step_s = step_s

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tell("t")
        time.sleep(self.step_s)
        loss = (self.layers(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        tell("v")
        time.sleep(self.step_s)
        self.log("val_loss", (self.layers(batch[0]) - batch[1]).square().mean())

    def on_train_epoch_end(self) -> None:
        tell("e")

    def on_fit_end(self) -> None:
        tell("d")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tell("s")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def loader(batches: int, workers: int) -> DataLoader[Any]:
    inputs = torch.linspace(-1, 1, batches * 4 * 4).reshape(-1, 4)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())
    return DataLoader(data, batch_size=4, num_workers=workers)


def run(folder: str, workers: int = 0, step_s: float = 0.001, save_last: bool = False, resume: bool = False) -> None:
    """Train, going on from the newest whole checkpoint in ``folder`` if asked to, and leave ``final/final.ckpt``."""
    L.seed_everything(7)
    module = Net(step_s)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        val_check_interval=4,
        num_sanity_val_steps=0,
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=ModelCheckpoint(folder, monitor="loss", save_top_k=2, every_n_train_steps=3, save_last=save_last),
    )
    trainer.fit(module, loader(BATCHES, workers), loader(VAL_BATCHES, workers), ckpt_path="last" if resume else None)
    trainer.save_checkpoint(Path(folder, "final", "final.ckpt"))


# The warm process, and how to ask it


class Warm:
    """Asks a warm process to fork runs and to send signals to them."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, folder: Path, **case: Any) -> dict[str, Any]:
        """Run once.

        Args:
            folder: of the run.
            case: ``arguments`` of `run`; ``signals``: names, sent one after the other; ``at``: before which event, and
                ``kind``: of which, see `KINDS` (any by default); ``delay_s``: time until then; ``pause_s``: between two
                signals; ``group``: whether the whole process group gets them; ``to_the_end``: of the interpreter too.

        Returns:
            ``code`` as `subprocess` has it, ``out``, ``err``, ``sent``, and the ``events``, one letter each.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), **case}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        self.process.communicate()


def fork_run(case: dict[str, Any]) -> dict[str, Any] | None:
    """Fork a run, send it its signals and wait for it. None in the forked process, when its run has ended."""
    global _told
    folder = case["folder"]
    os.makedirs(folder, exist_ok=True)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.close(reader)
        _told = writer
        if case.get("to_the_end"):
            run(folder, **case.get("arguments", {}))
            return None
        end_quickly(folder, **case.get("arguments", {}))
    os.close(writer)
    events = send(case, pid, reader)
    code = wait(pid)
    while more := os.read(reader, 4096):  # until the workers have gone as well
        events += more.decode()
    os.close(reader)
    texts = {name: Path(folder, name).read_text() for name in ("out", "err")}
    return {"code": code, "events": events, **texts}


def end_quickly(folder: str, **arguments: Any) -> NoReturn:
    """Run, and end as a script does, but for taking all modules down, which takes torch a second."""
    code = 0
    try:
        run(folder, **arguments)
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:  # noqa: BLE001 told as Python tells it
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def send(case: dict[str, Any], pid: int, reader: int) -> str:
    events = ""
    wanted, kind = case.get("at", 1), case.get("kind", "".join(KINDS))
    while case.get("signals") and sum(events.count(each) for each in kind) < wanted:
        if not (more := os.read(reader, 1)):
            return events  # it ended before
        events += more.decode()
    time.sleep(case.get("delay_s", 0.0))
    for name in case.get("signals", ()):
        try:
            (os.killpg if case.get("group") else os.kill)(pid, signal.Signals[name])
        except ProcessLookupError:
            break
        time.sleep(case.get("pause_s", 0.0))
    return events


def wait(pid: int) -> int:
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 1000  # no process has that


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        run(folder, step_s=0)  # torch imports its compiler at an optimizer's first step
    for line in sys.stdin:
        result = fork_run(json.loads(line))
        if result is None:
            return  # as a script ends
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
