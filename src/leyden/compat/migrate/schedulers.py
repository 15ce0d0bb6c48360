"""Schedulers that do not say what they watch."""

from __future__ import annotations

import libcst as cst

from leyden.compat.migrate.facts import Facts, dotted, literal
from leyden.compat.migrate.notes import Notes

_WHY = "until 0.9 it watched val_loss by itself."
_IN_PLACE = '{"scheduler": ReduceLROnPlateau(…), "monitor": "val_loss"} in its place'


class _Plateaus(cst.CSTVisitor):
    """Finds each ``ReduceLROnPlateau(…)``, and variables that hold one."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self.found: list[cst.BaseExpression] = []
        self.names_monitor = False
        """Whether ``["monitor"]`` is set somewhere."""

    def visit_Call(self, node: cst.Call) -> None:  # noqa: N802 (libcst's names)
        if _is_plateau(node):
            self.found.append(node)

    def visit_Name(self, node: cst.Name) -> None:  # noqa: N802
        if isinstance(self.facts.parents.get(node), (cst.Element, cst.DictElement)) and _is_plateau(
            self.facts.value_of(node)
        ):
            self.found.append(node)

    def visit_Index(self, node: cst.Index) -> None:  # noqa: N802
        self.names_monitor |= literal(node.value) == "monitor"


def _is_plateau(node: cst.BaseExpression | None) -> bool:
    return isinstance(node, cst.Call) and (dotted(node.func) or "").rpartition(".")[2] == "ReduceLROnPlateau"


def note_plateaus(function: cst.FunctionDef, facts: Facts, notes: Notes) -> None:
    """Note what is returned of ``ReduceLROnPlateau`` without ``monitor``, in a list or a dict."""
    visitor = _Plateaus(facts)
    function.body.visit(visitor)
    for node in visitor.found:
        parent = facts.parents.get(node)
        if isinstance(parent, cst.Element):
            write = _IN_PLACE
        elif isinstance(parent, cst.DictElement) and not (visitor.names_monitor or _is_watched(parent, facts)):
            write = '"monitor": "val_loss" beside it'
        else:
            continue
        notes.add(facts.line(node), "ReduceLROnPlateau without monitor", _WHY, write)


def _is_watched(element: cst.DictElement, facts: Facts) -> bool:
    """Whether the dict, or one around it, has ``"monitor"``, or what is not seen."""
    if literal(element.key) not in ("scheduler", "lr_scheduler"):
        return True
    node: cst.CSTNode | None = element
    while isinstance(node, cst.DictElement):
        around = facts.parents.get(node)
        if not isinstance(around, cst.Dict):
            return True
        for each in around.elements:
            if not isinstance(each, cst.DictElement) or literal(each.key) == "monitor":
                return True
        node = facts.parents.get(around)
    return False
