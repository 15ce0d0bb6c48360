from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from leyden.callbacks import ProgressBar, RichProgressBar
from leyden.callbacks.progress_view import (
    Bar,
    LineView,
    NotebookView,
    TerminalView,
    choose_view,
    duration,
    in_notebook,
    results_table,
)
from leyden.errors import ConfigurationError, LeydenError

MODULE: Any = None
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Trainer(SimpleNamespace):
    """As much of a trainer as a progress bar reads; counts how often the metrics are read."""

    def __init__(self, **kwargs: Any) -> None:
        self.metrics: dict[str, float] = {"train_loss": 0.1234567}
        self.metrics_read = 0
        defaults: dict[str, Any] = {
            "is_global_zero": True,
            "current_epoch": 0,
            "max_epochs": 3,
            "sanity_checking": False,
            "num_training_batches": 400,
            "num_val_batches": [10, 5],
            "num_sanity_val_batches": [2],
            "num_test_batches": [20],
            "num_predict_batches": [6],
            "callback_metrics": {},
            "boundary": [],
        }
        super().__init__(**defaults | kwargs)

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        self.metrics_read += 1
        return self.metrics

    def at_step_boundary(self, action: Any) -> None:
        self.boundary.append(action)

    def run_boundary(self) -> None:
        actions, self.boundary = self.boundary, []
        for action in actions:
            action()


def make_bar(file: io.StringIO | None, clock: Clock, terminal: bool = False, **kwargs: Any) -> RichProgressBar:
    console = None if file is None else Console(file=file, force_terminal=terminal, width=100)
    bar = RichProgressBar(console=console, **kwargs)
    bar._clock = clock
    return bar


def train_epoch(bar: RichProgressBar, trainer: Any, clock: Clock, batches: int, batch_s: float) -> None:
    bar.on_train_epoch_start(trainer, MODULE)
    for index in range(batches):
        clock.now += batch_s
        bar.on_train_batch_end(trainer, MODULE, None, None, index)


def validate(bar: RichProgressBar, trainer: Any, clock: Clock, batch_s: float) -> None:
    bar.on_validation_start(trainer, MODULE)
    counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    for loader, count in enumerate(counts):
        for index in range(count):
            clock.now += batch_s
            bar.on_validation_batch_end(trainer, MODULE, None, None, index, loader)
    bar.on_validation_end(trainer, MODULE)


def fit(bar: RichProgressBar, trainer: Any, clock: Clock, epochs: int, batches: int, batch_s: float) -> None:
    bar.setup(trainer, MODULE, "fit")
    trainer.sanity_checking = True
    validate(bar, trainer, clock, batch_s)
    trainer.sanity_checking = False
    for epoch in range(epochs):
        trainer.current_epoch = epoch
        train_epoch(bar, trainer, clock, batches, batch_s)
        validate(bar, trainer, clock, batch_s)
        bar.on_train_epoch_end(trainer, MODULE)
        trainer.metrics["acc"] = epoch / 4  # logged by the module's own on_train_epoch_end
        trainer.run_boundary()
    bar.on_train_end(trainer, MODULE)
    bar.teardown(trainer, MODULE, "fit")


# a pipe or a file


def test_pipe_has_one_line_for_each_short_epoch() -> None:
    file, clock = io.StringIO(), Clock()
    fit(make_bar(file, clock), Trainer(), clock, epochs=3, batches=400, batch_s=1 / 64)
    assert file.getvalue().splitlines() == [
        f"epoch {epoch + 1}/3  400/400 batches  6.2 s  64.0 batch/s  train_loss=0.1235 acc={epoch / 4:.4g}"
        for epoch in range(3)
    ]


def test_pipe_has_a_line_every_interval_in_a_long_epoch() -> None:
    file, clock = io.StringIO(), Clock()
    bar, trainer = make_bar(file, clock, line_interval_s=30.0), Trainer(max_epochs=-1)
    bar.setup(trainer, MODULE, "fit")
    train_epoch(bar, trainer, clock, batches=400, batch_s=0.25)
    assert file.getvalue().splitlines() == [
        "epoch 1  batch 120/400  30%  4.0 batch/s  train_loss=0.1235",
        "epoch 1  batch 240/400  60%  4.0 batch/s  train_loss=0.1235",
        "epoch 1  batch 360/400  90%  4.0 batch/s  train_loss=0.1235",
    ]
    assert trainer.metrics_read == 3


