"""What is read of a file before anything is rewritten: what its names mean, what variables hold, which classes are ours."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import libcst as cst
from libcst.metadata import (
    MetadataWrapper,
    ParentNodeProvider,
    PositionProvider,
    QualifiedNameProvider,
    QualifiedNameSource,
    Scope,
    ScopeProvider,
)

from leyden.compat.migrate.names import below_root, is_ours, place

TRAINERS = {"leyden.Trainer", "leyden.trainer.Trainer"}
KINDS = {
    "LightningModule": "module",
    "LightningDataModule": "data",
    "Callback": "callback",
}
UNKNOWN = object()
"""What `literal` returns for an expression whose value only a run could tell."""

Key = tuple[Scope, str]
Base = tuple[str | None, str]
"""Of a class that another one derives from: its kind if it is ours, else its name."""


def code(node: cst.CSTNode) -> str:
    """The text of a node."""
    return cst.Module([]).code_for_node(node)


def literal(node: cst.BaseExpression) -> Any:
    """The value of a literal: numbers, strings, None, lists, dicts; else `UNKNOWN`."""
    try:
        return ast.literal_eval(code(node))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return UNKNOWN


def dotted(node: cst.CSTNode | None) -> str | None:
    """``a.b.c`` of a chain of names; None for any other expression."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute):
        before = dotted(node.value)
        return None if before is None else f"{before}.{node.attr.value}"
    return None


def is_method_of_super(function: cst.BaseExpression) -> bool:
    """Whether this is ``super().name`` or ``super(A, self).name``."""
    return (
        isinstance(function, cst.Attribute)
        and isinstance(function.value, cst.Call)
        and dotted(function.value.func) == "super"
    )


