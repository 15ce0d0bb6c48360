"""What the source may not grow into: dependencies that point back, long files, dangerous calls."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "leyden"

# A module may import its own level and those above it in this list, never one below; the longest prefix counts.
# The root package is no level: nothing inside imports it.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "device", "memory", "progress", "seed", "buffers", "account", "device_time", "xla", "shards"),
    (
        "precision",
        "data",
        "metrics",
        "metric_ranks",
        "metrics_state",
        "over_ranks",
        "series",
        "hparams",
        "optimizers",
        "fused",
        "hooks",
        "former",
        "strategy",
        "summary",
        "flops",
        "throughput",
        "settings",
        "callbacks.callback",
        "loggers",
        "profilers",
        "agreement",
        "accelerators",
        "gradients",
        "rank_zero",
        # The file format stands alone: modules and callbacks read files with it. What a run is made of is in state.
        "checkpoint.container",
        "checkpoint.plain",
        "checkpoint.from_plain",
        "checkpoint.format",
        "checkpoint.remote",
        "checkpoint.folder",
        "checkpoint.atomic",
        "checkpoint.store",
        "checkpoint.sharded",
        "checkpoint.snapshot",
        "checkpoint.writer",
        "checkpoint.retention",
    ),
    ("module", "module_hooks", "module_ranks", "datamodule", "callbacks", "export"),
    ("sources", "defaults", "run", "keep_up", "checkpoint", "explain", "compiled", "lifecycle", "planner"),
    ("policies", "halving", "ranks", "checks"),
    ("assemble",),
    ("loop",),
    ("trainer",),
    ("cli", "compat", "tuner", "utilities", "strategies", "plugins", "demos", "core", "__main__"),
)
# Where the engine reaches `leyden.compat`, in functions, for what was written for others; docs/architecture.md says what for.
SEAMS = {
    "trainer.former",
    "assemble",
    "module",
    "hparams",
    "callbacks",
    "callbacks.model_checkpoint",
    "callbacks.callback",
    "datamodule",
    "callbacks.early_stopping",
    "checkpoint.format",
}
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

# Callbacks and loggers see the public Trainer, never its insides.
INSIDES = ("run", "loop", "trainer", "checkpoint.state", "explain", "compat", "cli")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60  # from def to the last line, the docstring not counted

FORBIDDEN_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "subprocess", "pty"}
# `scontrol requeue` puts a preempted SLURM job back into the queue; there is no other way to ask for it.
# Files of torch.save are read with a table of inert names, and written of plain data.
MAY_IMPORT = {"callbacks.preemption": {"subprocess"}, "compat.pickles": {"pickle"}}
MAY_CALL = {"compat.pickles": {"calls torch.save"}}
FORBIDDEN_BUILTINS = {"eval", "exec"}
FORBIDDEN_CALLS = {"os.system", "os.popen", "torch.load", "torch.save", "numpy.load", "joblib.load"}


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name below ``leyden``; the root package is the empty name."""
    modules = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return modules


def is_package(name: str) -> bool:
    return (ROOT.joinpath(*name.split(".")) / "__init__.py").exists() if name else True


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree, but not into the bodies of ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield statement
                yield from runtime_nodes(statement)
            continue
        yield child
        yield from runtime_nodes(child)


