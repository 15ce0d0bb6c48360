"""The progress bar of a whole program: in a pipe, on a terminal, and after it was stopped."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from leyden.callbacks import RichProgressBar
from leyden.module import LightningModule
from leyden.trainer import Trainer

torch.set_num_threads(1)

PROGRAM = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader
from leyden.module import LightningModule
from leyden.trainer import Trainer

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
    def training_step(self, batch, batch_idx):
        self.log("loss", 10.0 * self.current_epoch + batch_idx, prog_bar=True)
        self.log("mean", float(batch_idx), on_step=False, on_epoch=True, prog_bar=True)
        if {print} and batch_idx == 2:
            print(f"a line of the user in epoch {{self.current_epoch}}")
        time.sleep({pause})
        if self.current_epoch == 1 and batch_idx == 1:
            {ending}
        return self.weight.sum()
    def on_train_epoch_end(self):
        self.log("late", 7.5, prog_bar=True)
    def validation_step(self, batch, batch_idx):
        self.log("val", 0.125 * (self.current_epoch + 1), prog_bar=True)
        time.sleep({pause})
    def test_step(self, batch, batch_idx):
        self.log("score", 0.625)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = DataLoader(torch.ones(4), batch_size=1)
trainer = Trainer(
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, max_epochs=2,
    default_root_dir={folder!r},
)
net = Net()
trainer.fit(net, data, data)
trainer.test(net, data)
print("the program goes on")
"""
EPOCH_LINES = [
    r"epoch 1/2  4/4 batches  [\d.]+ s  [\d.]+ batch/s  loss=3 mean=1\.5 late=7\.5 val=0\.125",
    r"epoch 2/2  4/4 batches  [\d.]+ s  [\d.]+ batch/s  loss=13 mean=1\.5 late=7\.5 val=0\.25",
]
TEST_LINE = r"test  4/4 batches  [\d.]+ s  [\d.]+ batch/s"


def program(folder: Path, ending: str = "pass", with_print: bool = False, pause: float = 0.0) -> list[str]:
    path = folder / "program.py"
    path.write_text(PROGRAM.format(print=with_print, ending=ending, pause=pause, folder=str(folder)))
    return [sys.executable, str(path)]


def fits(line: str, pattern: str) -> bool:
    """Whether a line is the pattern, with its metrics in any order."""
    head, *expected = re.split(r"  (?=loss=)", pattern)
    if not expected:
        return re.fullmatch(head, line) is not None
    match = re.fullmatch(head + r"  (\S+(?: \S+)*)", line)
    if match is None:
        return False
    shown, wanted = sorted(match[1].split(" ")), sorted(expected[0].split(" "))
    return len(shown) == len(wanted) and all(map(re.fullmatch, wanted, shown))


# in a pipe


def in_pipe(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "FORCE_COLOR": "1",
        **environment,
    }  # as in many CI systems: still no control characters
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_a_pipe_gets_a_plain_line_per_epoch(tmp_path: Path) -> None:
    done = in_pipe(program(tmp_path, with_print=True))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout
    first, epoch_1, second, epoch_2, test, end = done.stdout.splitlines()
    assert (first, second) == ("a line of the user in epoch 0", "a line of the user in epoch 1")
    assert fits(epoch_1, EPOCH_LINES[0]), epoch_1
    assert fits(epoch_2, EPOCH_LINES[1]), epoch_2
    assert re.fullmatch(TEST_LINE + r"  score=0\.625", test), test
    assert end == "the program goes on"


def test_a_pipe_after_an_exception_says_where_it_was(tmp_path: Path) -> None:
    done = in_pipe(program(tmp_path, "raise ValueError('broken')"))
    assert done.returncode == 1
    epoch_1, stopped = done.stdout.splitlines()
    assert fits(epoch_1, EPOCH_LINES[0])
    assert re.fullmatch(r"epoch 2/2  1/4 batches  [\d.]+ s  [\d.]+ batch/s  ValueError", stopped), stopped
    assert done.stderr.endswith("ValueError: broken\n")


def test_a_pipe_after_an_interrupt_says_where_it_was(tmp_path: Path) -> None:
    done = in_pipe(program(tmp_path, "os.kill(os.getpid(), signal.SIGINT)"))
    assert done.returncode == 130
    assert done.stderr == ""
    epoch_1, stopped, empty, last = done.stdout.splitlines()
    assert fits(epoch_1, EPOCH_LINES[0])
    assert re.fullmatch(r"epoch 2/2  1/4 batches  .*  KeyboardInterrupt", stopped), stopped
    assert (empty, last) == ("", "Interrupted in epoch 1 after 5 steps; nothing half-done was saved.")