def test_lines_keep_their_interval_across_validations() -> None:
    file, clock = io.StringIO(), Clock()
    bar, trainer = make_bar(file, clock), Trainer()
    bar.setup(trainer, MODULE, "fit")
    bar.on_train_epoch_start(trainer, MODULE)
    for index in range(400):
        clock.now += 0.5
        bar.on_train_batch_end(trainer, MODULE, None, None, index)
        if index % 20 == 19:
            validate(bar, trainer, clock, 0.0)
    lines = file.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("epoch 1/3  batch 60/400  15%  2.0 batch/s")


@pytest.mark.parametrize("batches", [7, 0])
def test_pipe_never_gets_control_characters(batches: int) -> None:
    file, clock = io.StringIO(), Clock()
    trainer = Trainer(callback_metrics={"test_loss": torch.tensor(0.25)}, num_training_batches=math.inf)
    bar = make_bar(file, clock)
    fit(bar, trainer, clock, epochs=2, batches=batches, batch_s=20.0)
    evaluate(bar, trainer, clock, "test")
    assert "\r" not in file.getvalue()
    assert "\x1b" not in file.getvalue()
    assert file.getvalue().isascii()


def evaluate(bar: RichProgressBar, trainer: Any, clock: Clock, verb: str, batches: int = 20) -> None:
    bar.setup(trainer, MODULE, verb)
    event = {"validate": "validation"}.get(verb, verb)
    getattr(bar, f"on_{event}_start")(trainer, MODULE)
    for index in range(batches):
        clock.now += 0.25
        getattr(bar, f"on_{event}_batch_end")(trainer, MODULE, None, None, index, 0)
    getattr(bar, f"on_{event}_end")(trainer, MODULE)
    bar.teardown(trainer, MODULE, verb)


@pytest.mark.parametrize(
    ("verb", "line"),
    [
        ("test", "test  20/20 batches  5.0 s  4.0 batch/s  loss=0.25 acc=1\n"),
        ("validate", "validation  20/20 batches  5.0 s  4.0 batch/s  loss=0.25 acc=1\n"),
        ("predict", "predict  20/20 batches  5.0 s  4.0 batch/s\n"),
    ],
)
def test_pipe_has_one_line_for_the_other_verbs(verb: str, line: str) -> None:
    file, clock = io.StringIO(), Clock()
    metrics = {"loss": torch.tensor(0.25), "acc": torch.tensor(1)}
    trainer = Trainer(callback_metrics=metrics, num_val_batches=[15, 5], num_predict_batches=[20])
    evaluate(make_bar(file, clock), trainer, clock, verb)
    assert file.getvalue() == line


def test_force_color_does_not_make_a_pipe_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    clock = Clock()
    fit(make_bar(None, clock), Trainer(), clock, epochs=1, batches=2, batch_s=1.0)
    out = capsys.readouterr().out
    assert out.startswith("epoch 1/3  2/400 batches")
    assert "\x1b" not in out


# a terminal


def screen(file: io.StringIO) -> str:
    return ANSI.sub("", file.getvalue())


def test_terminal_keeps_a_line_for_each_epoch_and_no_bar() -> None:
    file, clock = io.StringIO(), Clock()
    fit(make_bar(file, clock, terminal=True), Trainer(), clock, epochs=3, batches=400, batch_s=1 / 64)
    text = screen(file)
    for epoch in range(3):
        assert (
            f"epoch {epoch + 1}/3  400/400 batches  6.2 s  64.0 batch/s  train_loss=0.1235 acc={epoch / 4:.4g}" in text
        )
    assert "sanity check" in text
    assert "validation" in text
    # The cursor is shown again, and what was drawn last is erased.
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
    assert file.getvalue().endswith("\x1b[1A\x1b[2K")


def test_refreshes_are_bounded_by_time_and_so_is_reading_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[int]] = []
    monkeypatch.setattr(TerminalView, "show", lambda self, bars: shown.append([bar.done for bar in bars]))
    file, clock = io.StringIO(), Clock()
    bar, trainer = make_bar(file, clock, terminal=True, refresh_rate_s=0.125), Trainer()
    bar.setup(trainer, MODULE, "fit")
    train_epoch(bar, trainer, clock, batches=400, batch_s=1 / 128)
    # 400 batches last 3.125 s: one refresh at the start, and one each 0.125 s, which are 16 batches.
    assert shown == [[done] for done in range(0, 401, 16)]
    assert trainer.metrics_read == len(shown)


