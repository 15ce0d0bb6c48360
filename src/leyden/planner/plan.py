"""What a plan says, and how it is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from leyden.summary import text_table

GIB = 2**30


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds and sends, all in bytes; of the rank that has most, where they differ.

    Attributes:
        strategy: "single", "ddp", "fsdp" or "tensor_parallel".
        world_size: number of ranks.
        parameters: parameters and buffers that stay: FSDP's and tensor parallelism's shards, else all of them.
        gradients: what stays of them at the end of the backward pass.
        optimizer_state: of all optimizers; None if they could not be stepped.
        casts: copies of weights in a lower precision, at most, that autocast makes and keeps for the backward pass.
        activations: the batch, activations, and what passes, at most at one time; None if no step could be traced.
        buffers: what sharing costs, at most at one time: DDP's buckets where they are not the gradients themselves; what FSDP
            gathers, and gradients before they are reduced.
        total: the fullest moment of a step. Gradients come while activations go, so this is less than the sum.
        communication: sent by this rank in a step, and as much received; None if it depends on activations that were not traced.
        seconds: of communication, if there were no computation to hide it behind; None without a bandwidth.
        fits: whether the total and the reserve fit into the device's memory; None if that or a part of the total is not known.
    """

    strategy: str
    world_size: int
    parameters: int
    gradients: int
    optimizer_state: int | None
    casts: int
    activations: int | None
    buffers: int
    total: int
    communication: int | None
    seconds: float | None = None
    fits: bool | None = None


@dataclass(frozen=True, repr=False)
class MemoryPlan:
    """What `plan_memory` found. ``str(plan)`` is a plain table in GiB (2^30 bytes); rich prints a coloured one.

    Attributes:
        title: model, size, precision, optimizer.
        rows: one for each strategy and world size.
        notes: what was assumed, and what is not counted.
        flops: floating point operations of one rank's step without dividing layers, forward and backward; None if untraced.
        columns: names of the layers that tensor parallelism divides by columns.
        row_wise: names of those that it divides by rows.
        device_memory_gib: of one device; None if it was not given.
    """

    title: str
    rows: list[RankPlan]
    notes: list[str]
    flops: int | None
    columns: list[str]
    row_wise: list[str]
    device_memory_gib: float | None = None

    def row(self, strategy: str, world_size: int | None = None) -> RankPlan:
        """The row of a strategy; with several world sizes, of the one given.

        Raises:
            KeyError: if there is none.
        """
        for row in self.rows:
            if row.strategy == strategy and world_size in (None, row.world_size):
                return row
        raise KeyError(
            f"{strategy} on {world_size} ranks; there are {[(row.strategy, row.world_size) for row in self.rows]}"
        )

    def headings(self) -> list[str]:
        """Of the table: those columns that say something in this plan."""
        return [name for name, _ in self._columns()]

    def cells(self) -> list[list[str]]:
        """The rows as text, below `headings`."""
        return [[text(row) for _, text in self._columns()] for row in self.rows]

    def _columns(self) -> list[tuple[str, Callable[[RankPlan], str]]]:
        columns: list[tuple[str, Callable[[RankPlan], str]]] = [
            ("strategy", lambda row: row.strategy),
            ("ranks", lambda row: str(row.world_size)),
            ("parameters", lambda row: gib(row.parameters)),
            ("gradients", lambda row: gib(row.gradients)),
            ("optimizer", lambda row: gib(row.optimizer_state)),
            ("casts", lambda row: gib(row.casts)),
            ("activations", lambda row: gib(row.activations)),
            ("buffers", lambda row: gib(row.buffers)),
            ("peak", lambda row: ("" if _is_whole(row) else ">") + gib(row.total)),
            ("fits", lambda row: {True: "yes", False: "no", None: "?"}[row.fits]),
            ("sent", lambda row: gib(row.communication)),
            ("seconds", lambda row: "-" if row.seconds is None else f"{row.seconds:.3f}"),
        ]
        left = set()
        if self.device_memory_gib is None:
            left.add("fits")
        if all(row.seconds is None for row in self.rows):
            left.add("seconds")
        if not any(row.casts for row in self.rows):
            left.add("casts")
        return [(name, text) for name, text in columns if name not in left]

    def __str__(self) -> str:
        table = text_table(self.headings(), self.cells())
        return "\n".join([f"{self.title}; GiB per rank", *table, *self.notes])

    def __repr__(self) -> str:
        return f"<MemoryPlan of {len(self.rows)} rows: {self.title}>"

    def __rich__(self) -> Any:
        """Give rich its table."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.title}; GiB per rank", title_justify="left")
        for name in self.headings():
            table.add_column(name, justify="left" if name in ("strategy", "fits") else "right")
        for row, cells in zip(self.rows, self.cells(), strict=True):
            table.add_row(*cells, style="red" if row.fits is False else None)
        return Group(table, *(Text(note) for note in self.notes))


def _is_whole(row: RankPlan) -> bool:
    return row.activations is not None and row.optimizer_state is not None


def gib(count: int | None) -> str:
    """Bytes as GiB: three decimals below 10, else one; ``-`` for None."""
    if count is None:
        return "-"
    value = count / GIB
    if 0 < value < 0.0005:
        return "<0.001"
    return f"{value:,.1f}" if value >= 9.9995 else f"{value:.3f}" if count else "0"
