"""Hooks over a whole code base: which can be rewritten wherever they are used, and which have to stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import libcst as cst
from libcst.metadata import ClassScope

from leyden.compat.migrate.facts import Base, Facts, code, derived, dotted, is_method_of_super
from leyden.compat.migrate.hooks import FORMER, HOOKS, Change, State, state

_FORMER_NAMES = {name for hooks in FORMER.values() for name, former in hooks.items() if former.today != name}


@dataclass
class Defined:
    """What a file says of one class.

    Attributes:
        bases: that it derives from.
        methods: the names of all.
        hooks: that it defines, by name: what may become of them, by the kind of class that this may turn out to be.
        used: hooks that are used by ``self`` or ``super()``, each with its text.
        passed: the same for ``super()`` within the hook itself, where its arguments can be changed too.
        otherwise: hooks whose names are assigned, or defined under a condition.
    """

    bases: list[Base] = field(default_factory=list)
    methods: set[str] = field(default_factory=set)
    hooks: dict[str, dict[str, State]] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    passed: dict[str, str] = field(default_factory=dict)
    otherwise: dict[str, str] = field(default_factory=dict)


@dataclass
class Reading:
    """What a file says of hooks: its classes, and uses outside of them, each with whose it is, the hook and the text."""

    classes: dict[str, Defined] = field(default_factory=dict)
    elsewhere: list[tuple[str | None, str, str]] = field(default_factory=list)


@dataclass
class Plan:
    """For one class: hooks to leave, with the use that is in the way, and today's names of those that only change theirs."""

    left: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


Key = tuple[int, str]
"""A class: the number of its file, its name."""


class Reader(cst.CSTVisitor):
    """Reads one file."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self.reading = Reading({name: Defined(bases) for name, bases in facts.bases.items()})
        self._within: list[tuple[Defined, list[str]]] = []

    def visit_ClassDef(self, node: cst.ClassDef) -> None:  # noqa: N802 (libcst's names)
        """Begin a class."""
        self._within.append((self.reading.classes[node.name.value], []))

    def leave_ClassDef(self, original_node: cst.ClassDef) -> None:  # noqa: N802
        """End it."""
        self._within.pop()

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:  # noqa: N802
        """A method, if it stands in a class's body."""
        if not self._within:
            return
        defined, functions = self._within[-1]
        functions.append(node.name.value)
        block = self.facts.parents.get(node)
        if isinstance(self.facts.parents.get(block) if block else None, cst.ClassDef):
            defined.methods.add(node.name.value)
            if node.name.value in HOOKS:
                defined.hooks[node.name.value] = {kind: state(node, kind) for kind in FORMER}
        elif node.name.value in HOOKS and len(functions) == 1:
            defined.otherwise[node.name.value] = f"def {node.name.value}, further in"

    def leave_FunctionDef(self, original_node: cst.FunctionDef) -> None:  # noqa: N802
        """End it."""
        if self._within:
            self._within[-1][1].pop()

    def visit_Name(self, node: cst.Name) -> None:  # noqa: N802
        """A hook's name in the body of a class, as in ``on_epoch_end = None``."""
        if node.value not in HOOKS or not self._within or not isinstance(self.facts.scopes.get(node), ClassScope):
            return
        parent = self.facts.parents.get(node)
        is_attribute = isinstance(parent, cst.Attribute) and parent.attr is node
        is_keyword = isinstance(parent, cst.Arg) and parent.keyword is node
        if not (is_attribute or is_keyword or isinstance(parent, cst.FunctionDef)):
            self._within[-1][0].otherwise[node.value] = f"{node.value} in the body of a class"

    def visit_Attribute(self, node: cst.Attribute) -> None:  # noqa: N802
        """A hook of an object."""
        name, of = node.attr.value, dotted(node.value)
        if name not in HOOKS:
            return
        if not self._within or not (of == "self" or is_method_of_super(node)):
            of = self.facts.path(node.value) or of
            self.reading.elsewhere.append((of and of.rpartition(".")[2], name, code(node)))
            return
        defined, functions = self._within[-1]
        parent = self.facts.parents.get(node)
        if isinstance(parent, (cst.AssignTarget, cst.AnnAssign, cst.Del)):
            defined.otherwise[name] = code(node)
        elif of != "self" and name in functions and isinstance(parent, cst.Call) and parent.func is node:
            defined.passed[name] = code(node)
        else:
            defined.used[name] = code(node)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:  # noqa: N802
        """A hook's former name as a string, as ``getattr`` takes it."""
        value = node.evaluated_value
        if isinstance(value, str) and value in _FORMER_NAMES:
            self.reading.elsewhere.append((None, value, node.value))


