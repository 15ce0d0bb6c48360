"""docs/clusters.md: its table names the variables that are read, its error is the real one, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from leyden.errors import ConfigurationError
from leyden.strategy.environments import Place, check_place, find_place

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split("| launcher | told by |")[1].split("\n\n")[0].splitlines()[2:]
]


def names(cell: str) -> list[str]:
    return re.findall(r"`([A-Z0-9_]+)`", cell)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_variables_of_each_row_make_a_place(row: list[str]) -> None:
    launcher, told_by, size, rank, local_rank, local_size, node = row
    environment = dict.fromkeys(names(told_by), "1") | {"MASTER_ADDR": "first", "MASTER_PORT": "1234"}
    if launcher == "by hand":
        environment["MASTER_ADDR"] = "localhost"
    for cell, value in ((local_size, "2"), (local_rank, "1"), (size, "4"), (rank, "3")):
        environment.update(dict.fromkeys(names(cell)[:1], value))
    if launcher == "by hand":
        environment["RANK"] = "3"
    if names(node) and launcher not in ("Kubeflow",):
        environment.update(zip(names(node), ("1", "2"), strict=False))
    if launcher == "SLURM":
        environment |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    place = find_place(environment, lambda: False)
    assert place is not None
    own = {
        "one's own launcher": "environment variables",
        "by hand": "environment variables",
        "MPICH, Intel MPI": "MPICH",
    }
    assert place.name == own.get(launcher, launcher)
    expected = {"Kubeflow": (4, 3, 0, 1, 3), "by hand": (4, 3, 3, 4, 0)}.get(
        launcher, (4, 3, 1, 2, 1 if node else None)
    )
    assert (place.world_size, place.rank, place.local_rank, place.local_world_size, place.node_rank) == expected


def test_the_error_is_the_real_one() -> None:
    (shown,) = re.findall(r"leyden\.errors\.ConfigurationError: (.*?)\n```", PAGE, flags=re.DOTALL)
    with pytest.raises(ConfigurationError) as caught:
        check_place(Place("SLURM", 4, 0, 0, "first", 1234, 2, 0, 2, (2, 2)), 4, 2)
    assert str(caught.value) == shown.replace("\n", " ")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "resume.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for anchor in re.findall(r"\]\(resume\.md#([^)]+)\)", PAGE):
        assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
