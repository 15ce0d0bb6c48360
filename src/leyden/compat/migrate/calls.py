"""The arguments of one call while they are rewritten: those that stay keep every space and comment that they had."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from leyden.compat.migrate.facts import UNKNOWN, Facts, code, literal
from leyden.compat.migrate.notes import Notes


class Arguments:
    """The named arguments of a call.

    Args:
        original: as it stands in the file, for lines and meanings.
        updated: the same call with what was rewritten inside of it.
        facts: what is known of the file.
        notes: where to note what is left to a person.
    """

    def __init__(self, original: cst.Call, updated: cst.Call, facts: Facts, notes: Notes) -> None:
        self.original, self.updated, self.facts, self._notes = original, updated, facts, notes
        self._slots: list[list[cst.Arg]] = [[each] for each in updated.args]
        self._before = {each.keyword.value: each.value for each in original.args if each.keyword is not None}
        self._changed = False

    @property
    def given(self) -> list[str]:
        """The names as they stand now."""
        return [each.keyword.value for slot in self._slots for each in slot if each.keyword is not None]

    @property
    def positional(self) -> list[cst.BaseExpression]:
        """Arguments without a name, those with a star left out."""
        return [each.value for each in self.original.args if each.keyword is None and not each.star]

    def original_value(self, name: str) -> cst.BaseExpression:
        """The expression in the file, of which the facts know."""
        return self._before[name]

    def value(self, name: str) -> cst.BaseExpression:
        """The expression, rewritten inside."""
        return self._find(name)[1].value

    def literal(self, name: str) -> object:
        """The value if it is a literal, else `UNKNOWN`."""
        return literal(self.value(name))

    def text(self, name: str) -> str:
        """The expression as text."""
        return code(self.value(name))

    def rename(self, name: str, today: str, value: str | None = None) -> None:
        """Write another name, and another value if one is given; dropped if that name is there already."""
        if today in self.given and today != name:
            self.drop(name)
            return
        slot, argument = self._find(name)
        new = argument.with_changes(keyword=cst.Name(today))
        if value is not None:
            new = new.with_changes(value=cst.parse_expression(value))
        slot[slot.index(argument)] = new
        self._changed = True

    def drop(self, name: str) -> None:
        """Leave an argument out."""
        slot, argument = self._find(name)
        slot.remove(argument)
        self._changed = True

    def add(self, after: str, name: str, value: str) -> None:
        """Add an argument behind another one, unless it is given."""
        if name not in self.given:
            slot, argument = self._find(after)
            slot.insert(slot.index(argument) + 1, made(name, cst.parse_expression(value)))
            self._changed = True

    def append(self, name: str, value: str) -> None:
        """Add an argument at the end, unless it is given."""
        if name not in self.given:
            self._slots.append([made(name, cst.parse_expression(value))])
            self._changed = True

    def add_callback(self, instead_of: str, value: cst.BaseExpression) -> bool:
        """Put one more into ``callbacks``, in place of another argument. False if ``callbacks`` is not known to be a list."""
        if "callbacks" not in self.given:
            slot, argument = self._find(instead_of)
            slot[slot.index(argument)] = argument.with_changes(keyword=cst.Name("callbacks"), value=in_list(value))
            self._changed = True
            return True
        slot, argument = self._find("callbacks")
        kept = argument.value
        if literal(kept) is None:
            new: cst.BaseExpression = in_list(value)
        elif isinstance(kept, cst.List):
            new = _longer(kept, value)
        elif isinstance(kept, cst.Call) and (self.facts.meaning(self._calls_of("callbacks")) or "").startswith(
            "leyden.callbacks."
        ):
            new = cst.List([cst.Element(kept), cst.Element(value)])
        elif isinstance(self.facts.value_of(self._before.get("callbacks", kept)), (cst.List, cst.ListComp)):
            new = cst.List([cst.StarredElement(kept), cst.Element(value)])
        else:
            return False
        slot[slot.index(argument)] = argument.with_changes(value=new)
        self.drop(instead_of)
        return True

    def _calls_of(self, name: str) -> cst.CSTNode:
        value = self._before.get(name)
        return value.func if isinstance(value, cst.Call) else self.original

    def note(self, name: str, why: str, write: str) -> None:
        """Leave an argument to a person."""
        for argument in self.original.args:
            if argument.keyword is not None and argument.keyword.value == name:
                self.note_at(argument, f"{name}={code(argument.value)}", why, write)
                return
        self.note_at(self.original, name, why, write)

    def note_at(self, node: cst.CSTNode, what: str, why: str, write: str) -> None:
        """Leave a place to a person."""
        self._notes.add(self.facts.line(node), " ".join(what.split()), why, write)

    def call(self) -> cst.Call:
        """The call with its arguments as they are now."""
        if not self._changed:
            return self.updated
        arguments = _joined(self._slots, self.updated.args)
        before = self.updated.whitespace_before_args if arguments else cst.SimpleWhitespace("")
        for slot, argument in zip(self._slots, self.updated.args, strict=False):
            comma = argument.comma
            space = comma.whitespace_after if isinstance(comma, cst.Comma) else None
            if slot or not isinstance(space, cst.ParenthesizedWhitespace):
                break
            if isinstance(before, cst.ParenthesizedWhitespace):
                before = _with_lines(before, space)
        return self.updated.with_changes(args=arguments, whitespace_before_args=before)

    def _find(self, name: str) -> tuple[list[cst.Arg], cst.Arg]:
        for slot in self._slots:
            for argument in slot:
                if argument.keyword is not None and argument.keyword.value == name:
                    return slot, argument
        raise KeyError(name)


def made(name: str, value: cst.BaseExpression) -> cst.Arg:
    """``name=value``."""
    bare = cst.SimpleWhitespace("")
    return cst.Arg(value, keyword=cst.Name(name), equal=cst.AssignEqual(bare, bare))


def in_list(value: cst.BaseExpression) -> cst.List:
    """``[value]``."""
    return cst.List([cst.Element(value)])


def is_unknown(value: object) -> bool:
    """Whether `literal` could not tell."""
    return value is UNKNOWN


def _joined(slots: Sequence[Sequence[cst.Arg]], before: Sequence[cst.Arg]) -> list[cst.Arg]:
    """One list again: where one argument became two they share a line; the last one gets what stood before the bracket."""
    apart = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    bare = cst.SimpleWhitespace("")
    joined: list[cst.Arg] = []
    for number, slot in enumerate(slots):
        comma = before[number].comma if number < len(before) else cst.MaybeSentinel.DEFAULT
        comma = comma if isinstance(comma, cst.Comma) else _next_line(before, apart)
        space = before[number].whitespace_after_arg if number < len(before) - 1 else bare
        joined += [each.with_changes(comma=apart, whitespace_after_arg=bare) for each in slot[:-1]]
        joined += [each.with_changes(comma=comma, whitespace_after_arg=space) for each in slot[-1:]]
        if not slot and joined and number < len(before) - 1:
            joined[-1] = joined[-1].with_changes(comma=_merged(joined[-1].comma, comma))
    if joined and before:
        last, own = before[-1], joined[-1].comma
        moved = not slots[len(before) - 1] or len(slots) > len(before)
        end = closing_comma(last.comma, own) if moved else last.comma
        joined[-1] = joined[-1].with_changes(comma=end, whitespace_after_arg=last.whitespace_after_arg)
    elif joined:
        joined[-1] = joined[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return joined


def closing_comma(
    last: cst.Comma | cst.MaybeSentinel, own: cst.Comma | cst.MaybeSentinel
) -> cst.Comma | cst.MaybeSentinel:
    """What stands behind an element that has become the last one: what did behind the former last one, with its own comment."""
    if not isinstance(last, cst.Comma) and isinstance(own, cst.Comma):
        space = own.whitespace_after
        commented = isinstance(space, cst.ParenthesizedWhitespace) and space.first_line.comment is not None
        return own if commented else last
    return _with_comment_of(last, own)


def _merged(comma: cst.Comma | cst.MaybeSentinel, dropped: cst.Comma) -> cst.Comma | cst.MaybeSentinel:
    """The comma before an argument that is left out: it ends the line if the other did, and keeps the comments below it."""
    if not isinstance(dropped.whitespace_after, cst.ParenthesizedWhitespace) or not isinstance(comma, cst.Comma):
        return comma
    if not isinstance(comma.whitespace_after, cst.ParenthesizedWhitespace):
        return _with_comment_of(dropped, comma)
    return comma.with_changes(whitespace_after=_with_lines(comma.whitespace_after, dropped.whitespace_after))


def _with_lines(
    space: cst.ParenthesizedWhitespace, dropped: cst.ParenthesizedWhitespace
) -> cst.ParenthesizedWhitespace:
    lines = [*space.empty_lines, *(line for line in dropped.empty_lines if line.comment is not None)]
    return space.with_changes(empty_lines=lines)


def _ends_line(comma: cst.Comma | cst.MaybeSentinel) -> bool:
    return isinstance(comma, cst.Comma) and isinstance(comma.whitespace_after, cst.ParenthesizedWhitespace)


def _with_comment_of(
    comma: cst.Comma | cst.MaybeSentinel, other: cst.Comma | cst.MaybeSentinel
) -> cst.Comma | cst.MaybeSentinel:
    """A comma with the line end of its own, and the comment of another one."""
    if not isinstance(comma, cst.Comma) or not isinstance(comma.whitespace_after, cst.ParenthesizedWhitespace):
        return comma
    line = cst.TrailingWhitespace(newline=comma.whitespace_after.first_line.newline)
    if isinstance(other, cst.Comma) and isinstance(other.whitespace_after, cst.ParenthesizedWhitespace):
        line = other.whitespace_after.first_line
    return comma.with_changes(whitespace_after=comma.whitespace_after.with_changes(first_line=line))


def _next_line(before: Sequence[cst.Arg], apart: cst.Comma) -> cst.Comma:
    """The comma that stood between two arguments, without its comment."""
    inner = [each.comma for each in before[:-1] if isinstance(each.comma, cst.Comma)]
    found = _with_comment_of(inner[-1], apart) if inner else apart
    assert isinstance(found, cst.Comma)
    return found


def _longer(kept: cst.List, value: cst.BaseExpression) -> cst.List:
    if not kept.elements:
        return kept.with_changes(elements=[cst.Element(value)])
    last = kept.elements[-1]
    inner = [each.comma for each in kept.elements[:-1] if isinstance(each.comma, cst.Comma)]
    between = inner[-1] if inner else cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    return kept.with_changes(
        elements=[*kept.elements[:-1], last.with_changes(comma=between), cst.Element(value, comma=last.comma)]
    )
