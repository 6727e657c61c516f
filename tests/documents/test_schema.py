"""What a schema knows of its files, and how a path leads through nodes."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from tnpeft.documents.nodes import read_document
from tnpeft.documents.schema import FilePart, keys_at


class Leaf(FilePart):
    size: int
    origin: str | None = Field(default=None, alias="from")


class Branch(FilePart):
    leaf: Leaf | None = None
    word: Literal["a", "b"] = "a"


class Whole(FilePart):
    leaf: Leaf
    one_of_two: str | Branch = ""
    several: list[Branch] | None = None
    pair: tuple[Leaf, ...] = ()
    named: dict[str, str | Branch] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ((), ["leaf", "one_of_two", "several", "pair", "named"]),
        (("leaf",), ["size", "from"]),
        (("one_of_two",), ["leaf", "word"]),
        (("several", 3), ["leaf", "word"]),
        (("pair", 0), ["size", "from"]),
        (("named", "any"), ["leaf", "word"]),
        (("named", "leaf"), ["leaf", "word"]),  # an entry that is called as a key of entries
        (("named", "leaf", "leaf"), ["size", "from"]),
        (("leaf", "size"), []),
        (("nothing", "there"), []),
    ],
)
def test_the_keys_at_a_path(path: tuple[str | int, ...], keys: list[str]):
    assert keys_at(Whole, path) == keys


def test_a_path_leads_as_far_as_there_are_nodes():
    root = read_document("a:\n  - {b: 1}\nc: 2\n", "f.yaml")
    assert [str(node.position) for node in root.along(("a", 0, "b"))] == [
        "f.yaml:1:1",
        "f.yaml:2:3",
        "f.yaml:2:5",
        "f.yaml:2:9",
    ]
    assert root.along(("a", 1, "b")) == root.along(("a",))
    assert root.along(("d",)) == (root,)
    key = root.key("c")
    assert key is not None
    assert str(key.position) == "f.yaml:3:1"
    assert root.key("d") is None