def test_slow_refreshes_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = Clock(), []

    def slow_show(self: Any, bars: Any) -> None:
        clock.now += 0.05
        shown.append(clock.now)

    monkeypatch.setattr(TerminalView, "show", slow_show)
    bar, trainer = make_bar(io.StringIO(), clock, terminal=True), Trainer(num_training_batches=10_000)
    bar.setup(trainer, MODULE, "fit")
    start = clock.now
    train_epoch(bar, trainer, clock, batches=10_000, batch_s=0.01)
    assert len(shown) > 10
    assert 0.05 * len(shown) / (clock.now - start) < 0.021


def calls_of(function: Any) -> list[str]:
    called: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)
        elif event == "c_call":
            called.append(argument.__name__)

    sys.setprofile(profile)
    function()
    sys.setprofile(None)
    return called[1:-1]  # without the lambda and the last setprofile


@pytest.mark.parametrize("is_global_zero", [True, False])
def test_a_batch_between_refreshes_is_a_counter_and_a_clock(is_global_zero: bool) -> None:
    bar, trainer = RichProgressBar(refresh_rate_s=1000, line_interval_s=1000), Trainer(is_global_zero=is_global_zero)
    bar.setup(trainer, MODULE, "fit")
    bar.on_train_epoch_start(trainer, MODULE)
    calls = calls_of(lambda: bar.on_train_batch_end(trainer, MODULE, None, None, 0))
    assert calls == ["on_train_batch_end", "monotonic"]
    bar.on_validation_start(trainer, MODULE)
    calls = calls_of(lambda: bar.on_validation_batch_end(trainer, MODULE, None, None, 0))
    assert calls == ["on_validation_batch_end", "_count_evaluation", "monotonic"]


def test_validation_has_a_bar_below_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[tuple[str, str]]] = []
    monkeypatch.setattr(TerminalView, "show", lambda self, bars: shown.append([(bar.label, bar.count) for bar in bars]))
    clock, trainer = Clock(), Trainer()
    bar = make_bar(io.StringIO(), clock, terminal=True, refresh_rate_s=1.0)
    bar.setup(trainer, MODULE, "fit")
    train_epoch(bar, trainer, clock, batches=2, batch_s=2.0)
    shown.clear()
    validate(bar, trainer, clock, batch_s=0.25)
    train = ("epoch 1/3", "2/400")
    assert shown[0] == [train, ("validation", "4/15")]
    assert shown[-2] == [train, ("validation", "12/15")]
    assert shown[-1] == [train]


def test_speed_leaves_validation_out() -> None:
    file, clock = io.StringIO(), Clock()
    trainer = Trainer(num_val_batches=[100])
    bar = make_bar(file, clock)
    bar.setup(trainer, MODULE, "fit")
    bar.on_train_epoch_start(trainer, MODULE)
    for index in range(8):
        clock.now += 0.5
        bar.on_train_batch_end(trainer, MODULE, None, None, index)
        validate(bar, trainer, clock, 0.05)
    bar.on_train_epoch_end(trainer, MODULE)
    trainer.run_boundary()
    assert file.getvalue().splitlines()[-1] == "epoch 1/3  8/400 batches  4.0 s  2.0 batch/s  train_loss=0.1235"


def test_an_epoch_continued_in_its_middle_counts_positions_but_not_speed() -> None:
    file, clock, trainer = io.StringIO(), Clock(), Trainer()
    bar = make_bar(file, clock)
    bar.setup(trainer, MODULE, "fit")
    bar.on_train_epoch_start(trainer, MODULE)
    for index in range(300, 400):
        clock.now += 0.5
        bar.on_train_batch_end(trainer, MODULE, None, None, index)
    bar.on_train_epoch_end(trainer, MODULE)
    trainer.run_boundary()
    assert file.getvalue().splitlines()[-1].startswith("epoch 1/3  400/400 batches  50.0 s  2.0 batch/s")


