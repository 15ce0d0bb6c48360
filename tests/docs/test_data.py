"""docs/data.md: its program runs, and its tables say what is gathered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate

from leyden.data.gather import gathering

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_program_goes_on_after_the_fifth_batch(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(block, names)
    assert len(names["rest"]) == 8
    whole = list(names["DataLoader"](names["dataset"], 8, shuffle=True, generator=torch.Generator().manual_seed(0)))
    for expected, found in zip(whole[5:], names["rest"], strict=True):
        assert torch.equal(expected[0], found[0])


TENSORS = TensorDataset(torch.zeros(4, 2), torch.zeros(4))
ROWS = {
    "`TensorDataset`": TENSORS,
    "a tensor as": TENSORS.tensors[0],
    "`Subset`": Subset(Subset(TENSORS, range(3)), [1, 2]),
    "`ConcatDataset`": ConcatDataset([TENSORS, TENSORS]),
    "tensors on another": torch.zeros(3, requires_grad=True),
    "tensors of five": torch.zeros(3, 2, 2, 2, 2).transpose(1, 3),
    "any dataset": type("Own", (TensorDataset,), {"__getitem__": lambda self, index: index})(torch.zeros(3)),
    "lists of tensors": [torch.zeros(2)],
}


def test_every_row_is_looked_at() -> None:
    rows = PAGE.split("gathered? |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(rows) == len(ROWS)


@pytest.mark.parametrize("beginning", ROWS)
def test_what_the_table_says_is_gathered_is(beginning: str) -> None:
    (line,) = re.findall(rf"^\| {re.escape(beginning)}.*$", PAGE, flags=re.MULTILINE)
    assert line.split("|")[2].strip().startswith(("yes", "no"))

    def one_by_one(indices: Any) -> Any:
        raise AssertionError

    gathered = gathering(ROWS[beginning], default_collate, one_by_one) is not one_by_one
    assert gathered is line.split("|")[2].strip().startswith("yes")
