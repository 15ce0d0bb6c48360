"""Import statements: where they point today, in as many statements as there are modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import libcst as cst

from leyden.compat.migrate.calls import closing_comma
from leyden.compat.migrate.facts import Facts, code, dotted
from leyden.compat.migrate.names import DATA_LOADER, HAS, Place, is_ours, place
from leyden.compat.migrate.notes import Notes

PACKAGES = ("pytorch_lightning", "lightning")
"""What is called otherwise today."""
Statements = list[cst.BaseSmallStatement]


def expression(path: str) -> cst.Name | cst.Attribute:
    """``a.b.c`` as a node."""
    first, *more = path.split(".")
    node: cst.Name | cst.Attribute = cst.Name(first)
    for each in more:
        node = cst.Attribute(node, cst.Name(each))
    return node


class Bound:
    """Packages that are imported without ``as``: what their names become, wherever they stand in the file.

    Attributes:
        names: by package: "leyden"; "as" where the name is assigned, a parameter or otherwise not only the package: it stays, as
            another name of leyden's; "stays" where that cannot be, for leyden lacks something that is used by that name.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.names: dict[str, str] = {}
        self._others: set[str] = set()

    def see_import(self, node: cst.Import) -> None:
        """Import statements."""
        for alias in node.names:
            path = dotted(alias.name) or ""
            root, found = path.split(".")[0], place(path)
            if alias.asname is not None:
                self._others.add(dotted(alias.asname.name) or "")
            elif root in PACKAGES and found is not None:
                there = found[0].missing is None or found[0].path in _modules_that_are_there()
                self.names[root] = "leyden" if there else self.names.get(root, "stays")

    def see_name(self, node: cst.Name) -> None:
        """Names, of which one that is not only the package is enough for the name to stay."""
        parent = self.facts.parents.get(node)
        within = parent
        while isinstance(within, cst.Attribute):
            within = self.facts.parents.get(within)
        is_attribute = isinstance(parent, cst.Attribute) and parent.attr is node
        is_keyword = isinstance(parent, cst.Arg) and parent.keyword is node
        is_import = isinstance(within, (cst.ImportAlias, cst.ImportFrom))
        if node.value not in PACKAGES or is_attribute or is_keyword or is_import:
            return
        if self.facts.imported_only(node) != {node.value}:
            self._others.add(node.value)

    def see_annotation(self, node: cst.Annotation) -> None:
        """Annotations, which may be strings with names in them."""
        text = code(node.annotation)
        if '"' in text or "'" in text:
            self._others |= {name for name in PACKAGES if name in text}

    def settle(self, kept: dict[str, str]) -> None:
        """Decide, when all has been seen; ``kept`` as in `rewrite_import`."""
        for name in self._others & self.names.keys():
            self.names[name] = "as" if name not in kept and self.names[name] != "stays" else "stays"
        kept |= {name: "alone" for name, what in self.names.items() if what == "stays"}

    def is_renamed(self, node: cst.Name) -> bool:
        """Whether this is such a name by itself, not the beginning of a chain, and becomes ``leyden``."""
        parent = self.facts.parents.get(node)
        if self.names.get(node.value) != "leyden" or isinstance(parent, cst.Attribute):
            return False
        return not (isinstance(parent, cst.Arg) and parent.keyword is node) and self.facts.path(node) == node.value


def rewrite_import(
    node: cst.Import, facts: Facts, notes: Notes, kept: Mapping[str, str], bound: Mapping[str, str]
) -> cst.Import:
    """``import a.b as c``, ``import a.b``.

    Args:
        node: the statement.
        facts: what is known of the file.
        notes: where to note modules that leyden does not have.
        kept: packages that are still needed under their own names: "alone", or "too" where names of leyden's are used as well.
        bound: what the names of packages become; see `Bound`.
    """
    names: list[cst.ImportAlias] = []
    apart = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    for alias in node.names:
        path = dotted(alias.name) or ""
        found = place(path)
        if found is None:
            names.append(alias)
            continue
        where, _ = found
        if where.missing is not None and (alias.asname is not None or where.path not in _modules_that_are_there()):
            _note(notes, facts.line(node), f"import {path}", where)
            names.append(alias)
            continue
        new = alias.with_changes(name=expression(where.path)) if where.path != path else alias
        if alias.asname is None and kept.get(path.split(".")[0]) == "alone":
            names.append(alias)
        elif alias.asname is None and path.split(".")[0] in kept and new is not alias:
            names += [new.with_changes(comma=apart), alias]
        elif alias.asname is None and bound.get(path.split(".")[0]) == "as":
            space = cst.SimpleWhitespace(" ")
            name = cst.AsName(cst.Name(path.split(".")[0]), space, space)
            names += [new.with_changes(comma=apart)] if where.path != "leyden" else []
            names.append(alias.with_changes(name=cst.Name("leyden"), asname=name))
        else:
            names.append(new)
    if all(a is b for a, b in zip(names, node.names, strict=False)) and len(names) == len(node.names):
        return node
    return node.with_changes(names=names)


