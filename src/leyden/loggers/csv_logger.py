"""Metrics in a CSV file: one row per call, one column per name."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from leyden.errors import reject
from leyden.loggers.logger import Logger, VersionFolder, add_prefix, plain_hyperparams, scalar, write_hyperparams


class MetricsFile:
    """A CSV file that rows are appended to, and that is rewritten, whole or not at all, for a new column.

    An existing file is continued: its header is read, and a last line without a line end, which a killed
    process leaves behind, is dropped. The file is open only while it is written.

    Args:
        path: the file; its folder is made with the first row.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._columns: list[str] | None = None
        self._row_count = 0
        self._last_row: dict[str, str] = {}

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; cells of columns that a row does not have stay empty."""
        if self._columns is None:
            self._columns = self._continue()
        if not rows:
            return
        known = set(self._columns)
        new = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in known]
        if new:
            self._widen(self._columns, [*self._columns, *new])
            self._columns = [*self._columns, *new]
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
        self._row_count += len(rows)
        self._last_row = {name: str(cell) for name, cell in rows[-1].items()}

    def state_dict(self) -> dict[str, Any]:
        """Return how many rows the file has, and the last of them, by which the file is known again."""
        if self._columns is None and os.path.exists(self.path):
            self._columns = self._continue()
        return {"path": os.path.abspath(self.path), "rows": self._row_count, "last": dict(self._last_row)}

    def cut(self, global_step: int, state: Mapping[str, Any]) -> None:
        """Drop the rows that came after a checkpoint, and the columns that only they had.

        Args:
            global_step: of the checkpoint. Decides where ``state`` is not that of this file: rows of later steps are dropped.
            state: what `state_dict` returned at the checkpoint.
        """
        if not os.path.exists(self.path):
            return
        self._drop_torn_line()
        with open(self.path, encoding="utf-8", newline="") as file:
            columns, *rows = list(csv.reader(file)) or [[]]
        count = state.get("rows", 0)
        if count:
            known = count <= len(rows) and _cells(columns, rows[count - 1]) == state.get("last")
        else:
            known = state.get("path") == os.path.abspath(self.path)
        kept = [_cells(columns, row) for row in rows]
        kept = kept[:count] if known else [row for row in kept if not _is_later(row, global_step)]
        names = {name for row in kept for name in row}
        used = [name for name in columns if name in names]
        if len(kept) < len(rows) or len(used) < len(columns):
            self._replace([used, *([row.get(name, "") for name in used] for row in kept)] if used else [])
        self._columns, self._row_count, self._last_row = used, len(kept), kept[-1] if kept else {}

    def _continue(self) -> list[str]:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        if not os.path.exists(self.path):
            return []
        self._drop_torn_line()
        with open(self.path, encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            columns = next(rows, [])
            last: list[str] = []
            for row in rows:
                last, self._row_count = row, self._row_count + 1
            self._last_row = _cells(columns, last)
            return columns

    def _drop_torn_line(self) -> None:
        with open(self.path, "rb+") as binary:
            binary.truncate(_end_of_last_line(binary))

    def _widen(self, old: list[str], new: list[str]) -> None:
        missing = [""] * (len(new) - len(old))
        if not old:
            self._replace([new])
            return
        with open(self.path, encoding="utf-8", newline="") as source:
            rows = csv.reader(source)
            next(rows)
            self._replace(itertools.chain([new], ([*row, *missing] for row in rows)))

    def _replace(self, rows: Iterable[Sequence[str]]) -> None:
        """Write the file anew, whole or not at all."""
        temporary = f"{self.path}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8", newline="") as target:
            csv.writer(target, lineterminator="\n").writerows(rows)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, self.path)


def _cells(columns: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    return {name: cell for name, cell in zip(columns, row, strict=False) if cell}


def _is_later(row: Mapping[str, str], global_step: int) -> bool:
    try:
        return int(row["step"]) > global_step
    except (KeyError, ValueError):  # not written here
        return False


def _end_of_last_line(file: io.BufferedRandom) -> int:
    """The position after the last line end: the size of a file that was written whole."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


