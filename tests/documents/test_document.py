"""YAML text to nodes: the core schema of YAML 1.2, places, bounds and refusals."""

from __future__ import annotations

import pytest
from timing import takes_less_than

from tnpeft.documents.nodes import MAX_BYTES, read_document, read_file
from tnpeft.errors import SpecError


def refused(text: str | bytes) -> str:
    with pytest.raises(SpecError) as caught:
        read_document(text, "f.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("tRUE", "tRUE"),
        ("null", None),
        ("~", None),
        ("1e-3", 0.001),
        ("1_000", "1_000"),
        ("012", 12),
        ("0o17", 15),
        ("0xff", 255),
        ("-7", -7),
        (".5", 0.5),
        ("5.", 5.0),
        (".inf", float("inf")),
        ("12:30", "12:30"),
        ("2001-01-01", "2001-01-01"),
        ("'3'", "3"),
        ('"true"', "true"),
    ],
)
def test_scalars_mean_what_a_yaml_12_reader_expects(text, value):
    found = read_document(f"a: {text}").get("a").value
    assert found == value
    assert type(found) is type(value)


def test_nodes_keep_their_places():
    root = read_document("a: 1\nb:\n  - x y\n  - 'p q'\n", "f.yaml")
    first, second = root.get("b").value
    assert str(first.position) == "f.yaml:3:5"
    assert [(word, str(where)) for word, where in first.words()] == [("x", "f.yaml:3:5"), ("y", "f.yaml:3:7")]
    assert [str(where) for _, where in second.words()] == ["f.yaml:4:6", "f.yaml:4:8"]


def test_aliases_repeat_a_value():
    assert read_document("a: &x [1, 2]\nb: *x").plain() == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml:1:1: the file is empty: expected a mapping, found nothing. Write `tnpeft: 1` first."),
        (
            "a: 1\na: 2",
            "f.yaml:2:1: key 'a': expected each key once, found it again, first on line 1. Remove one of the two.",
        ),
        ("[a]: 1", "f.yaml:1:1: a key: expected a word, found a list. Write a plain word as the key."),
        (
            "a: !!python/object/apply:os.system [echo]",
            "f.yaml:1:4: a tag: expected plain YAML, found 'tag:yaml.org,2002:python/object/apply:os.system'. "
            "Remove the tag.",
        ),
        (
            "a: 1\n---\nb: 2",
            "f.yaml:2:1: a second document: expected one document per file, found `---`. Put it in a file of its own.",
        ),
        (
            "a: *x",
            "f.yaml:1:4: alias 'x': expected an anchor above, found none. "
            "Define the anchor first; it cannot stand inside itself.",
        ),
        (
            "a: &x [*x]",
            "f.yaml:1:8: alias 'x': expected an anchor above, found none. "
            "Define the anchor first; it cannot stand inside itself.",
        ),
        (
            "a: 12345678901234567890",
            "f.yaml:1:4: a number: expected at most 18 digits, found '12345678901234567890'. Write a smaller number.",
        ),
        (
            "a: [1, 2",
            "f.yaml:1:9: not valid YAML: expected one YAML document, found while parsing a flow sequence "
            "expected ',' or ']', but got '<stream end>'. Mend the syntax here.",
        ),
        (
            b"a: \xff",
            "f.yaml:1:4: not a text file: expected UTF-8, found byte 0xff. Save it as UTF-8.",
        ),
        (
            "a: b\x07",
            "f.yaml:1:5: not valid YAML: expected one YAML document, found a character that YAML forbids, '\\x07'. "
            "Mend the syntax here.",
        ),
        (
            'a: "\\ud800"',
            "f.yaml:1:4: a text: expected Unicode characters, found half of one (a surrogate). Remove it.",
        ),
        (
            'a: "\\UFFFFFFFF"',
            "f.yaml:1:1: not valid YAML: expected one YAML document, found "
            "an escape or a number beyond its range. Mend the syntax here.",
        ),
    ],
)
def test_refusals(text, message):
    assert refused(text) == message


BOMBS = {
    "brackets": "[" * 60_000,
    "braces": "{a: " * 10_000,
    "dashes": "- " * 30_000,
    "question marks": "? " * 30_000,
    "keys": "\n".join(f"k{number}: 1" for number in range(6_000)),
    "items": "[" + "a," * 30_000 + "]",
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "size": "a" * (MAX_BYTES + 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_within_a_second(name):
    assert takes_less_than(1.0, lambda: refused(BOMBS[name]))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(SpecError) as caught:
        read_file(path)
    assert str(caught.value) == (
        f"{path}: cannot read this spec: expected a readable file, found No such file or directory. Check the path."
    )