def test_very_short_epochs_share_their_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(TerminalView, "write", lambda self, text: written.append(text))
    clock, trainer = Clock(), Trainer(num_val_batches=[], max_epochs=1000)
    fit(make_bar(io.StringIO(), clock, terminal=True), trainer, clock, epochs=1000, batches=1, batch_s=0.001)
    assert len(written) < 20
    assert [line.split()[1] for text in written for line in text.splitlines()] == [f"{n}/1000" for n in range(1, 1001)]


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_terminal_shows_results_as_a_table(verb: str) -> None:
    file, clock = io.StringIO(), Clock()
    metrics = {"loss/dataloader_idx_0": 0.5, "loss/dataloader_idx_1": 0.25, "acc[top1]": math.nan}
    trainer = Trainer(callback_metrics={name: torch.tensor(value) for name, value in metrics.items()})
    evaluate(make_bar(file, clock, terminal=True), trainer, clock, verb)
    rows = [re.findall(r"[\w.\[\]/ ]+", line) for line in screen(file).splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [["loss", "0.5", "0.25"], ["acc[top1]", "nan"]]
    assert "loader 0" in screen(file)


def test_unknown_totals() -> None:
    file, clock = io.StringIO(), Clock()
    trainer = Trainer(num_training_batches=math.inf, num_val_batches=[math.inf, 3], max_epochs=None)
    bar = make_bar(file, clock, terminal=True)
    bar.setup(trainer, MODULE, "fit")
    train_epoch(bar, trainer, clock, batches=20, batch_s=0.5)
    bar.on_validation_start(trainer, MODULE)
    for index in range(5):
        clock.now += 1
        bar.on_validation_batch_end(trainer, MODULE, None, None, index)
    bar.on_validation_end(trainer, MODULE)
    assert "inf" not in screen(file)
    assert " 20  2.0 batch/s" in screen(file)
    assert bar.total_val_batches == math.inf
    bar.teardown(trainer, MODULE, "fit")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("boom")])
def test_the_terminal_is_left_clean_after_an_error(error: BaseException) -> None:
    file, clock, trainer = io.StringIO(), Clock(), Trainer()
    bar = make_bar(file, clock, terminal=True)
    stdout = sys.stdout
    bar.setup(trainer, MODULE, "fit")
    train_epoch(bar, trainer, clock, batches=120, batch_s=0.25)
    bar.on_exception(trainer, MODULE, error)
    assert sys.stdout is stdout
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
    assert f"epoch 1/3  120/400 batches  30.0 s  4.0 batch/s  {type(error).__name__}" in screen(file)
    closed = file.getvalue()
    bar.teardown(trainer, MODULE, "fit")
    assert file.getvalue() == closed


def test_prints_in_a_real_terminal_do_not_break_the_bar() -> None:
    pty = pytest.importorskip("pty")
    program = """
import sys
from types import SimpleNamespace
from leyden.callbacks import RichProgressBar
trainer = SimpleNamespace(is_global_zero=True, current_epoch=0, max_epochs=1, num_training_batches=3,
                          progress_bar_metrics={}, at_step_boundary=lambda action: action())
bar = RichProgressBar(refresh_rate_s=1e-9)
bar.setup(trainer, None, "fit")
bar.on_train_epoch_start(trainer, None)
for index in range(3):
    bar.on_train_batch_end(trainer, None, None, None, index)
    print("printed", index)
    bar.print("by the bar", index, sep="-")
    print("to stderr", index, file=sys.stderr)
bar.on_train_epoch_end(trainer, None)
bar.on_train_end(trainer, None)
bar.teardown(trainer, None, "fit")
print("the end")
"""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=follower, stderr=subprocess.PIPE, env=environment
    ) as run:
        os.close(follower)
        text = b""
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # how Linux reports the end of a pseudo-terminal
                break
            if not chunk:
                break
            text += chunk
        assert run.stderr is not None
        errors = run.stderr.read()
    os.close(leader)
    assert run.returncode == 0, errors
    # What goes to a file that is no terminal arrives there, not on the screen.
    assert errors.decode().split("\n") == ["to stderr 0", "to stderr 1", "to stderr 2", ""]
    visible = [line for line in replay(text.decode()) if line]
    expected = [line for index in range(3) for line in (f"printed {index}", f"by the bar-{index}")]
    assert visible[:-2] == expected
    assert visible[-2].startswith("epoch 1/1  3/3 batches")
    assert visible[-1] == "the end"


def replay(text: str) -> list[str]:
    """What a terminal shows: line ends, carriage returns, cursor up and erase line."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            padded = lines[row].ljust(column)
            lines[row] = padded[:column] + part + padded[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


# a notebook


class Display:
    """Stands for IPython: a kernel's shell, and `display` with handles that remember what they showed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
        self.texts: list[str] = []
        kernel = type(shell, (), {})()
        ipython, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
        ipython.get_ipython = lambda: kernel  # type: ignore[attr-defined]
        module.display = self.display  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", module)

    def display(self, data: dict[str, str], raw: bool, display_id: bool) -> Display:
        assert display_id
        self.update(data, raw)
        return self

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.texts.append(data["text/plain"])


