"""`tnpeft edit` and `tnpeft lsp` where they cannot begin; tests/wide has them in a browser and over the protocol."""

from __future__ import annotations

from pathlib import Path

import pytest
from packages import packages_after
from terminal import mistakes

from tnpeft import errors


def test_without_the_extra_the_line_for_pip_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    assert mistakes("edit", "lora") == [
        "edit: expected the package nicegui, found none installed. Run `pip install 'tnpeft[edit]'`."
    ]
    assert mistakes("lsp") == [
        "lsp: expected the package pygls, found none installed. Run `pip install 'tnpeft[lsp]'`."
    ]


def test_what_cannot_be_edited_is_said_before_anything_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(errors, "find_spec", lambda name: object())
    assert mistakes("edit", tmp_path / "no" / "a.yaml") == [
        f"{tmp_path / 'no'}: edit: expected a folder that exists, found none. Make the folder first, or name another."
    ]
    assert mistakes("edit", "--from", "lorra") == [
        "spec 'lorra': expected a YAML file, or the name of a shipped spec, found neither. Did you mean `lora`?"
    ]


def test_a_layer_for_the_language_server_is_read_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: object())
    assert mistakes("lsp", "--layer", "Conv3d", status=2) == [
        "--layer Conv3d: the layer's numbers: expected in,out,k or in,out,kxkxk[,groups=g], found ''. "
        "Write it like Conv3d:64,128,3."
    ]


def test_the_package_loads_no_page():
    assert not {"nicegui", "pygls", "fastapi"} & packages_after("import tnpeft, tnpeft.cli.app")