def rewrite_from(node: cst.ImportFrom, facts: Facts, notes: Notes, needs_loader: bool) -> Statements:
    """``from a.b import c, d``: the statements in its place; none if nothing is left to import.

    Args:
        node: the statement.
        facts: what is known of the file.
        notes: where to note names that leyden does not have.
        needs_loader: whether `data_loader` is used for more than what is taken away.
    """
    module = dotted(node.module)
    if node.relative or module is None or not is_ours(module):
        return [node]
    if isinstance(node.names, cst.ImportStar):
        return [_star(node, module, facts, notes)]
    groups: dict[str, list[cst.ImportAlias]] = {}
    for alias in node.names:
        where = _imported(module, alias)
        if where is None:
            groups.setdefault(module, []).append(alias)
        elif where.missing is not None:
            _note(notes, facts.line(node), f"from {module} import {dotted(alias.name)}", where)
            groups.setdefault(module, []).append(alias)
        elif where.name != DATA_LOADER or needs_loader:
            package, name = (where.module, where.name) if where.name else where.module.rsplit(".", 1)
            renamed = dotted(alias.name) != name
            groups.setdefault(package, []).append(alias.with_changes(name=cst.Name(name)) if renamed else alias)
    if len(groups) == 1 and sum(map(len, groups.values())) == len(node.names):
        ((package, aliases),) = groups.items()
        same = all(a is b for a, b in zip(aliases, node.names, strict=True))
        names = node.names if same else aliases
        return [node if package == module and same else node.with_changes(module=expression(package), names=names)]
    return [_part(node, package, aliases, number == 0) for number, (package, aliases) in enumerate(groups.items())]


def _part(node: cst.ImportFrom, package: str, aliases: Sequence[cst.ImportAlias], is_first: bool) -> cst.ImportFrom:
    """A statement for some of the names of another one, with their comments."""
    assert not isinstance(node.names, cst.ImportStar)
    last = aliases[-1]
    own = closing_comma(node.names[-1].comma, last.comma) if node.lpar and last is not node.names[-1] else last.comma
    names = [*aliases[:-1], last.with_changes(comma=own if node.lpar else cst.MaybeSentinel.DEFAULT)]
    part = node.with_changes(module=expression(package), names=names)
    if node.lpar is None or is_first or not isinstance(node.lpar.whitespace_after, cst.ParenthesizedWhitespace):
        return part
    space = node.lpar.whitespace_after
    first_line = cst.TrailingWhitespace(newline=space.first_line.newline)
    bare = space.with_changes(first_line=first_line, empty_lines=[])
    return part.with_changes(lpar=node.lpar.with_changes(whitespace_after=bare))


def _imported(module: str, alias: cst.ImportAlias) -> Place | None:
    name = dotted(alias.name) or ""
    found = place(f"{module}.{name}")
    if found is None:
        return None
    where, _ = found
    if where.module == "leyden" and where.name is None:  # a module of which only the names are left
        return Place(
            f"{module}.{name}", None, f"what leyden has of {module}, which is in leyden itself; it has no {name}"
        )
    return where


def _star(node: cst.ImportFrom, module: str, facts: Facts, notes: Notes) -> cst.ImportFrom:
    found = place(module)
    if found is None or found[0].missing is not None or found[0].path == module:
        return node
    why = "what came with the star is not seen here."
    notes.add(facts.line(node), f"from {module} import *", why, f"from {found[0].path} import …, naming what is used")
    return node.with_changes(module=expression(found[0].path))


def _note(notes: Notes, line: int, what: str, where: Place) -> None:
    notes.add(line, what, "leyden does not have it; it stays as it is.", where.missing or "")


def _modules_that_are_there() -> set[str]:
    return {f"leyden.{module}" if module else "leyden" for module in HAS}


def add_imports(module: cst.Module, names: Sequence[str]) -> cst.Module:
    """Import callbacks of leyden's at the top: in the statement that imports others, or behind leyden's first one."""
    if not names:
        return module
    body = list(module.body)
    first: int | None = None
    for number, line in enumerate(body):
        for statement in line.body if isinstance(line, cst.SimpleStatementLine) else ():
            path = _imports_from(statement)
            if path == "leyden.callbacks" and isinstance(statement, cst.ImportFrom):
                body[number] = line.with_deep_changes(statement, names=_more(statement, names))
                return module.with_changes(body=body)
            if path is not None and path.split(".")[0] == "leyden" and first is None:
                first = number
    aliases = [cst.ImportAlias(cst.Name(name)) for name in names]
    new = cst.SimpleStatementLine([cst.ImportFrom(expression("leyden.callbacks"), aliases)])
    at = first + 1 if first is not None else _behind_the_head(body)
    return module.with_changes(body=[*body[:at], new, *body[at:]])


def _behind_the_head(body: Sequence[cst.BaseStatement]) -> int:
    """Behind the docstring and the imports that a file begins with."""
    at = 0
    for number, line in enumerate(body):
        if not isinstance(line, cst.SimpleStatementLine):
            break
        if isinstance(line.body[0], (cst.Import, cst.ImportFrom)) or (
            number == 0 and line.body and _is_text(line.body[0])
        ):
            at = number + 1
    return at


def _is_text(statement: cst.BaseSmallStatement) -> bool:
    return isinstance(statement, cst.Expr) and isinstance(statement.value, (cst.SimpleString, cst.ConcatenatedString))


def _imports_from(statement: cst.BaseSmallStatement) -> str | None:
    if isinstance(statement, cst.ImportFrom) and not statement.relative:
        return None if isinstance(statement.names, cst.ImportStar) else dotted(statement.module)
    if isinstance(statement, cst.Import):
        return dotted(statement.names[0].name)
    return None


def _more(statement: cst.ImportFrom, names: Sequence[str]) -> list[cst.ImportAlias]:
    assert not isinstance(statement.names, cst.ImportStar)
    before = list(statement.names)
    there = {dotted(each.name) for each in before if each.asname is None}
    inner = [each.comma for each in before[:-1] if isinstance(each.comma, cst.Comma)]
    comma = inner[-1] if inner else cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    last = before[-1].comma
    joined = [*before, *(cst.ImportAlias(cst.Name(name)) for name in names if name not in there)]
    return [
        each.with_changes(comma=comma) if number in range(len(before) - 1, len(joined) - 1) else each
        for number, each in enumerate(joined[:-1])
    ] + [joined[-1].with_changes(comma=last)]
