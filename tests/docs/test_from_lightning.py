"""docs/from_lightning.md names what there is: every former spelling of its table is known, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from leyden.compat.arguments import FORMER_NAMES
from leyden.hooks import FORMER_MODULE_HOOKS
from leyden.module import LightningModule

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "from_lightning.md").read_text(encoding="utf-8")
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def former() -> set[str]:
    """The names in the left column of the table of 2020."""
    table = PAGE.split("## Code of 2020")[1].split("The meaning is that of then")[0]
    rows = re.findall(r"^\| (`.*?) \| ", table, flags=re.MULTILINE)
    written = [code for row in rows for code in re.findall(r"`([^`]+)`", row)]
    names = {re.split(r"[(=]", code.removeprefix("Trainer(").removeprefix("self."))[0].strip(" @") for code in written}
    return names | {name for code in written if code.startswith("Trainer(") for name in re.findall(r"(\w+)=", code)}


def test_every_former_spelling_of_the_table_is_known() -> None:
    elsewhere = {
        "accumulate_grad_batches",  # a name of today with a value of then
        'return {"loss": loss, "log": {…}, "progress_bar": {…}}',
        "pl.data_loader",
        "hparams",
    }
    known = {*FORMER_NAMES, *FORMER_MODULE_HOOKS, *dir(LightningModule), *elsewhere}
    assert len(former()) > 25
    assert former() <= known, former() - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    own = [link for link in links if not link.startswith(("http:", "https:", "mailto:"))]
    assert [link for link in own if not (page.parent / link).exists()] == []
