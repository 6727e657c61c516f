"""`tnpeft lsp` over the protocol: a client that writes and reads its frames by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tnpeft.editing.document import NEW

pytest.importorskip("pygls")

ROOT = Path(__file__).parents[2]


class Client:
    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tnpeft", "lsp", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.numbers = 0
        self.told: list[dict[str, Any]] = []
        self.capabilities = self.ask("initialize", {"processId": None, "rootUri": None, "capabilities": {}})
        self.tell("initialized", {})

    def send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        length = 0
        while line := self.process.stdout.readline().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        return json.loads(self.process.stdout.read(length))

    def tell(self, method: str, params: dict[str, Any]) -> None:
        self.send({"method": method, "params": params})

    def ask(self, method: str, params: Any) -> Any:
        self.numbers += 1
        self.send({"id": self.numbers, "method": method, "params": params})
        while True:
            answer = self.read()
            if answer.get("id") == self.numbers:
                assert "error" not in answer, answer
                return answer["result"]
            self.told.append(answer)

    def diagnostics(self) -> list[dict[str, Any]]:
        """Those that are published next."""
        while True:
            for number, told in enumerate(self.told):
                if told.get("method") == "textDocument/publishDiagnostics":
                    del self.told[: number + 1]
                    return list(told["params"]["diagnostics"])
            self.told.append(self.read())

    def open(self, uri: str, text: str) -> list[dict[str, Any]]:
        document = {"uri": uri, "languageId": "yaml", "version": 1, "text": text}
        self.tell("textDocument/didOpen", {"textDocument": document})
        return self.diagnostics()

    def change(self, uri: str, version: int, *changes: dict[str, Any]) -> list[dict[str, Any]]:
        document = {"uri": uri, "version": version}
        self.tell("textDocument/didChange", {"textDocument": document, "contentChanges": list(changes)})
        return self.diagnostics()

    def at(self, method: str, uri: str, line: int, character: int) -> Any:
        place = {"line": line, "character": character}
        return self.ask(f"textDocument/{method}", {"textDocument": {"uri": uri}, "position": place})

    def end(self) -> int:
        self.ask("shutdown", None)
        self.send({"method": "exit"})
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    client = Client("--layer", "Conv2d:8,6,3")
    yield client
    assert client.end() == 0


def span(line: int, start: int, end: int) -> dict[str, Any]:
    return {"start": {"line": line, "character": start}, "end": {"line": line, "character": end}}


def test_it_says_what_it_can(client: Client):
    found = client.capabilities["capabilities"]
    assert found["hoverProvider"]
    assert found["completionProvider"]["triggerCharacters"] == [":", " ", "{", "["]


def test_mistakes_come_and_go(client: Client, tmp_path: Path):
    uri = (tmp_path / "a.yaml").as_uri()
    (found,) = client.open(uri, NEW.replace("zeros", "zeos"))
    assert found["range"] == span(7, 26, 30)
    assert found["message"].startswith("unknown init 'zeos': expected one of zeros")
    assert (found["severity"], found["source"]) == (1, "tnpeft")
    assert client.change(uri, 2, {"range": span(7, 26, 30), "text": "zeros"}) == []


def test_columns_are_counted_as_the_protocol_does(client: Client, tmp_path: Path):
    """A letter beyond the first 65,536 is two UTF-16 units."""
    uri = (tmp_path / "b.yaml").as_uri()
    text = NEW.replace("tnpeft: 1\n", 'tnpeft: 1\ntitle: "😀"\n').replace("start: zero", 'start: {"😀": zeo}')
    found = client.open(uri, text)
    lines = text.split("\n")
    for each in found:
        line = lines[each["range"]["start"]["line"]].encode("utf-16-le")
        start, end = (each["range"][side]["character"] for side in ("start", "end"))
        assert line[2 * start : 2 * end].decode("utf-16-le").strip()
    assert found


def test_recipes_are_checked_and_other_files_left_alone(client: Client, tmp_path: Path):
    recipe = "tnpeft: 1\nname: mine\nadapters:\n  - {spec: lorra, match: all}\n"
    (found,) = client.open((tmp_path / "recipe.yaml").as_uri(), recipe)
    assert "Did you mean `lora`?" in found["message"]
    assert found["range"] == span(3, 11, 16)
    uri = (tmp_path / "other.yaml").as_uri()
    assert client.open(uri, "services:\n  web: {image: x}\n") == []
    assert client.at("completion", uri, 1, 2) == []
    assert client.at("hover", uri, 1, 3) is None


@pytest.mark.parametrize(
    ("line", "character", "said"),
    [
        (6, 8, "index r = 4 on Conv2d(8, 6, 3x3): down, up"),
        (6, 2, "core down: 4 x 8 x 3 x 3, legs r i k_1 k_2, kaiming_uniform"),
        (9, 1, "`zero`: one core starts as zeros"),
    ],
)
def test_hover(client: Client, tmp_path: Path, line: int, character: int, said: str):
    uri = (tmp_path / "c.yaml").as_uri()
    assert client.open(uri, NEW) == []
    found = client.at("hover", uri, line, character)
    assert said.partition(" k_1")[0] in found["contents"]["value"]
    assert found["range"]["start"]["line"] == line


def test_the_last_good_network_is_shown_while_there_is_a_mistake(client: Client, tmp_path: Path):
    uri = (tmp_path / "d.yaml").as_uri()
    client.open(uri, NEW)
    assert client.change(uri, 2, {"text": NEW.replace("start: zero", "start: one")})
    assert "index r = 4" in client.at("hover", uri, 6, 8)["contents"]["value"]


def test_completion(client: Client, tmp_path: Path):
    uri = (tmp_path / "e.yaml").as_uri()
    client.open(uri, NEW.replace("start: zero", "start: z"))
    (item,) = client.at("completion", uri, 9, 8)
    assert item["label"] == "zero"
    assert item["textEdit"] == {"range": span(9, 7, 8), "newText": "zero"}
    keys = [item["label"] for item in client.at("completion", uri, 10, 0)]
    assert "scale" in keys
    assert "start" not in keys


def test_what_does_not_fit_the_layer_is_told_too(tmp_path: Path):
    text = NEW.replace("params: {r: 4}\n", "").replace("i: in_channels}", "i: in_channels, r: in_channels // 100}")
    client = Client("--layer", "Linear:64,128")
    try:
        (found,) = client.open((tmp_path / "f.yaml").as_uri(), text)
    finally:
        assert client.end() == 0
    assert found["message"] == (
        "core 'down', index 'r', on Linear(64, 128): expected a size from 1 to 16777216, found 0. Change its size."
    )
    assert found["range"] == span(3, 44, 55)