def imported_modules(name: str, tree: ast.AST, known: Iterable[str]) -> Iterator[tuple[str, int]]:
    """The modules of leyden that ``name`` imports at runtime, also inside functions, each with its line."""
    for node in runtime_nodes(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        targets = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            package = f"leyden.{name}".rstrip(".")
            if not is_package(name):
                package = package.rpartition(".")[0]
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            targets = [f"{base}.{target}" for target in targets]
        for target in targets:
            if target == "leyden" or target.startswith("leyden."):
                inside = target.removeprefix("leyden").removeprefix(".")
                # `from leyden.errors import warn` names something in a module, `from leyden import errors` a module.
                yield (inside if inside in known else inside.rpartition(".")[0]), node.lineno


def level_of(name: str) -> int | None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        level = LEVEL.get(".".join(parts[:length]))
        if level is not None:
            return level
    return None


def upward_imports(modules: dict[str, ast.Module]) -> list[str]:
    """Every import that points from a lower level to a higher one, in words."""
    found = []
    for name, tree in modules.items():
        if not name:
            continue
        for target, line in imported_modules(name, tree, modules):
            if not target:
                found.append(f"leyden.{name}:{line} imports the root package; import the module that has the name")
                continue
            own, other = level_of(name), level_of(target)
            if name in SEAMS and target.split(".")[0] == "compat":
                continue
            if own is not None and other is not None and other > own:
                found.append(f"leyden.{name}:{line} imports leyden.{target}, which stands above it")
    return found


def qualified(node: ast.expr, aliases: dict[str, str]) -> str:
    """``np.load`` as ``numpy.load``: the dotted name of what is called, with import aliases undone."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{qualified(node.value, aliases)}.{node.attr}"
    return "?"


def dangers(tree: ast.Module, may_import: Iterable[str] = ()) -> Iterator[tuple[int, str]]:
    """Lines that could run code from a file, or start a process; ``may_import`` may be imported, but within functions only."""
    at_import = {id(node) for node in tree.body}
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.ImportFrom) and node.level):
            continue
        base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            if base or alias.asname:
                aliases[alias.asname or alias.name] = base + alias.name
            top = (base + alias.name).split(".")[0]
            if top in FORBIDDEN_MODULES and (top not in may_import or id(node) in at_import):
                yield node.lineno, f"imports {base}{alias.name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = qualified(node.func, aliases)
        if called in FORBIDDEN_CALLS | FORBIDDEN_BUILTINS | {f"builtins.{name}" for name in FORBIDDEN_BUILTINS}:
            yield node.lineno, f"calls {called}"
        if any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords):
            yield node.lineno, f"calls {called} with shell="


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, the docstring not counted: explaining a function does not make it longer."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def test_every_module_has_a_place() -> None:
    homeless = [name for name in sources() if name and level_of(name) is None]
    assert not homeless, f"not in LEVELS of {__file__}: {homeless}. Place each where the modules it imports allow it."


def test_dependencies_point_one_way() -> None:
    assert not (found := upward_imports(sources())), "\n" + "\n".join(found)


def test_no_import_cycles() -> None:
    modules = sources()
    graph = {
        name: {
            target
            for target, _ in imported_modules(name, tree, modules)
            if target and target != name and not (name in SEAMS and target.startswith("compat."))
        }
        for name, tree in modules.items()
        if name
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("modules import each other: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("family", ["callbacks", "loggers"])
def test_callbacks_and_loggers_stay_outside(family: str) -> None:
    modules = sources()
    found = [
        f"leyden.{name}:{line} imports leyden.{target}"
        for name, tree in modules.items()
        if name.split(".")[0] == family
        for target, line in imported_modules(name, tree, modules)
        if any(target == inside or target.startswith(f"{inside}.") for inside in INSIDES)
        and not (name in SEAMS and target.startswith("compat."))
    ]
    assert not found, "\n" + "\n".join(found)


def test_no_folder_called_utils() -> None:
    # leyden.utilities, where people import from, is a façade; a drawer for what has no place is not wanted.
    assert not [path for path in ROOT.rglob("*") if path.stem in {"utils", "util", "helpers", "common", "misc"}]


def test_files_are_short() -> None:
    counts = {path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in ROOT.rglob("*.py")}
    long = [f"{path}: {lines} lines" for path, lines in counts.items() if lines > MAX_FILE_LINES]
    assert not long, f"over {MAX_FILE_LINES} lines; split where there are two reasons to exist:\n" + "\n".join(long)


def test_functions_are_short() -> None:
    long = [
        f"leyden.{name}:{node.lineno} {node.name}: {length(node)} lines"
        for name, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > MAX_FUNCTION_LINES
    ]
    assert not long, f"over {MAX_FUNCTION_LINES} lines:\n" + "\n".join(long)


def test_nothing_dangerous_is_called() -> None:
    found = [
        f"leyden.{name}:{line} {what}"
        for name, tree in sources().items()
        for line, what in dangers(tree, MAY_IMPORT.get(name, ()))
        if what not in MAY_CALL.get(name, ())
    ]
    assert not found, "\n" + "\n".join(found)


# The checks themselves: each finds what it is there to find.


def test_the_level_check_finds_upward_imports() -> None:
    modules = {
        "errors": ast.parse("from leyden.loop import train"),
        "metrics": ast.parse("def f():\n    from leyden import run"),
        "data.loader": ast.parse("from ..trainer import Trainer"),
        "hooks": ast.parse("import leyden"),
        "loop": ast.parse("from leyden.errors import warn\nfrom leyden import run"),
        "optimizers": ast.parse("if TYPE_CHECKING:\n    from leyden.trainer import Trainer"),
        "run": ast.parse(""),
        "trainer": ast.parse(""),
        "data": ast.parse(""),
    }
    found = [line.split(":")[0] for line in upward_imports(modules)]
    assert found == ["leyden.errors", "leyden.metrics", "leyden.data.loader", "leyden.hooks"]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import subprocess as s",
        "eval('1')",
        "exec(code)",
        "import builtins\nbuiltins.eval('1')",
        "import os\nos.system('ls')",
        "import torch as t\nt.load(path)",
        "from torch import load as read\nread(path)",
        "import numpy as np\nnp.load(path)",
        "run(command, shell=True)",
    ],
)
def test_the_danger_check_finds(code: str) -> None:
    assert list(dangers(ast.parse(code)))


@pytest.mark.parametrize("code", ["model.eval()", "import safetensors", "torch.compile(f)", "self.load(path)"])
def test_the_danger_check_lets_pass(code: str) -> None:
    assert not list(dangers(ast.parse(code)))


def test_what_one_file_may_import_is_imported_within_a_function() -> None:
    assert not list(dangers(ast.parse("def f():\n    import subprocess"), {"subprocess"}))
    assert list(dangers(ast.parse("import subprocess"), {"subprocess"}))
    assert list(dangers(ast.parse("def f():\n    import pickle"), {"subprocess"}))
