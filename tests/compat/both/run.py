"""Run the programs of this folder under one of the two packages, in this process, and write down what they return.

    python run.py lightning|leyden RESULTS.json FOLDER [PROGRAM …]

Each program is a file that imports ``lightning``. For leyden the names are replaced as its text is read, and nothing else is.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ((r"\blightning\.pytorch\b", "leyden"), (r"\bimport lightning\b", "import leyden"))


class Renamed(SourceFileLoader):
    """Reads a program with the one package's name in place of the other's."""

    def get_data(self, path: str) -> bytes:
        text = Path(path).read_text()
        for lightning, leyden in NAMES:
            text = re.sub(lightning, leyden, text)
        return text.encode()

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)  # a cached one would be under the other name


class Programs(MetaPathFinder):
    """Finds the files of this folder, for one of the packages."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        file = HERE / f"{fullname}.py"
        if not file.exists():
            return None
        loader = Renamed(fullname, str(file)) if self.package == "leyden" else None
        return spec_from_file_location(fullname, file, loader=loader)


def plain(value: Any) -> Any:
    """The same as lists, dicts, numbers and texts, as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, Path):
        return value.as_posix()
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def main(package: str, results: Path, folder: Path, names: list[str]) -> None:
    """Run the programs, one after the other; what one raises is its result."""
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    sys.meta_path.insert(0, Programs(package))
    import torch

    torch.set_num_threads(1)
    importlib.import_module(package)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    for name in names or sorted(file.stem for file in HERE.glob("p[0-9][0-9]_*.py")):
        (folder / name).mkdir(parents=True)
        start = time.perf_counter()
        try:
            found[name] = plain(importlib.import_module(name).main(folder / name))
        except Exception:  # noqa: BLE001 - what a program raises is its result
            found[name] = {"raised": traceback.format_exc()}
        print(f"{package} {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    if package == "leyden":
        assert "lightning" not in sys.modules, "a program under leyden has imported lightning"
    results.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