class Facts(cst.CSTVisitor):
    """Reads a module once.

    Args:
        wrapper: the module with its metadata.
        known: kinds of classes that other files of the same code base define, by name.
    """

    def __init__(self, wrapper: MetadataWrapper, known: Mapping[str, str]) -> None:
        super().__init__()
        self.scopes: Mapping[cst.CSTNode, Scope | None] = wrapper.resolve(ScopeProvider)
        self.positions: Mapping[cst.CSTNode, Any] = wrapper.resolve(PositionProvider)
        self.parents: Mapping[cst.CSTNode, cst.CSTNode] = wrapper.resolve(ParentNodeProvider)
        self._qualified: Mapping[cst.CSTNode, Any] = wrapper.resolve(QualifiedNameProvider)
        self._known = known
        self.values: defaultdict[Key, list[cst.BaseExpression]] = defaultdict(list)
        self.method_calls: defaultdict[Key, list[cst.Call]] = defaultdict(list)
        self.classes: dict[str, str] = {}
        self.bases: dict[str, list[Base]] = {}
        self.relevant = False
        wrapper.module.visit(self)

    def line(self, node: cst.CSTNode) -> int:
        """The line on which a node begins, from 1."""
        line: int = self.positions[node].start.line
        return line

    # What names mean

    def path(self, node: cst.CSTNode) -> str | None:
        """The dotted name that an expression refers to by imports, as it was imported; None for what is not imported."""
        found = self._qualified.get(node) or ()
        found = found() if callable(found) else found
        imported = sorted(each.name for each in found if each.source is QualifiedNameSource.IMPORT)
        return imported[0] if imported else None

    def imported_only(self, node: cst.CSTNode) -> set[str]:
        """All dotted names that an expression may refer to; empty if one of them is not imported."""
        found = self._qualified.get(node) or ()
        found = found() if callable(found) else found
        return (
            {each.name for each in found} if all(each.source is QualifiedNameSource.IMPORT for each in found) else set()
        )

    def meaning(self, node: cst.CSTNode) -> str | None:
        """The dotted name in leyden, as in ``leyden.callbacks.EarlyStopping``; None for what is not ours."""
        path = self.path(node)
        split = below_root(path) if path is not None else None
        if path is None or split is None:
            return None
        found = place(path)
        if found is None:
            return path
        where, covered = found
        return ".".join([where.path, *path.split(".")[covered:]])

    def is_trainer(self, node: cst.BaseExpression) -> bool:
        """Whether an expression is a Trainer: made by one, or called ``trainer`` in a file that uses Lightning."""
        if isinstance(node, cst.Call):
            return self.meaning(node.func) in TRAINERS
        value = self.value_of(node)
        if isinstance(value, cst.Call) and self.path(value.func) is not None:
            return (self.meaning(value.func) or "").removesuffix(".from_argparse_args") in TRAINERS
        name = dotted(node)
        return name is not None and name.rpartition(".")[2] == "trainer" and self.path(node) is None

    def value_of(self, node: cst.BaseExpression) -> cst.BaseExpression | None:
        """What a variable holds, if it is assigned once; None if that cannot be told."""
        scope = self.scopes.get(node)
        if not isinstance(node, cst.Name) or scope is None:
            return None
        assignments = list(scope[node.value])
        if len(assignments) != 1:
            return None
        values = self.values.get((assignments[0].scope, node.value), [])
        return values[0] if len(values) == 1 else None

    def held(self, node: cst.BaseExpression) -> cst.BaseExpression | None:
        """An expression itself, or what the variable holds that it is."""
        return self.value_of(node) if isinstance(node, cst.Name) else node

    def variable(self, call: cst.Call) -> Key | None:
        """The variable that a call's result is assigned to, if nothing else is assigned to it."""
        parent = self.parents.get(call)
        if not isinstance(parent, cst.Assign) or len(parent.targets) != 1:
            return None
        target = parent.targets[0].target
        scope = self.scopes.get(target)
        if not isinstance(target, cst.Name) or scope is None:
            return None
        return (scope, target.value) if len(self.values[scope, target.value]) == 1 else None

    def kind(self, node: cst.ClassDef) -> str | None:
        """``"module"``, ``"data"`` or ``"callback"`` if a class derives from one of ours."""
        for kind, name in self._bases(node):
            found = kind or self.classes.get(name) or self._known.get(name)
            if found is not None:
                return found
        return None

    def _bases(self, node: cst.ClassDef) -> list[Base]:
        bases: list[Base] = []
        for base in node.bases:
            expression = base.value.value if isinstance(base.value, cst.Subscript) else base.value
            meaning = self.meaning(expression) or ""
            name = (meaning or self.path(expression) or dotted(expression) or "").rpartition(".")[2]
            kind = KINDS.get(name, "callback" if meaning.startswith("leyden.callbacks.") else None) if meaning else None
            bases.append((kind, "" if meaning else name))
        return bases

    # Reading

    def visit_ClassDef(self, node: cst.ClassDef) -> None:  # noqa: N802 (libcst's names)
        """Classes that derive from ours."""
        self.bases[node.name.value] = self._bases(node)
        kind = self.kind(node)
        if kind is not None:
            self.classes[node.name.value] = kind
            self.relevant = True

    def visit_Assign(self, node: cst.Assign) -> None:  # noqa: N802
        """What plain variables hold."""
        for target in node.targets:
            self._keep(target.target, node.value)

    def visit_AnnAssign(self, node: cst.AnnAssign) -> None:  # noqa: N802
        """The same with a type."""
        if node.value is not None:
            self._keep(node.target, node.value)

    def visit_Call(self, node: cst.Call) -> None:  # noqa: N802
        """Methods called on plain variables."""
        if isinstance(node.func, cst.Attribute) and isinstance(node.func.value, cst.Name):
            scope = self.scopes.get(node.func.value)
            if scope is not None:
                self.method_calls[scope, node.func.value.value].append(node)

    def visit_Import(self, node: cst.Import) -> None:  # noqa: N802
        """Whether a file is of interest."""
        self.relevant |= any(_ours(dotted(alias.name)) for alias in node.names)

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:  # noqa: N802
        """Whether a file is of interest."""
        self.relevant |= not node.relative and _ours(dotted(node.module))

    def _keep(self, target: cst.BaseExpression, value: cst.BaseExpression) -> None:
        scope = self.scopes.get(target)
        if isinstance(target, cst.Name) and scope is not None:
            self.values[scope, target.value].append(value)


def _ours(path: str | None) -> bool:
    return path is not None and is_ours(path)


def derived(classes: Mapping[str, list[Base]]) -> dict[str, str]:
    """The kinds of all classes that derive from ours, through any number of others."""
    kinds: dict[str, str] = {}
    before = -1
    while len(kinds) > before:
        before = len(kinds)
        for name, bases in classes.items():
            found = next((kind or kinds[base] for kind, base in bases if kind or base in kinds), None)
            if found is not None:
                kinds.setdefault(name, found)
    return kinds
