"""Where progress is shown: a live display in a terminal or a notebook, plain lines in a pipe or a file."""

from __future__ import annotations

import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from leyden.summary import text_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_BAR_CELLS = 20
_DATALOADER = re.compile(r"(.+)/dataloader_idx_(\d+)")

MetricValue = float | int | str


@dataclass(frozen=True)
class Bar:
    """How far one pass over the data is, at one moment.

    Attributes:
        label: what is being done, such as ``epoch 3/10``.
        done: number of batches done.
        total: number of batches there will be, ``inf`` if nobody knows.
        batches_per_s: speed, ``None`` before anything was measured.
        metrics: values to show, by name.
    """

    label: str
    done: int
    total: float
    batches_per_s: float | None
    metrics: Mapping[str, MetricValue]

    @property
    def count(self) -> str:
        """``120/400``, or ``120`` if the total is unknown."""
        return f"{self.done}/{self.total:.0f}" if math.isfinite(self.total) else str(self.done)

    @property
    def percentage(self) -> str:
        """``30%``, or nothing if the total is unknown."""
        return f"{self.done / self.total:.0%}" if 0 < self.total < math.inf else ""

    @property
    def speed(self) -> str:
        """``41.2 batch/s``, or seconds where a batch takes longer than one."""
        rate = self.batches_per_s
        if not rate:
            return ""
        return f"{rate:.1f} batch/s" if rate >= 1 else f"{1 / rate:.1f} s/batch"

    @property
    def remaining(self) -> str:
        """``1:05 left``, or nothing if it cannot be told."""
        if not self.batches_per_s or not self.done < self.total < math.inf:
            return ""
        return f"{duration((self.total - self.done) / self.batches_per_s)} left"

    def line(self) -> str:
        """The bar as plain text without a bar."""
        parts = [self.label, f"batch {self.count}", self.percentage, self.speed, metrics_text(self.metrics)]
        return "  ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """``9.7 s`` below a minute, then ``m:ss`` and ``h:mm:ss``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}" if hours else f"{minutes}:{whole_seconds:02}"


def metrics_text(metrics: Mapping[str, MetricValue]) -> str:
    """``train_loss=0.1234 lr=0.001``: four significant digits."""
    return " ".join(f"{name}={metric_text(value)}" for name, value in metrics.items())