# on a terminal


def on_terminal(command: list[str], columns: int = 110) -> tuple[int, str]:
    """Run a program on a pseudo terminal; return its exit status and all that it wrote there."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    running = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True, start_new_session=True, env=environment
    )
    os.close(theirs)
    received = b""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        if not select.select([ours], [], [], 0.2)[0]:
            if running.poll() is not None:
                break
            continue
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end was closed
            break
        if not piece:
            break
        received += piece
    os.close(ours)
    if running.poll() is None and time.monotonic() >= give_up:
        running.send_signal(signal.SIGKILL)
    return running.wait(timeout=10), received.decode()


CONTROL = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])")


def screen(received: str) -> tuple[list[str], bool]:
    """What a terminal shows in the end, and whether its cursor is visible: as much of one as rich asks for."""
    lines, row, column, visible, position = [""], 0, 0, True, 0
    while position < len(received):
        match = CONTROL.match(received, position)
        if match:
            position = match.end()
            private, number, letter = match.groups()
            count = int(number) if number.isdigit() else 1
            if private:
                if number == "25":
                    visible = letter == "h"
            elif letter == "A":
                row = max(0, row - count)
            elif letter == "K":
                lines[row] = "" if number == "2" else lines[row][:column]
            elif letter != "m":
                raise AssertionError(f"an unexpected control sequence: {match[0]!r}")
            continue
        character = received[position]
        position += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        else:
            assert character >= " ", f"an unexpected control character: {character!r}"
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines], visible


def test_a_terminal_keeps_a_line_per_epoch_and_the_results(tmp_path: Path) -> None:
    status, received = on_terminal(program(tmp_path, with_print=True, pause=0.06))
    lines, visible = screen(received)
    assert status == 0
    assert visible
    assert "\x1b[?25l" in received  # there was a live bar
    assert "validation" in received
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 2, lines
    assert all(map(fits, epochs, EPOCH_LINES)), epochs
    users = [line for line in lines if "user" in line]
    assert users == ["a line of the user in epoch 0", "a line of the user in epoch 1"]
    assert lines.index(users[0]) < lines.index(epochs[0]) < lines.index(users[1]) < lines.index(epochs[1])
    tests = [line for line in lines if re.fullmatch(TEST_LINE, line)]
    assert len(tests) == 1
    assert [line for line in lines if "score" in line and "0.625" in line]
    assert not [line for line in lines if "━" in line and "/4" in line]  # no bar is left
    assert [line for line in lines if line][-1] == "the program goes on"


@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [
        ("raise ValueError('broken')", 1, "ValueError"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "KeyboardInterrupt"),
    ],
)
def test_a_terminal_is_left_clean_after_a_stop(ending: str, status: int, error: str, tmp_path: Path) -> None:
    returned, received = on_terminal(program(tmp_path, ending, pause=0.06))
    lines, visible = screen(received)
    assert returned == status
    assert visible
    assert "\x1b[?25l" in received
    stopped = [line for line in lines if line.startswith("epoch 2/2")]
    assert len(stopped) == 1, lines
    assert re.fullmatch(rf"epoch 2/2  1/4 batches  .*  {error}", stopped[0])
    assert not [line for line in lines if "━" in line]
    last = [line for line in lines if line][-1]
    assert last == (
        "ValueError: broken" if status == 1 else "Interrupted in epoch 1 after 5 steps; nothing half-done was saved."
    )


# what an epoch's line shows


class Net(LightningModule):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.options = options

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("x", float(batch_idx), prog_bar=True, **self.options)
        return self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "x=3"),
        ({"on_epoch": True}, "x_step=3 x_epoch=1.5"),
        ({"on_step": False, "on_epoch": True}, "x=1.5"),
        ({"on_step": False, "on_epoch": True, "reduce_fx": "max"}, "x=3"),
    ],
)
def test_an_epochs_line_shows_the_epochs_values(
    options: dict[str, Any], shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_model_summary=False, enable_checkpointing=False, max_epochs=2,
        callbacks=RichProgressBar(), default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Net(options), DataLoader(torch.ones(4)))  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("batch/s  ")[1] for line in lines] == [shown, shown]