def test_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    display, clock = Display(monkeypatch, "ZMQInteractiveShell"), Clock()
    trainer = Trainer(max_epochs=1, callback_metrics={"loss": torch.tensor(0.5)})
    bar = make_bar(None, clock)
    fit(bar, trainer, clock, epochs=1, batches=400, batch_s=1 / 64)
    assert any(
        re.fullmatch(r"epoch 1/1  \[#{10}\.{10}\]  20\d/400  .*train_loss=0.1235", text) for text in display.texts
    )
    assert any("\nvalidation  [" in text for text in display.texts)
    assert display.texts[-1] == ""
    evaluate(bar, trainer, clock, "test")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 1/1  400/400 batches")
    assert [line.split() for line in lines[2:]] == [["test", "|", "value"], ["------------"], ["loss", "|", "0.5"]]


@pytest.mark.parametrize(("shell", "expected"), [("ZMQInteractiveShell", True), ("TerminalInteractiveShell", False)])
def test_notebook_detection(monkeypatch: pytest.MonkeyPatch, shell: str, expected: bool) -> None:
    Display(monkeypatch, shell)
    assert in_notebook() is expected
    assert isinstance(choose_view(None, 0.1, 30.0), NotebookView if expected else LineView)


def test_no_notebook_without_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))  # half imported
    assert not in_notebook()


# all of them


@pytest.mark.parametrize("how", ["disabled", "not rank zero", "disabled on the way"])
def test_nothing_is_shown(how: str) -> None:
    file, clock = io.StringIO(), Clock()
    trainer, bar = Trainer(is_global_zero=how != "not rank zero"), make_bar(file, clock)
    if how == "disabled":
        bar.disable()
        assert bar.is_disabled
    if how == "disabled on the way":
        bar.setup(trainer, MODULE, "fit")
        train_epoch(bar, trainer, clock, batches=1, batch_s=0.1)
        bar.disable()
        train_epoch(bar, trainer, clock, batches=400, batch_s=1.0)
        bar.on_train_epoch_end(trainer, MODULE)
        bar.teardown(trainer, MODULE, "fit")
    else:
        fit(bar, trainer, clock, epochs=2, batches=40, batch_s=10.0)
        evaluate(bar, trainer, clock, "test")
    assert file.getvalue() == ""
    assert trainer.metrics_read == 0
    bar.enable()
    assert bar.is_enabled


def test_get_metrics_can_be_overridden() -> None:
    class Renamed(RichProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            return {"loss": super().get_metrics(trainer, pl_module)["train_loss"], "run": "a-7", "epochs": 3}

    file, clock = io.StringIO(), Clock()
    bar = Renamed(console=Console(file=file))
    bar._clock = clock
    fit(bar, Trainer(), clock, epochs=1, batches=1, batch_s=1.0)
    assert file.getvalue().endswith("loss=0.1235 run=a-7 epochs=3\n")


def test_a_bar_of_ones_own() -> None:
    class Own(ProgressBar):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.fraction = (batch_idx + 1) / self.total_train_batches

    bar: Any = Own()
    with pytest.raises(LeydenError, match="no trainer"):
        _ = bar.trainer
    trainer: Any = Trainer()
    bar.setup(trainer, MODULE, "fit")
    bar.on_train_batch_end(trainer, MODULE, None, None, 99)
    assert bar.fraction == 0.25
    assert (bar.total_val_batches, bar.total_test_batches, bar.total_predict_batches) == (15, 20, 6)
    trainer.sanity_checking = True
    assert bar.total_val_batches == 2


def test_refusals() -> None:
    with pytest.raises(ConfigurationError, match="refresh_rate_s=0"):
        RichProgressBar(refresh_rate_s=0)
    with pytest.raises(ConfigurationError, match="line_interval_s=-1"):
        RichProgressBar(line_interval_s=-1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.74, "9.7 s"),
        (59.94, "59.9 s"),
        (59.96, "1:00"),
        (65, "1:05"),
        (3599.6, "1:00:00"),
        (7322, "2:02:02"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bar_text() -> None:
    assert Bar("epoch 1", 3, 12, 0.5, {}).line() == "epoch 1  batch 3/12  25%  2.0 s/batch"
    assert Bar("epoch 1", 3, 12, 0.5, {}).remaining == "18.0 s left"
    assert Bar("epoch 1", 12, 12, 0.5, {}).remaining == ""
    assert Bar("epoch 1", 3, math.inf, None, {"a": 1.0}).line() == "epoch 1  batch 3  a=1"
    assert Bar("test", 0, 0, None, {}).line() == "test  batch 0/0"


def test_results_table_has_a_column_for_each_loader() -> None:
    headings, rows = results_table("test", {"a/dataloader_idx_10": 1.0, "a/dataloader_idx_2": 2.0, "b": 3.0})
    assert headings == ["test", "loader 0", "loader 2", "loader 10"]
    assert rows == [["a", "", "2", "1"], ["b", "3", "", ""]]
