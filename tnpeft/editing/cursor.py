"""Where a cursor stands in a text that may be broken: the keys above it, and the word that is being written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Cursor", "cursor_at", "word_at"]

_KEY = re.compile(r"""(?P<indent>[ ]*)(?P<items>(?:-[ ]+)*)(?:(?P<quote>["'])(?P<quoted>.*?)(?P=quote)|(?P<plain>[^\s#:"'{}\[\],][^#:"'{}\[\],]*?))[ ]*:(?:[ ]|$)""")  # fmt: skip # noqa: E501
_WORD = re.compile(r"[A-Za-z0-9_.]*$")
_WORDS = re.compile(r"[A-Za-z0-9_]+(\.\.\.)?")
ITEM = "-"  # a step into a list


@dataclass(frozen=True)
class Cursor:
    """`path` has the keys that lead to the mapping (for a key) or to the value, `word` the text before the cursor.

    `keys` are those that the mapping already has above the cursor.
    """

    place: str  # "key", "value" or "comment"
    path: tuple[str, ...]
    word: str
    keys: frozenset[str]
    start: int  # the column, from 0, where the word begins


def cursor_at(text: str, line: int, column: int) -> Cursor:
    """The cursor before the character `column` of `line`, both from 1."""
    lines, line = text.split("\n"), max(line, 1)
    above, head = lines[: line - 1], (lines[line - 1] if line <= len(lines) else "")[: max(column - 1, 0)]
    flow = _Flow(_Block(above, head))
    word = _WORD.search(head)
    assert word is not None
    if flow.in_comment:
        return Cursor("comment", (), "", frozenset(), len(head))
    if flow.frames:
        path, place, keys = flow.here()
        return Cursor(place, path, word.group(), frozenset(keys), word.start())
    path, place, keys = flow.block.here()
    return Cursor(place, path, word.group(), frozenset(keys), word.start())


def word_at(text: str, line: int, column: int) -> tuple[str, int, int] | None:
    """The word at a place, and the columns, from 1, of its first character and after its last."""
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        return None
    for match in _WORDS.finditer(lines[line - 1]):
        if match.start() < column <= match.end() or match.start() == column - 1:
            return match.group(), match.start() + 1, match.end() + 1
    return None


class _Block:
    """The keys of block mappings above a line, by their indentation."""

    def __init__(self, above: list[str], head: str) -> None:
        self.head = head
        self.lines = above
        self.stack: list[tuple[int, str]] = []
        self.siblings: dict[tuple[str, ...], list[str]] = {}
        depth = 0
        for line in above:
            if depth == 0:
                self.enter(line)
            depth = max(0, depth + _opened(line))
        self.depth = depth

    def enter(self, line: str) -> None:
        match = _KEY.match(line)
        if match is None:
            return
        indent = len(match["indent"]) + len(match["items"])
        self.leave(indent, bool(match["items"]))
        if match["items"]:
            self.stack.append((indent - 1, ITEM))
        name = match["quoted"] if match["quote"] else match["plain"]
        above = self.path
        if match["items"]:
            self.siblings.pop(above, None)
        self.siblings.setdefault(above, []).append(name)
        self.stack.append((indent, name))

    def leave(self, indent: int, item: bool) -> None:
        while self.stack and (self.stack[-1][0] >= indent or (item and self.stack[-1][1] == ITEM)):
            self.stack.pop()

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.stack)

    def here(self) -> tuple[tuple[str, ...], str, list[str]]:
        match = _KEY.match(self.head)
        if match is not None:
            self.enter(self.head)
            return self.path, "value", []
        bare = self.head.lstrip(" ")
        items = re.match(r"(-[ ]+)*", bare)
        assert items is not None
        indent = len(self.head) - len(bare) + items.end()
        self.leave(indent, bool(items.end()))
        path = (*self.path, ITEM) if items.end() else self.path
        return path, "key", self.siblings.get(path, []) if not items.end() else []


@dataclass
class _Frame:
    """An open bracket: its key path, and the keys in it so far."""

    path: tuple[str, ...]
    is_list: bool
    keys: list[str]
    key: str | None = None
    text: str = ""


class _Flow:
    """The brackets that are open at the cursor."""

    def __init__(self, block: _Block) -> None:
        self.block = block
        self.frames: list[_Frame] = []
        self.in_comment = False
        first = len(block.lines)
        depth = 0
        while first and block.depth:  # back to the line in which the outermost bracket opens
            first -= 1
            depth += _opened(block.lines[first])
            if depth >= block.depth and _KEY.match(block.lines[first]):
                break
        for line in [*block.lines[first:], block.head]:
            self._read(line)

    def _read(self, line: str) -> None:
        self.in_comment = False
        match = _KEY.match(line) if not self.frames else None
        base = len(match.group()) if match else 0
        if match and line is self.block.head:
            self.block.enter(line)
        elif not self.frames and (item := re.match(r"[ ]*(-[ ]+)+(?=[{\[])", line)):
            self.block.leave(item.end(), True)
            self.block.stack.append((item.end() - 1, ITEM))
        for kind, text in _tokens(line[base:]):
            if kind == "comment":
                self.in_comment = True
            elif text in "{[" and kind == "mark":
                self.frames.append(_Frame(self._below(), text == "[", []))
            elif text in "}]" and kind == "mark":
                if self.frames:
                    self.frames.pop()
            elif self.frames:
                self._take(kind, text)

    def _take(self, kind: str, text: str) -> None:
        frame = self.frames[-1]
        if kind == "mark" and text == ",":
            frame.key, frame.text = None, ""
        elif kind == "mark" and text == ":" and frame.key is None and not frame.is_list:
            frame.key, frame.text = frame.text.strip().strip("\"'"), ""
            frame.keys.append(frame.key)
        else:
            frame.text += text

    def _below(self) -> tuple[str, ...]:
        """The path of a bracket that opens now."""
        if not self.frames:
            return self.block.path
        frame = self.frames[-1]
        return (*frame.path, ITEM) if frame.is_list else (*frame.path, frame.key or "")

    def here(self) -> tuple[tuple[str, ...], str, list[str]]:
        frame = self.frames[-1]
        if frame.is_list:
            return (*frame.path, ITEM), "value", []
        if frame.key is None:
            return frame.path, "key", frame.keys
        return (*frame.path, frame.key), "value", []


_TOKENS = re.compile(r""""(?:[^"\\]|\\.)*"?|'[^']*'?|(?<![^\s])#.*|[{}\[\],]|:(?=\s|$)|[^"'#{}\[\],:]+|.""")


def _tokens(line: str) -> Iterator[tuple[str, str]]:
    for match in _TOKENS.finditer(line):
        text = match.group()
        if text.startswith("#"):
            yield "comment", text
            return
        yield ("mark" if text in ("{", "}", "[", "]", ",", ":") else "text"), text


def _opened(line: str) -> int:
    """How many brackets a line opens more than it closes."""
    marks = [text for kind, text in _tokens(line) if kind == "mark"]
    return sum(mark in "{[" for mark in marks) - sum(mark in "}]" for mark in marks)
