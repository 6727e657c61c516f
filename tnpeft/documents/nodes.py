"""From YAML text to a tree of nodes that remember their places.

Only the pure-Python loader's event stream is used: the C loader crashes at 30,000 nested brackets, and
events can be bounded before anything is built. Scalars follow the YAML 1.2 core schema, so that
`no` and `on` are words and `1e-3` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tnpeft.errors import Position, Problem, Problems, SpecError, clip, in_one_line, shown_path

__all__ = ["MAX_BYTES", "Node", "read_bytes", "read_document", "read_file"]

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_NODES = 8_000  # after aliases are expanded
MAX_CHARACTERS = MAX_BYTES  # of all scalars, after aliases are expanded

_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Node:
    """A YAML node: `value` is a scalar, a tuple of nodes, or a tuple of (key, value) node pairs.

    `kind` is "scalar", "list" or "mapping"; `text` is a scalar as written.
    """

    kind: str
    value: Any
    position: Position
    text: str = ""
    style: str | None = field(default=None, repr=False)

    def at(self, offset: int) -> Position:
        """The position of a character inside a scalar, or that of the scalar if it cannot be known."""
        if self.style in ("|", ">") or "\n" in self.text:
            return self.position
        quote = 1 if self.style in ("'", '"') else 0
        return Position(self.position.file, self.position.line, self.position.column + quote + offset)

    def words(self) -> Iterator[tuple[str, Position]]:
        """The blank-separated words of a scalar with their places."""
        for match in re.finditer(r"\S+", self.text):
            yield match.group(), self.at(match.start())

    def items(self) -> tuple[tuple[Node, Node], ...]:
        """The pairs of a mapping; none for other nodes."""
        return tuple(self.value) if self.kind == "mapping" else ()

    def get(self, key: object) -> Node | None:
        """The value under `key` of a mapping, or the item at an index of a list."""
        if self.kind == "list" and isinstance(key, int) and 0 <= key < len(self.value):
            item: Node = self.value[key]
            return item
        return next((value for name, value in self.items() if name.value == key), None)

    def key(self, key: object) -> Node | None:
        """The node of a mapping's key."""
        return next((name for name, _ in self.items() if name.value == key), None)

    def along(self, path: Iterable[str | int]) -> tuple[Node, ...]:
        """The nodes along a path, this one first, as far as they exist."""
        nodes = [self]
        for step in path:
            below = nodes[-1].get(step)
            if below is None:
                break
            nodes.append(below)
        return tuple(nodes)

    def plain(self) -> Any:
        """The node as dicts, lists and scalars."""
        if self.kind == "mapping":
            return {key.value: value.plain() for key, value in self.value}
        if self.kind == "list":
            return [item.plain() for item in self.value]
        return self.value

    def describe(self) -> str:
        """The node in words, for "found ..."."""
        if self.kind == "mapping":
            return "a mapping"
        if self.kind == "list":
            return "a list"
        return "nothing" if self.value is None else clip(self.text if isinstance(self.value, str) else self.value)


def read_bytes(path: Path, what: str = "spec") -> bytes:
    """The first `MAX_BYTES` bytes of a file, and one more if there are more; raises SpecError."""
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = Problem(f"cannot read this {what}", "a readable file", reason, "Check the path.", shown_path(path))
        raise SpecError(problem) from error


def read_file(path: Path, what: str = "spec") -> Node:
    """Read a YAML file of at most `MAX_BYTES` bytes; raises SpecError for whatever is wrong with it."""
    return read_document(read_bytes(path, what), str(path))


def read_document(data: str | bytes, file: str = "<spec>") -> Node:
    """Parse one YAML document; raises SpecError for syntax, bounds, tags and duplicate keys, each with its place."""
    text = _decode(data, file)
    reader = _Reader(file)
    try:
        root = reader.read(text)
    except SpecError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Position(file, mark.line + 1, mark.column + 1) if mark else Position(file, 1, 1)
        found = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise _syntax(where, found) from None
    except yaml.reader.ReaderError as error:
        where = _place(text, error.position, file)
        raise _syntax(
            where, f"a character that YAML forbids, {clip(text[error.position : error.position + 1])}"
        ) from None
    # PyYAML's scanner lets these through: "\UFFFFFFFF" (ValueError, OverflowError) and %YAML with a huge number.
    except (yaml.YAMLError, ValueError, OverflowError):
        raise _syntax(Position(file, 1, 1), "an escape or a number beyond its range") from None
    reader.problems.raise_if_any()
    return root


def _decode(data: str | bytes, file: str) -> str:
    size = len(data)
    if size > MAX_BYTES:
        problem = ("the file is too large", f"at most {MAX_BYTES} bytes", "more", "Split it into several files.")
        raise SpecError(Problem(*problem, where=Position(file, 1, 1)))
    if isinstance(data, str):
        return data.removeprefix("\ufeff")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        where = _place(before, len(before), file)
        raise SpecError(
            Problem("not a text file", "UTF-8", f"byte 0x{data[error.start]:02x}", "Save it as UTF-8.", where)
        ) from None