class CSVLogger(Logger):
    """Writes ``<save_dir>/<name>/version_N/metrics.csv`` and ``hparams.yaml``.

    Each call of `log_metrics` is one row, with a ``step`` column; what a row does not have is an empty cell.
    Rows are appended, some at a time. When a name appears for the first time the file is rewritten with the
    wider header, and replaced in one go.

    To continue the file of an earlier run, pass its ``version``: rows are then appended to what is there, after what came
    later than the checkpoint that `fit` goes on from is dropped.

    Args:
        save_dir: the folder below which all experiments lie.
        name: the experiment, a folder in ``save_dir``.
        version: a number N for ``version_N``, a folder name, or ``None`` for the next free number, which is
            picked at first use.
        prefix: put before every name, with a dash.
        flush_logs_every_n_steps: rows go to the file after this many steps, or this many rows.

    Raises:
        ConfigurationError: if ``flush_logs_every_n_steps`` is less than 1.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        if flush_logs_every_n_steps < 1:
            reject("flush_logs_every_n_steps", flush_logs_every_n_steps, "an integer from 1 up, in optimizer steps")
        self._folder = VersionFolder(save_dir, name, version)
        self._name = name or ""
        self._prefix = prefix
        self._flush_every_n_steps = flush_logs_every_n_steps
        self._rows: list[dict[str, Any]] = []
        self._row_count = 0
        self._hparams: dict[str, Any] = {}
        self._file: MetricsFile | None = None
        self._silent = False

    @property
    def name(self) -> str:
        """The experiment, a folder in `save_dir`."""
        return self._name

    @property
    def version(self) -> int | str:
        """The version; where it was left open, reading it takes the next free number and makes the folder."""
        return self._folder.version

    @property
    def save_dir(self) -> str:
        """The folder below which all experiments lie."""
        return self._folder.save_dir

    @property
    def root_dir(self) -> str:
        """The folder of the experiment, in which the versions lie."""
        return self._folder.root_dir

    @property
    def log_dir(self) -> str:
        """The folder of this version; reading it picks the version."""
        return self._folder.path

    @property
    def experiment(self) -> MetricsFile:
        """The file that rows are appended to."""
        if self._file is None:
            self._file = MetricsFile(os.path.join(self.log_dir, "metrics.csv"))
        return self._file

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add one row.

        Args:
            metrics: numbers, or tensors of one element, by name.
            step: number of optimizer steps done; ``None`` counts the rows of this logger.

        Raises:
            ConfigurationError: if a value is not one number.
        """
        if self._silent:
            return
        cells = {name: _cell(name, value) for name, value in metrics.items()}
        named_step = cells.pop("step", self._row_count)
        # The step column comes first in a new file.
        self._rows.append({"step": named_step if step is None else step, **add_prefix(cells, self._prefix)})
        self._row_count += 1
        steps_waiting = self._rows[-1]["step"] - self._rows[0]["step"]
        if max(len(self._rows), steps_waiting) >= self._flush_every_n_steps:
            self.save()

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Add to the hyperparameters and write them; metrics become a row at step 0.

        Args:
            params: anything nested; what is not plain data is written as text.
            metrics: numbers by name.
        """
        if self._silent:
            return
        plain = plain_hyperparams(params)
        if plain:
            self._hparams.update(plain)
            write_hyperparams(self._hparams, self.log_dir)
        if metrics:
            self.log_metrics(metrics, step=0)

    def save(self) -> None:
        """Append the rows that wait."""
        if self._rows:
            self.experiment.append(self._rows)
            self._rows = []

    def state_dict(self) -> dict[str, Any]:
        """Bring everything logged so far to the file; return how many rows that are."""
        if self._silent:
            return {}
        self.save()
        written = self.experiment.state_dict() if self._folder.is_picked else {}
        return {"logged": self._row_count, "file": written}

    def resume_from(self, global_step: int, state: Mapping[str, Any]) -> None:
        """Drop the rows that an earlier process wrote to this version's file after the checkpoint.

        The file is then what it was at the checkpoint, and what is logged from here on makes it the one that an undisturbed run
        would have written. If it is another file than that of ``state``, rows of steps after ``global_step`` are dropped.
        """
        if self._silent or not self._folder.is_picked:
            return
        self.save()
        self.experiment.cut(global_step, state.get("file", {}))
        self._row_count = state.get("logged", self._row_count)

    def adopt_version(self, version: int | str | None) -> None:
        """Be a silent copy of rank zero's logger: take its version, and write nothing from here on."""
        self._silent = True
        self._folder.give_back()
        if version is not None:
            self._folder.set_version(version)


def _cell(name: str, value: Any) -> float | int:
    number = scalar(name, value)
    # A reader expects 3, not 3.0, as the epoch.
    return int(number) if name in ("epoch", "step") and float(number).is_integer() else number
