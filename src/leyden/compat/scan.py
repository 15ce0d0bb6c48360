"""A look through a pickle, operation by operation, before it is unpickled: what of it no checkpoint has is refused.

The unpickler may take the interpreter down, or all its time: hashing a tuple of a million levels overflows the stack, and hashing
one of 30 levels that each hold the level below twice takes 2³⁰ steps, out of some 100 bytes. So it is followed how deep each
object is, and how many parts it has when what it shares is counted each time.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from leyden.errors import CheckpointError

__all__ = ["said", "scan"]

_OPCODES = frozenset(each.name for each in pickletools.opcodes if each.proto) - {
    "EXT1", "EXT2", "EXT4", "OBJ", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER",
} | {"APPEND", "BUILD", "DICT", "DUP", "GLOBAL", "LIST", "MARK", "NONE", "POP", "REDUCE", "SETITEM", "STOP", "TUPLE"}  # fmt: skip
"""The rest is text of protocol 0, looks names up elsewhere, or takes memory that the file need not have."""
_PUTS = frozenset({"BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"BINGET", "LONG_BINGET"})
_GROWS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
"""These put what they pop into the object before it, which stays."""
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_CALLS = frozenset({"REDUCE", "FROZENSET", "NEWOBJ", "NEWOBJ_EX", "BINPERSID", "DICT"})
"""These may hash what they pop, and what is in a list of it."""
_MAX_DEPTH = 1000
_MAX_PARTS = 1_000_000
_MAX_WORK = 10 * _MAX_PARTS


def said(value: Any, length: int = 60) -> str:
    """A value in a few words, for messages: never longer for being nested, long or shared."""
    if isinstance(value, (str, bytes)):
        return repr(value[:length])
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, complex)):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__[:length]}"
    if isinstance(value, (list, tuple)):
        scalars = value[:4]
        if len(value) <= 4 and all(each is None or isinstance(each, (bool, int, float, str)) for each in scalars):
            inside = ", ".join(said(each, length // 4) for each in scalars)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        return f"a {type(value).__name__[:length]} of {len(value)}"
    return f"a {type(value).__name__[:length]}"


class _Object:
    """What is known of an object on the stack.

    Attributes:
        depth: how deep it is nested.
        parts: how many objects a walk through it meets, as hashing does; what can be changed is not hashed, and counts 1.
        inside: the parts of what it holds that can be changed: what a call that is given it may hash.
    """

    __slots__ = ("depth", "inside", "parts")

    def __init__(self, depth: int = 0, parts: int = 1, inside: int = 0) -> None:
        self.depth, self.parts, self.inside = depth, parts, inside


def _effect(opcode: pickletools.OpcodeInfo) -> tuple[int, bool, int]:
    """How many objects an operation takes, beside all down to the last mark; whether it does that; how many it puts back."""
    before = opcode.stack_before
    to_mark = pickletools.markobject in before
    return len(before) - 2 * to_mark, to_mark, len(opcode.stack_after)


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}
"""``STOP`` and the operations that push a constant among them."""


def scan(stream: BinaryIO) -> None:
    """Go through a pickle without doing what it says; afterwards the stream stands at its end.

    Raises:
        CheckpointError: it ends early, or has what no file of ours has.
    """
    stack: list[_Object | None] = []  # None is a mark
    memo: dict[int, _Object] = {}
    work = 0
    for count, (opcode, argument, _) in enumerate(_operations(stream)):
        name = opcode.name
        if name not in _OPCODES:
            raise CheckpointError(f"malformed: the pickle operation {name}, which torch.save does not write")
        if name in _GETS:
            stack.append(memo.get(argument) or _Object())
        elif name in _PUTS or name == "MEMOIZE":
            index = len(memo) if name == "MEMOIZE" else argument
            if not (isinstance(index, int) and 0 <= index <= count):
                raise CheckpointError("malformed: it notes an object beyond all that it has")  # which would take memory
            memo[index] = (stack[-1] if stack else None) or _Object()
        elif name == "MARK":
            stack.append(None)
        elif name == "DUP":
            stack.append((stack[-1] if stack else None) or _Object())
        else:
            parts = _move(stack, name)
            work += 0 if name in _TUPLES else parts
            # what is not shared takes an operation for each part, so a large file may have as many, on a few levels
            if parts > _MAX_PARTS + count or work > _MAX_WORK + 8 * count:
                raise CheckpointError("made to do harm: a few objects in it, shared over and over, expand to millions")


def _move(stack: list[_Object | None], name: str) -> int:
    """Do to the stack what an operation does to its objects; what it pushes contains what it pops.

    Returns:
        How many parts a walk through what it does meets.
    """
    pops, to_mark, pushes = _EFFECTS[name]
    grows = name in _GROWS
    deepest, parts, inside = -1, 0, 0
    taken: list[_Object] = []
    while to_mark and stack and (each := stack.pop()) is not None:
        taken.append(each)
    for _ in range(min(pops - grows, len(stack))):
        taken.append(stack.pop() or _Object())
    for each in taken:
        deepest, parts, inside = max(deepest, each.depth), parts + each.parts, inside + each.inside
    if deepest > _MAX_DEPTH:
        raise CheckpointError("its data is nested too deeply")
    inside = min(inside, 2 * _MAX_WORK)  # saturated: objects that contain each other would double it without end
    if grows:
        if stack and (container := stack[-1]) is not None:
            container.depth = max(container.depth, deepest + 1)
            container.inside = min(container.inside + parts + inside, 2 * _MAX_WORK)
        return parts
    if name == "LIST":
        parts, inside = 0, min(inside + parts, 2 * _MAX_WORK)
    elif name in _CALLS:
        parts, inside = parts + inside, 0
    if pushes:
        stack.append(_Object(deepest + 1, parts + 1, inside))
    return parts if name in _CALLS or name in _TUPLES else 0


def _operations(stream: BinaryIO) -> Iterator[tuple[Any, Any, Any]]:
    try:
        yield from pickletools.genops(stream)
    except (ValueError, EOFError, struct.error, DeprecationWarning) as error:  # a warning of text with odd escapes
        raise CheckpointError(f"the file is cut short or damaged: {error!s:.200}") from None
