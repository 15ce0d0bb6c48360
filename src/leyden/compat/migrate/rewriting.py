"""Rewriting the text of one file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import libcst as cst
from libcst.metadata import MetadataWrapper

from leyden.compat.migrate import hooks, objects
from leyden.compat.migrate.calls import Arguments
from leyden.compat.migrate.facts import TRAINERS, Facts, code, dotted, is_method_of_super
from leyden.compat.migrate.imports import Bound, add_imports, expression, rewrite_from, rewrite_import
from leyden.compat.migrate.names import DATA_LOADER, RENAMED, place
from leyden.compat.migrate.notes import Note, Notes
from leyden.compat.migrate.trainer_arguments import rewrite_arguments, rules
from leyden.compat.migrate.uses import Plan, Reader, Reading, decide
from leyden.errors import ConfigurationError

_OURS = re.compile(r"\b(?:pytorch_lightning|lightning|leyden|pl_bolts)\b")
_BLANKS = re.compile(r"(?<=\n)[ \t\f]+\Z")
_NAMED = re.compile(r"^[rRbBuU]*[\"']+(?:pytorch_lightning|lightning\.pytorch)(?:\.\w+)*[\"']+$")


@dataclass(frozen=True)
class Rewritten:
    """A text and what is left to do in it.

    Attributes:
        text: rewritten.
        notes: by line of the text that was given.
        later: by line of the rewritten text.
    """

    text: str
    notes: tuple[Note, ...] = ()
    later: tuple[Note, ...] = ()


def concerns(text: str, known: Mapping[str, str]) -> bool:
    """Whether a file can hold anything to rewrite: quick, by its words."""
    return bool(_OURS.search(text)) or any(name in text for name in known)


def read(text: str) -> Reading:
    """The classes of a file with what they derive from, and the hooks in it; for `derived` and `decide`."""
    wrapper = MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    return _read(wrapper.module, Facts(wrapper, {}))


def _read(module: cst.Module, facts: Facts) -> Reading:
    reader = Reader(facts)
    module.visit(reader)
    return reader.reading


def rewrite(text: str, known: Mapping[str, str] | None = None, plans: Mapping[str, Plan] | None = None) -> Rewritten:
    """Rewrite what is written otherwise today, and note what needs a hand.

    Args:
        text: of a Python file.
        known: kinds of classes that other files define; see `derived`.
        plans: what becomes of the hooks of its classes; see `decide`. Default: what this file alone tells.

    Raises:
        libcst.ParserSyntaxError: if this is not Python.
        ConfigurationError: if it cannot be written again as it is.
    """
    if not concerns(text, known or {}):
        return Rewritten(text)
    blanks = _BLANKS.search(text)
    if blanks is not None:  # libcst loses lines before a last one of blanks alone
        done = rewrite(text[: blanks.start()], known, plans)
        return replace(done, text=done.text + blanks[0])
    wrapper = MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    facts = Facts(wrapper, known or {})
    if not facts.relevant:
        return Rewritten(text)
    if wrapper.module.code != text:
        raise ConfigurationError("Its line ends are neither \\n nor \\r\\n, and would not be kept. Convert them first.")
    notes = Notes()
    planned = _Planned(facts)
    wrapper.module.visit(planned)
    if plans is None:
        (plans,) = decide([_read(wrapper.module, facts)], known or {})
    rewriter = _Rewriter(facts, notes, planned, plans)
    module = add_imports(wrapper.module.visit(rewriter), sorted(rewriter.wanted))
    found, new = notes.sorted(), module.code
    return Rewritten(new, found, _moved(found, text, new))


def _moved(notes: tuple[Note, ...], before: str, after: str) -> tuple[Note, ...]:
    """The same notes by the lines of the new text."""
    if before == after or not notes:
        return notes
    lines: dict[int, int] = {}
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    for _, a, b, c, d in matcher.get_opcodes():
        lines |= {old + 1: min(c + old - a, max(d - 1, c)) + 1 for old in range(a, b)}
    return tuple(replace(note, line=lines.get(note.line, note.line)) for note in notes)


class _Planned(cst.CSTVisitor):
    """What must be known of the whole file first: where names lead, and which packages are still needed."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self.calls: list[cst.Call] = []
        self.kept: dict[str, str] = {}
        self._moved: set[str] = set()
        self.bound = Bound(facts)
        self.needs_loader = False
        self.prefix: str | None = None
        """What leyden is called in this file, if it is imported at the top."""

    def visit_Call(self, node: cst.Call) -> None:  # noqa: N802 (libcst's names)
        self.calls.append(node)

    def visit_Import(self, node: cst.Import) -> None:  # noqa: N802
        self.bound.see_import(node)
        line = self.facts.parents[node]
        if not isinstance(self.facts.parents.get(line), cst.Module):
            return
        for alias in node.names:
            path = dotted(alias.name) or ""
            found = place(path)
            if found is None or found[0].missing is not None:
                continue
            if alias.asname is None:
                self.prefix = self.prefix or "leyden"
            elif found[0].path == "leyden":
                self.prefix = dotted(alias.asname.name) or self.prefix

    def leave_Module(self, original_node: cst.Module) -> None:  # noqa: N802
        self.bound.settle(self.kept)

    def visit_Annotation(self, node: cst.Annotation) -> None:  # noqa: N802
        self.bound.see_annotation(node)

    def visit_Name(self, node: cst.Name) -> None:  # noqa: N802
        self.bound.see_name(node)
        if self.facts.meaning(node) == f"leyden.{DATA_LOADER}":
            self.needs_loader |= not isinstance(self.facts.parents.get(node), (cst.Decorator, cst.ImportAlias))

    def visit_Attribute(self, node: cst.Attribute) -> None:  # noqa: N802
        base = _base(node)
        if base is None or isinstance(self.facts.parents.get(node), cst.Attribute):
            return
        path, start = self.facts.path(node), self.facts.path(base)
        found = place(path) if path is not None else None
        if found is None or start != base.value or path == start:
            return
        if found[0].missing is not None:
            self.kept[base.value] = "too" if base.value in self._moved else "alone"
            return
        self._moved.add(base.value)
        if base.value in self.kept:
            self.kept[base.value] = "too"