def _place(text: str, offset: int, file: str) -> Position:
    head = text[:offset]
    return Position(file, head.count("\n") + 1, offset - (head.rfind("\n") + 1) + 1)


def _syntax(where: Position, found: str) -> SpecError:
    return SpecError(Problem("not valid YAML", "one YAML document", in_one_line(found), "Mend the syntax here.", where))


class _Reader:
    """From events to nodes; every bound is checked before a node is kept."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems = Problems()
        self.anchors: dict[str, Node] = {}
        self.sizes: dict[int, tuple[int, int]] = {}  # nodes and characters of an anchored node, by id
        self.count = self.characters = 0

    def read(self, text: str) -> Node:
        loader: Any = yaml.SafeLoader(text)  # its methods carry no types
        try:
            loader.get_event()  # the stream's start
            if loader.check_event(yaml.StreamEndEvent):
                raise SpecError(
                    Problem("the file is empty", "a mapping", "nothing", "Write `tnpeft: 1` first.", self._at(None))
                )
            loader.get_event()  # the document's start
            root = self._node(loader, 0)
            loader.get_event()  # the document's end
            if not loader.check_event(yaml.StreamEndEvent):
                where = self._at(loader.peek_event())
                problem = ("a second document", "one document per file", "`---`", "Put it in a file of its own.")
                raise SpecError(Problem(*problem, where=where))
            return root
        finally:
            loader.dispose()

    def _at(self, event: Any) -> Position:
        mark = getattr(event, "start_mark", None)
        return Position(self.file, mark.line + 1, mark.column + 1) if mark else Position(self.file, 1, 1)

    def _node(self, loader: Any, depth: int) -> Node:
        event = loader.get_event()
        where = self._at(event)
        self._bound(where, 1, len(event.value) if isinstance(event, yaml.ScalarEvent) else 0, depth)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, where)
        if event.tag not in (None, "!"):
            self.problems.add(where, "a tag", "plain YAML", clip(event.tag), "Remove the tag.")
        before, characters = self.count, self.characters
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event, where)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Node("list", self._items(loader, yaml.SequenceEndEvent, depth), where)
        else:
            node = self._mapping(loader, where, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
            text = len(node.text) if node.kind == "scalar" else self.characters - characters
            self.sizes[id(node)] = (self.count - before + 1, text)
        return node

    def _bound(self, where: Position, nodes: int, characters: int, depth: int) -> None:
        self.count += nodes
        self.characters += characters
        fix = "A spec is a small file; write it out flat."
        if depth > MAX_DEPTH:
            raise SpecError(Problem("nested too deeply", f"at most {MAX_DEPTH} levels", "more", fix, where))
        if self.count > MAX_NODES:
            raise SpecError(Problem("too many values", f"at most {MAX_NODES} with aliases", "more", fix, where))
        if self.characters > MAX_CHARACTERS:
            expected = f"at most {MAX_CHARACTERS} characters with aliases"
            raise SpecError(Problem("too much text", expected, "more", fix, where))

    def _alias(self, event: Any, where: Position) -> Node:
        node = self.anchors.get(event.anchor)
        if node is None:
            fix = "Define the anchor first; it cannot stand inside itself."
            raise SpecError(Problem(f"alias {clip(event.anchor)}", "an anchor above", "none", fix, where))
        self._bound(where, *self.sizes[id(node)], 0)
        return node

    def _items(self, loader: Any, end: type, depth: int) -> tuple[Node, ...]:
        items = []
        while not loader.check_event(end):
            items.append(self._node(loader, depth + 1))
        loader.get_event()
        return tuple(items)

    def _mapping(self, loader: Any, where: Position, depth: int) -> Node:
        flat = self._items(loader, yaml.MappingEndEvent, depth)
        seen: dict[object, Node] = {}
        pairs = []
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if key.kind != "scalar":
                self.problems.add(key.position, "a key", "a word", key.describe(), "Write a plain word as the key.")
            elif key.value in seen:
                first = seen[key.value].position
                found = f"it again, first on line {first.line}"
                self.problems.add(
                    key.position, f"key {clip(key.text)}", "each key once", found, "Remove one of the two."
                )
            else:
                seen[key.value] = key
                pairs.append((key, value))
        return Node("mapping", tuple(pairs), where)

    def _scalar(self, event: Any, where: Position) -> Node:
        text: str = event.value
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            self.problems.add(where, "a text", "Unicode characters", "half of one (a surrogate)", "Remove it.")
            text = text.encode("ascii", "replace").decode()
        value = self._resolve(text, where) if event.implicit[0] and not event.style else text
        return Node("scalar", value, where, text, event.style)

    def _resolve(self, text: str, where: Position) -> Any:
        """A plain scalar by the core schema of YAML 1.2 (section 10.3)."""
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        if _INT.fullmatch(text):
            if len(text) > 18:
                self.problems.add(where, "a number", "at most 18 digits", clip(text), "Write a smaller number.")
                return 0
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if _FLOAT.fullmatch(text):
            return float(text)
        if _NOT_FINITE.fullmatch(text):
            return float(text.lower().replace(".", ""))
        return text
