"""Prints a table of the module's layers when fit begins."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from leyden.callbacks.callback import Callback
from leyden.errors import reject
from leyden.summary import ModelSummary as Summary
from leyden.summary import summarize

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer


class ModelSummary(Callback):
    """Prints the module's layers, parameters and, with an ``example_input_array``, sizes and operations.

    It is printed once, by rank zero, when `fit` begins: as a styled table in a terminal, else as plain text.

    Args:
        max_depth: how many levels of submodules have a row; 0 for totals only, -1 for all.

    Raises:
        ConfigurationError: if ``max_depth`` is below -1.
    """

    def __init__(self, max_depth: int = 1) -> None:
        if max_depth < -1:
            reject("max_depth", max_depth, "-1 for all levels, 0 for totals only, or a number of levels")
        self.max_depth = max_depth

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        if not trainer.is_global_zero:
            return
        summary = summarize(pl_module, self.max_depth)
        if sys.stdout.isatty():
            _print_rich(summary)
        else:
            print(summary, flush=True)


def _print_rich(summary: Summary) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if summary.rows:
        table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for heading in summary.columns():
            table.add_column(heading, justify="right" if heading in ("Params", "FLOPs") else "left", overflow="fold")
        for cells in summary.cells():
            # As markup, the brackets of a shape would be a style.
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
    totals = Table.grid(padding=(0, 2))
    for figure, what in summary.totals():
        totals.add_row(figure, what)
    console.print(totals)