def decide(readings: Sequence[Reading], known: Mapping[str, str]) -> list[dict[str, Plan]]:
    """What becomes of the hooks of all classes, file by file.

    A hook is left where anything that uses it would not be rewritten with it: what uses it then finds it under its former name.

    Args:
        readings: of all files.
        known: kinds of classes, by name.
    """
    kinds = derived({name: each.bases for reading in readings for name, each in reading.classes.items()})
    kinds = {**known, **kinds}
    names = {name for reading in readings for name in reading.classes}
    plans: list[dict[str, Plan]] = [{} for _ in readings]
    for family in _families(readings):
        members = [(key, readings[key[0]].classes[key[1]]) for key in family]
        ours = [(key, each, kind) for key, each in members if (kind := _kind(each, kinds)) is not None]
        if not ours:
            continue
        others = [(key[1], each) for key, each in members if _kind(each, kinds) is None]
        of_family = {key[1] for key in family}
        elsewhere = {
            hook: shown
            for reading in readings
            for of, hook, shown in reading.elsewhere
            if of in of_family or of not in names
        }
        plan = _plan([(each, kind) for _, each, kind in ours], others, elsewhere)
        for (file, name), _, _ in ours:
            plans[file][name] = plan
    return plans


def _kind(defined: Defined, kinds: Mapping[str, str]) -> str | None:
    return next((kind or kinds[base] for kind, base in defined.bases if kind or base in kinds), None)


def _families(readings: Sequence[Reading]) -> list[set[Key]]:
    """Classes that are connected by deriving from one another; a name means the class of the same file, if there is one."""
    families: dict[Key, set[Key]] = {
        (file, name): {(file, name)} for file, reading in enumerate(readings) for name in reading.classes
    }
    files: dict[str, list[int]] = {}
    for file, name in families:
        files.setdefault(name, []).append(file)
    for file, name in list(families):
        for _, base in readings[file].classes[name].bases:
            found = [file] if base in readings[file].classes else files.get(base, [])
            for other in found:
                one, two = families[file, name], families[other, base]
                if one is not two:
                    one |= two
                    families |= dict.fromkeys(two, one)
    return list({id(family): family for family in families.values()}.values())


def _plan(
    ours: Sequence[tuple[Defined, str]], others: Sequence[tuple[str, Defined]], elsewhere: Mapping[str, str]
) -> Plan:
    plan = Plan()
    changes: dict[str, list[Change]] = {}
    for each, kind in ours:
        for hook, states in each.hooks.items():
            change = states[kind]
            if isinstance(change, Change):
                changes.setdefault(hook, []).append(change)
    claimed = [(found[0].name, hook) for hook, found in changes.items()]
    for hook, found in changes.items():
        today = found[0].name
        kinds = {kind for _, kind in ours}
        reasons = [
            *_in_others(hook, others, kinds),
            *_in_ours(hook, ours, any(change.parameters is not None for change in found)),
            *([elsewhere[hook]] if hook in elsewhere else []),
            *(other for name, other in claimed if name == today != hook and other != hook),
        ]
        if today != hook and any(today in each.methods for each in [*(a for a, _ in ours), *(b for _, b in others)]):
            reasons.append(f"there is {today} as well")
        if len({change.parameters is None for change in found}) > 1:
            reasons.append("its arguments differ")
        if reasons:
            plan.left[hook] = reasons[0]
        elif today != hook:
            plan.renamed[hook] = today
    return plan


def _in_others(hook: str, others: Sequence[tuple[str, Defined]], kinds: set[str]) -> Iterator[str]:
    """Uses in classes that are no modules or callbacks by themselves, and are not rewritten: mixins."""
    for name, each in others:
        states = each.hooks.get(hook)
        if states is not None and (hook in _FORMER_NAMES or any(states[kind] is not None for kind in kinds)):
            yield f"class {name}"
        for uses in (each.otherwise, each.used, each.passed):
            if hook in uses:
                yield f"{uses[hook]} in class {name}"


def _in_ours(hook: str, ours: Sequence[tuple[Defined, str]], has_other_arguments: bool) -> Iterator[str]:
    for each, kind in ours:
        found = each.hooks[hook][kind] if hook in each.hooks else None
        if hook in each.otherwise:
            yield each.otherwise[hook]
        if found == "left":
            yield "another one cannot be rewritten by itself"
        if has_other_arguments and hook in each.used:
            yield each.used[hook]
        if has_other_arguments and hook in each.passed and not isinstance(found, Change):
            yield each.passed[hook]
