"""Whether a pickle makes tuples that take for ever to hash, found from its instructions, without making anything.

A tuple of twice the same tuple of twice the same tuple ... takes a few bytes and doubles the work at each level. As a
key of a dictionary it is hashed, which visits every part again.
"""

from __future__ import annotations

import pickletools
from typing import Any

__all__ = ["MAX_PARTS", "is_heavy"]

MAX_PARTS = 100_000
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")


def is_heavy(data: bytes) -> bool:
    """Whether a tuple has more than `MAX_PARTS` parts, with those of its parts; of a broken pickle the start counts."""
    stack: list[int | None] = []  # the parts of each value; None is a mark
    memo: dict[int, int] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if not _step(opcode, argument, stack, memo):
                return True
    except (ValueError, IndexError, TypeError, KeyError):
        pass  # torch says what is wrong with it
    return False


def _step(opcode: Any, argument: Any, stack: list[int | None], memo: dict[int, int]) -> bool:
    """What an instruction does to the stack; false where it makes too large a tuple."""
    name = opcode.name
    if name == "MARK":
        stack.append(None)
    elif name in _PUTS or name == "MEMOIZE":
        memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1] or 1
    elif name in _GETS:
        stack.append(memo[int(argument)])
    elif name == "DUP":
        stack.append(stack[-1])
    elif name == "TUPLE" or name in _TUPLES:
        parts = _since_mark(stack) if name == "TUPLE" else [stack.pop() for _ in range(_TUPLES[name])]
        stack.append(1 + sum(part or 1 for part in parts))
        return (stack[-1] or 0) <= MAX_PARTS
    else:
        if pickletools.markobject in opcode.stack_before:
            _since_mark(stack)
        before = opcode.stack_before
        fixed = before.index(pickletools.markobject) if pickletools.markobject in before else len(before)
        for _ in range(fixed):
            stack.pop()
        stack.extend(1 for _ in opcode.stack_after)
    return True


def _since_mark(stack: list[int | None]) -> list[int | None]:
    """Take everything down to the last mark off the stack, the mark too."""
    parts: list[int | None] = []
    while (part := stack.pop()) is not None:
        parts.append(part)
    return parts
