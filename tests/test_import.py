"""What ``import leyden`` costs beyond torch: no package, no process, no file, a few milliseconds."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest

IMPORT = "import leyden"
# What every program touches at once; the classes are loaded when they are named for the first time.
USE = "import leyden; leyden.Trainer, leyden.LightningModule, leyden.LightningDataModule, leyden.Callback"
MOST_MODULES = 90
"""Of leyden, at once; there are 86, which take about 35 ms on an idle machine. Counted, for time is noise."""


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    # Compiled files may be written, as they are for a user; else each run would measure the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 0, "\n".join(errors)
    return done


def own_times(code: str) -> dict[str, int]:
    """Every module that ``code`` imports, with the microseconds it took without the modules it imports itself."""
    times = {}
    for line in run(code, "-X", "importtime").stderr.splitlines():
        if line.startswith("import time:") and "self [us]" not in line:
            own, _, name = line.removeprefix("import time:").split("|")
            times[name.strip()] = int(own)
    return times


@cache
def torch_packages() -> frozenset[str]:
    return frozenset(name.split(".")[0] for name in own_times("import torch"))


@pytest.mark.parametrize("code", [IMPORT, USE])
def test_import_brings_no_package_beyond_torch(code: str) -> None:
    packages = {name.split(".")[0] for name in own_times(code)} - {"leyden"}
    extra = packages - torch_packages() - sys.stdlib_module_names
    assert not extra, f"imported at start-up, but torch does not need it: {sorted(extra)}. Import it where it is used."


def test_import_loads_few_modules() -> None:
    loaded = {name for name in own_times(USE) if name.split(".")[0] == "leyden"}
    assert len(loaded) <= MOST_MODULES, f"{len(loaded)} modules of leyden are imported at once: {sorted(loaded)}"
    assert not {name for name in loaded if name.startswith("leyden.compiled")}


def test_import_leaves_torchs_compiler_alone() -> None:
    assert "torch._dynamo" not in own_times(USE)  # it takes longer than all of leyden


def test_import_alone_loads_next_to_nothing() -> None:
    own = {name for name in own_times(IMPORT) if name.split(".")[0] == "leyden"}
    assert "leyden.trainer" not in own, f"`import leyden` alone loaded {sorted(own)}"


def test_import_starts_and_writes_nothing() -> None:
    code = f"""
import sys, torch
seen = []
processes = ("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty.", "socket.connect")
def watch(event, arguments):
    if event.startswith(processes):
        seen.append((event, str(arguments)))
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append((event, str(arguments)))
sys.addaudithook(watch)
{USE}
import leyden.callbacks, leyden.loggers
for package in (leyden, leyden.callbacks, leyden.loggers):
    for name in package.__all__:
        getattr(package, name)
print(seen)
"""
    assert run(code, "-B").stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["Trainer", "LightningModule", "LightningDataModule", "Callback"])
def test_names_are_the_classes(name: str) -> None:
    # In a new process, so that the name is the first thing that is asked for.
    assert run(f"import leyden; print(isinstance(leyden.{name}, type), leyden.{name}.__name__)").stdout.split() == [
        "True",
        name,
    ]


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import leyden

    with pytest.raises(AttributeError, match="Trayner"):
        leyden.Trayner  # noqa: B018