def metric_text(value: MetricValue) -> str:
    """A number with four significant digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def results_table(title: str, metrics: Mapping[str, MetricValue]) -> tuple[list[str], list[list[str]]]:
    """Lay out results: a row for each metric, a column for each loader that it was computed on.

    Args:
        title: the heading of the column of names.
        metrics: values by name; a name may end in ``/dataloader_idx_N``.

    Returns:
        The headings, and the rows below them.
    """
    values: dict[str, dict[int, str]] = {}
    loaders: set[int] = set()
    for name, value in metrics.items():
        match = _DATALOADER.fullmatch(name)
        base, loader = (match[1], int(match[2])) if match else (name, 0)
        values.setdefault(base, {})[loader] = metric_text(value)
        loaders.add(loader)
    order = sorted(loaders)
    headings = [title, *(f"loader {loader}" for loader in order)] if len(order) > 1 else [title, "value"]
    return headings, [[base, *(by_loader.get(loader, "") for loader in order)] for base, by_loader in values.items()]


class View(ABC):
    """One surface on which progress is shown.

    Attributes:
        interval_s: seconds between two calls of `show` that are worthwhile.
        is_live: whether `show` replaces what it showed before.
    """

    interval_s: float
    is_live: bool

    @abstractmethod
    def show(self, bars: Sequence[Bar]) -> None:
        """Show where things stand; the last bar is what is being done right now."""

    @abstractmethod
    def write(self, text: str) -> None:
        """Write text that stays."""

    @abstractmethod
    def results(self, line: str, title: str, metrics: Mapping[str, MetricValue]) -> None:
        """Show the results of a validation or a test.

        Args:
            line: what was done, and how fast.
            title: the name of the verb.
            metrics: values by name.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the surface as it was found, apart from what was written."""


class LineView(View):
    """Plain lines for a pipe or a file: no control characters, nothing that is overwritten.

    Args:
        file: where to write; ``None`` for what ``sys.stdout`` is at that moment.
        interval_s: seconds between two lines within an epoch.
    """

    is_live = False

    def __init__(self, file: IO[str] | None, interval_s: float) -> None:
        self.interval_s = interval_s
        self._file = file

    def show(self, bars: Sequence[Bar]) -> None:
        """Write one line for what is being done right now."""
        if bars:
            self.write(bars[-1].line())

    def write(self, text: str) -> None:
        """Write a line, at once: whoever reads the other end of the pipe is waiting."""
        file = sys.stdout if self._file is None else self._file
        file.write(text + "\n")
        file.flush()

    def results(self, line: str, title: str, metrics: Mapping[str, MetricValue]) -> None:
        """Write one line with all metrics, which `grep` finds whole."""
        self.write("  ".join(part for part in (line, metrics_text(metrics)) if part))

    def close(self) -> None:
        """Nothing is held."""


class TerminalView(View):
    """Bars at the bottom of a terminal, drawn by rich; what is written scrolls by above them.

    Args:
        console: the terminal; ``None`` for the standard output.
        interval_s: seconds between two refreshes.
    """

    is_live = True

    def __init__(self, console: Console | None, interval_s: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.interval_s = interval_s
        self._console = Console() if console is None else console
        # Without a thread of its own, rich works only when it is told to. Labels and metrics are no markup.
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=_BAR_CELLS),
            TextColumn("{task.fields[text]}", markup=False),
            console=self._console,
            auto_refresh=False,
            transient=True,
            # What is printed goes above the bars, unless it goes to a file: then it must arrive there.
            redirect_stdout=_is_terminal(sys.stdout),
            redirect_stderr=_is_terminal(sys.stderr),
        )
        self._tasks: list[TaskID] = []
        self._is_started = False

    def show(self, bars: Sequence[Bar]) -> None:
        """Draw the bars, one below the other."""
        progress = self._progress
        while len(self._tasks) > len(bars):
            progress.remove_task(self._tasks.pop())
        for index, bar in enumerate(bars):
            total = bar.total if math.isfinite(bar.total) else None
            parts = [bar.count, bar.speed, bar.remaining, metrics_text(bar.metrics)]
            text = "  ".join(part for part in parts if part)
            if index == len(self._tasks):
                self._tasks.append(progress.add_task(bar.label, total=total, completed=bar.done, text=text))
            else:
                # `update` takes None for no change, not for a total that nobody knows.
                progress.tasks[index].total = total
                progress.update(self._tasks[index], description=bar.label, completed=bar.done, text=text)
        if not self._is_started:
            self._is_started = True
            progress.start()
        progress.refresh()

    def write(self, text: str) -> None:
        """Write text above the bars."""
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def results(self, line: str, title: str, metrics: Mapping[str, MetricValue]) -> None:
        """Write the line, and the metrics as a table."""
        from rich.table import Table
        from rich.text import Text

        self.write(line)
        if metrics:
            headings, rows = results_table(title, metrics)
            table = Table(show_header=True, header_style="bold")
            for index, heading in enumerate(headings):
                table.add_column(heading, justify="right" if index else "left", overflow="fold")
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            self._console.print(table)

    def close(self) -> None:
        """Remove the bars and give the cursor and the standard streams back."""
        if self._is_started:
            self._is_started = False
            self._progress.stop()
        while self._tasks:
            self._progress.remove_task(self._tasks.pop())


class NotebookView(View):
    """An output of a notebook cell that is updated in place; what is written stays in the cell below it.

    Args:
        interval_s: seconds between two refreshes.
    """

    is_live = True

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self._handle: Any = None

    def show(self, bars: Sequence[Bar]) -> None:
        """Replace the shown bars."""
        self._update("\n".join(_text_bar(bar) for bar in bars))

    def write(self, text: str) -> None:
        """Print below the bars."""
        print(text)

    def results(self, line: str, title: str, metrics: Mapping[str, MetricValue]) -> None:
        """Print the line, and the metrics as a table."""
        print(line)
        if metrics:
            print("\n".join(text_table(*results_table(title, metrics))))

    def close(self) -> None:
        """Empty the output."""
        if self._handle is not None:
            self._update("")
            self._handle = None

    def _update(self, text: str) -> None:
        from IPython.display import display

        data = {"text/plain": text}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


def _text_bar(bar: Bar) -> str:
    filled = min(_BAR_CELLS, int(_BAR_CELLS * bar.done / bar.total)) if 0 < bar.total < math.inf else 0
    drawn = "[" + "#" * filled + "." * (_BAR_CELLS - filled) + "]" if math.isfinite(bar.total) else ""
    parts = [bar.label, drawn, bar.count, bar.speed, bar.remaining, metrics_text(bar.metrics)]
    return "  ".join(part for part in parts if part)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; imports nothing to find out."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if get_ipython is not None else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


def _is_terminal(stream: object) -> bool:
    # What people put in the place of sys.stdout is not always a whole file.
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty())


def choose_view(console: Console | None, refresh_rate_s: float, line_interval_s: float) -> View:
    """Pick the surface: a given console, else a notebook, else a terminal, else plain lines.

    Args:
        console: a rich console, or ``None`` for the standard output.
        refresh_rate_s: seconds between two refreshes of a live display.
        line_interval_s: seconds between two lines within an epoch.
    """
    if console is not None:
        is_terminal = console.is_terminal and not console.is_dumb_terminal
        return TerminalView(console, refresh_rate_s) if is_terminal else LineView(console.file, line_interval_s)
    if in_notebook():
        return NotebookView(refresh_rate_s)
    # Not rich's own test, which takes a pipe for a terminal where FORCE_COLOR is set, as in many CI systems.
    if _is_terminal(sys.stdout):
        from rich.console import Console

        terminal = Console()
        if not terminal.is_dumb_terminal:
            return TerminalView(terminal, refresh_rate_s)
    return LineView(None, line_interval_s)