def _base(node: cst.BaseExpression) -> cst.Name | None:
    while isinstance(node, cst.Attribute):
        node = node.value
    return node if isinstance(node, cst.Name) else None


class _Rewriter(cst.CSTTransformer):
    """Rewrites from the innermost expression outwards; what is not concerned stays the same node, and so the same text."""

    def __init__(self, facts: Facts, notes: Notes, planned: _Planned, plans: Mapping[str, Plan]) -> None:
        super().__init__()
        self.facts, self.notes, self._plans = facts, notes, plans
        self.wanted: set[str] = set()
        self._kept, self._prefix, self._needs_loader = planned.kept, planned.prefix, planned.needs_loader
        self._bound = planned.bound
        self._quotes: list[str] = []
        self._rules = rules(self._callback)
        self._resumed, self._emptied = objects.plan_resumes(facts, planned.calls)
        self._of_then = objects.plan_callbacks(facts, planned.calls)
        self._classes: list[tuple[str | None, dict[str, hooks.Change], Mapping[str, str]]] = []
        self._functions: list[cst.FunctionDef] = []

    def _callback(self, name: str, arguments: str) -> cst.BaseExpression:
        if self._prefix is not None:
            return cst.parse_expression(f"{self._prefix}.callbacks.{name}({arguments})")
        self.wanted.add(name)
        return cst.parse_expression(f"{name}({arguments})")

    # Imports and names

    def leave_Import(self, original: cst.Import, updated: cst.Import) -> cst.Import:  # noqa: N802
        return rewrite_import(original, self.facts, self.notes, self._kept, self._bound.names)

    def leave_SimpleStatementLine(  # noqa: N802
        self, original: cst.SimpleStatementLine, updated: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.SimpleStatementLine] | cst.RemovalSentinel:
        body = self._with_imports(original.body, updated.body)
        if body is None:
            return updated
        if len(original.body) == 1 and len(body) > 1:
            first, *more = body
            lines = [updated.with_changes(body=[first]), *(cst.SimpleStatementLine([each]) for each in more)]
            return cst.FlattenSentinel(lines)
        return updated.with_changes(body=body) if body else cst.RemoveFromParent()

    def _with_imports(
        self, original: Sequence[cst.BaseSmallStatement], updated: Sequence[cst.BaseSmallStatement]
    ) -> list[cst.BaseSmallStatement] | None:
        """The statements of a line with the imports of today; None if they are as they were."""
        body: list[cst.BaseSmallStatement] = []
        for each, new in zip(original, updated, strict=True):
            if isinstance(each, cst.ImportFrom):
                body += rewrite_from(each, self.facts, self.notes, self._needs_loader)
            else:
                body.append(new)
        same = len(body) == len(updated) and all(a is b for a, b in zip(body, updated, strict=True))
        return None if same else body

    def leave_SimpleStatementSuite(  # noqa: N802
        self, original: cst.SimpleStatementSuite, updated: cst.SimpleStatementSuite
    ) -> cst.SimpleStatementSuite:
        body = self._with_imports(original.body, updated.body)
        return updated if body is None else updated.with_changes(body=body or [cst.Pass()])

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:  # noqa: N802
        return False

    def visit_Import(self, node: cst.Import) -> bool:  # noqa: N802
        return False

    def leave_Name(self, original: cst.Name, updated: cst.Name) -> cst.Name:  # noqa: N802
        today, parent = RENAMED.get(original.value), self.facts.parents.get(original)
        if self._bound.is_renamed(original) and self._kept.get(original.value) != "alone":
            return updated.with_changes(value="leyden")
        if today is None or (isinstance(parent, cst.Attribute) and parent.attr is original):
            return updated
        path = None if isinstance(parent, cst.Arg) and parent.keyword is original else self.facts.path(original)
        if path is None or path.rpartition(".")[2] != original.value or place(path) is None:
            return updated
        return updated.with_changes(value=today)

    def leave_Attribute(  # noqa: N802
        self, original: cst.Attribute, updated: cst.Attribute
    ) -> cst.BaseExpression:
        name = original.attr.value
        if name in objects.TRAINER_ATTRIBUTES and self.facts.is_trainer(original.value):
            return updated.with_changes(attr=cst.Name(objects.TRAINER_ATTRIBUTES[name]))
        today = self._classes[-1][2].get(name) if self._classes else None
        if today is not None and (dotted(original.value) == "self" or is_method_of_super(original)):
            return updated.with_changes(attr=cst.Name(today))
        parent = self.facts.parents.get(original)
        base = _base(original)
        if base is None or (isinstance(parent, cst.Attribute) and parent.value is original):
            return updated
        return self._dotted(original, base, updated)

    def _dotted(self, node: cst.Attribute, base: cst.Name, updated: cst.Attribute) -> cst.BaseExpression:
        """A chain of names that begins with an import: ``pl.logging.TensorBoardLogger``, ``lightning.pytorch.Trainer``."""
        path, start = self.facts.path(node), self.facts.path(base)
        found = place(path) if path is not None and start is not None else None
        began = place(start) if start is not None else None
        if path is None or start is None or found is None or began is None or began[0].name is not None:
            return updated
        is_plain = self._bound.names.get(base.value) == "leyden"
        if began[0].missing is not None and not is_plain:
            return updated  # a module that stays as it is, which has been noted
        where, covered = found
        if where.missing is not None:
            why = "leyden does not have it."
            self.notes.add(self.facts.line(node), dotted(node) or path, why, where.missing)
            return updated
        if self._bound.names.get(base.value) == "stays" or (where.name == DATA_LOADER and not is_plain):
            return updated
        after = path.split(".")[covered:]
        new = ".".join([where.path, *after])
        if is_plain:  # imported without another name
            text = new
        elif new == began[0].path or new.startswith(f"{began[0].path}."):
            text = base.value + new[len(began[0].path) :]
        else:
            why = "it is elsewhere in leyden."
            self.notes.add(self.facts.line(node), dotted(node) or path, why, f"{new}, imported by that name")
            return updated
        if text == dotted(node):
            return updated
        return expression(text).with_changes(lpar=updated.lpar, rpar=updated.rpar)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:  # noqa: N802
        if _NAMED.match(node.value):
            path = node.evaluated_value if isinstance(node.evaluated_value, str) else ""
            found = place(path)
            if found is None:
                return
            write = found[0].missing or '"' + ".".join([found[0].path, *path.split(".")[found[1] :]]) + '"'
            self.notes.add(self.facts.line(node), node.value, "a name in a string is left alone.", write)

    # Calls

    def leave_Call(self, original: cst.Call, updated: cst.Call) -> cst.Call:  # noqa: N802
        function = original.func
        if self._classes and is_method_of_super(function) and isinstance(function, cst.Attribute):
            change = self._classes[-1][1].get(function.attr.value)
            if change is not None:
                return hooks.changed_super(updated, change)
        call = Arguments(original, updated, self.facts, self.notes)
        if self._classes and self._classes[-1][0] == "module" and is_method_of_super(function):
            objects.note_super(call, function.attr.value if isinstance(function, cst.Attribute) else "")
        meaning = self.facts.meaning(function)
        if meaning in TRAINERS:
            if original in self._emptied:
                call.drop("resume_from_checkpoint")
            elif "resume_from_checkpoint" in call.given:
                write = f"trainer.fit(model, ckpt_path={call.text('resume_from_checkpoint')})"
                call.note("resume_from_checkpoint", "each verb is told what to load.", write)
            rewrite_arguments(call, self._rules)
        elif meaning == "leyden.callbacks.ModelCheckpoint":
            objects.rewrite_checkpoint(call, original in self._of_then)
        elif meaning == "leyden.callbacks.EarlyStopping":
            objects.rewrite_early_stopping(call, original in self._of_then)
        elif isinstance(function, cst.Attribute):
            self._method(call, function, meaning)
        new = call.call()
        if new is not updated and self._quotes and self._quotes[-1] in code(new):
            # before Python 3.12 an f-string cannot hold its own quotes
            self.notes.add(self.facts.line(original), code(original), "it stands in an f-string.", code(new))
            return updated
        return new

    def visit_FormattedString(self, node: cst.FormattedString) -> None:  # noqa: N802
        self._quotes.append(node.end)

    def leave_FormattedString(  # noqa: N802
        self, original: cst.FormattedString, updated: cst.FormattedString
    ) -> cst.FormattedString:
        self._quotes.pop()
        return updated

    def _method(self, call: Arguments, function: cst.Attribute, meaning: str | None) -> None:
        method = function.attr.value
        on_trainer = self.facts.is_trainer(function.value)
        if on_trainer and method in objects.VERBS:
            objects.rewrite_verb(call, self._resumed.get(call.original))
        of_the_class = meaning is not None and meaning.rpartition(".")[0] in TRAINERS
        objects.note_method(call, method, on_trainer, of_the_class)

    def visit_Comparison(self, node: cst.Comparison) -> None:  # noqa: N802
        objects.note_precision(node, self.facts, self.notes)

    # Classes

    def visit_ClassDef(self, node: cst.ClassDef) -> None:  # noqa: N802
        kind = self.facts.kind(node)
        plan = self._plans.get(node.name.value, Plan())
        changes = hooks.plan_class(node, kind, plan.left, self.facts, self.notes) if kind is not None else {}
        self._classes.append((kind, changes, plan.renamed if kind is not None else {}))

    def leave_ClassDef(self, original: cst.ClassDef, updated: cst.ClassDef) -> cst.ClassDef:  # noqa: N802
        self._classes.pop()
        return updated

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:  # noqa: N802
        self._functions.append(node)

    def leave_FunctionDef(self, original: cst.FunctionDef, updated: cst.FunctionDef) -> cst.FunctionDef:  # noqa: N802
        self._functions.pop()
        updated = self._without_loader_decorator(original, updated)
        block = self.facts.parents.get(original)
        if not self._classes or not isinstance(self.facts.parents.get(block) if block else None, cst.ClassDef):
            return updated
        change = self._classes[-1][1].get(original.name.value)
        return hooks.changed(updated, change) if change is not None else updated

    def _without_loader_decorator(self, original: cst.FunctionDef, updated: cst.FunctionDef) -> cst.FunctionDef:
        kept: list[cst.Decorator] = []
        lines: list[cst.EmptyLine] = []
        for before, decorator in zip(original.decorators, updated.decorators, strict=True):
            if self.facts.meaning(before.decorator) != f"leyden.{DATA_LOADER}":
                kept.append(decorator)
                continue
            lines += decorator.leading_lines
            if decorator.trailing_whitespace.comment is not None:
                lines.append(cst.EmptyLine(comment=decorator.trailing_whitespace.comment))
        if len(kept) == len(updated.decorators):
            return updated
        return updated.with_changes(decorators=kept, lines_after_decorators=[*lines, *updated.lines_after_decorators])

    def visit_Assign(self, node: cst.Assign) -> None:  # noqa: N802
        if self._classes and self._classes[-1][0] == "module":
            names = {dotted(each.target) for each in node.targets}
            if {"truncated_bptt_steps", "self.truncated_bptt_steps"} & names:
                self.notes.add(self.facts.line(node), "truncated_bptt_steps", *hooks.PIECES)

    def leave_Assign(self, original: cst.Assign, updated: cst.Assign) -> cst.Assign | cst.Expr:  # noqa: N802
        if not self._classes or self._classes[-1][0] != "module":
            return updated
        given = hooks.saved_hparams(original, self._functions[-1] if self._functions else None, self.facts)
        if given is None:
            return updated
        if not given:
            why = "hparams is filled by save_hyperparameters."
            write = "self.save_hyperparameters(…) in __init__, behind super().__init__()"
            self.notes.add(self.facts.line(original), "self.hparams = …", why, write)
            return updated
        call = cst.parse_expression(f"self.save_hyperparameters({given})")
        return cst.Expr(call, semicolon=updated.semicolon)
