"""`manifest.json`: the files of a data set, their split, sizes and checksums, as `prepare` wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from ddpm_lab.config.settings import Data
from ddpm_lab.data.reading import not_a_file
from ddpm_lab.support.durable import digest_of_file
from ddpm_lab.support.faults import MOST, LabError, fault, raise_all, reason
from tnpeft.documents.paths import is_folder
from tnpeft.errors import Position, Problem

__all__ = ["VERSION", "Entry", "Manifest", "Rejected", "compare", "read_manifest", "root_of"]

VERSION = 2
READABLE = (1, 2)  # the first had no volumes to test on
AGAIN = "Run `prepare` again."


class Part(BaseModel):
    """A part of the manifest; what another version or an editor added is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Entry(Part):
    """One volume, as it was when it was read to its end."""

    path: str  # below the root, with / between folders
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(gt=0)]
    shape: tuple[int, int, int]  # voxels, along the stored axes
    spacing: tuple[float, float, float]  # mm
    stratum: str | None = None  # where the split knows strata

    @field_validator("path")
    @classmethod
    def _below_the_root(cls, path: str) -> str:
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise ValueError("a path below the root")
        return path


class Rejected(Part):
    """A file that was found, and what is wrong with it."""

    path: str
    reason: str


class Manifest(Part):
    """The data of many runs: the same files and the same split for all."""

    version: Literal[1, 2]
    root: str
    layout: Literal["plain", "ukb", "adni", "ppmi", "brats"]
    seed: int
    validation_share: float
    test_share: float = 0.0
    train: Annotated[tuple[Entry, ...], Field(min_length=1)]
    validation: Annotated[tuple[Entry, ...], Field(min_length=1)]
    test: tuple[Entry, ...] = ()
    strata: str | None = None
    unseen: tuple[Entry, ...] = ()  # of strata that are held out whole
    rejected: tuple[Rejected, ...]
    outliers: tuple[Rejected, ...] = ()  # volumes that are used, and of which a few voxels lie far from the rest

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every volume, those that train first."""
        return self.train + self.validation + self.test + self.unseen

    @model_validator(mode="after")
    def _each_once(self) -> Manifest:
        seen: set[str] = set()
        for entry in self.entries:
            if entry.path in seen:
                raise ValueError(f"each file once, in one of the lists, not {entry.path!r} twice")
            seen.add(entry.path)
        return self


def read_manifest(data: Data) -> Manifest:
    """The manifest that `data` names; raises LabError where it is none, or `data` asks for other files or splits."""
    assert data.manifest is not None
    path = data.manifest
    try:
        if (kind := not_a_file(path)) is not None:
            raise fault(path, "`data.manifest`", "a readable manifest", kind, "Check the path, or run `prepare`.")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        fix = "Check the path, or run `prepare`."
        raise fault(path, "`data.manifest`", "a readable manifest", reason(error), fix) from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        _refuse_others(text, path)
        raise LabError(*(_problem(item, path) for item in error.errors(include_url=False)[:MOST])) from None
    raise_all(_conflicts(data, manifest), str(path))
    return manifest


def _refuse_others(text: str, path: Path) -> None:
    """Raise LabError for a text that is no JSON, and for manifests of another version: one line says it all."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        where = Position(str(path), error.lineno, error.colno)
        raise fault(where, "the manifest", "JSON", error.msg.lower(), AGAIN) from None
    version = values.get("version") if isinstance(values, dict) else None
    if version not in READABLE:
        found = f"version {json.dumps(version)}" if version is not None else "no version"
        raise fault(path, "the manifest", f"version {VERSION}", found, AGAIN)


def _problem(item: Any, path: Path) -> Problem:
    """One of pydantic's findings, at its key: `train.3.sha256`."""
    key = ".".join(str(part) for part in item["loc"]) or "manifest"
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    words = {
        "extra_forbidden": "no such key",
        "missing": "a value",
        "int_type": "a whole number",
        "float_type": "a number",
        "string_type": "a text",
        "string_pattern_mismatch": "64 hexadecimal digits",
        "too_short": "at least one file",
    }
    shown = "nothing" if item["type"] == "missing" else json.dumps(item["input"])
    found = shown if len(shown) <= 60 else shown[:57] + "..."
    return Problem(f"`{key}`", words.get(item["type"], message), found, AGAIN, str(path))


def _conflicts(data: Data, manifest: Manifest) -> Iterator[Problem]:
    """Settings beside the manifest that ask for something else; a default asks for nothing."""
    fix = f"Remove it, or run `prepare` with it: {data.manifest} has the files and the split."
    if data.keep is not None:
        yield Problem("a list of files", "none beside a manifest", str(data.keep), fix, "data.keep")
    made = {
        "layout": manifest.layout,
        "split_seed": manifest.seed,
        "validation_share": manifest.validation_share,
        "test_share": manifest.test_share,
        "strata": manifest.strata,
        "unseen": tuple(sorted({entry.stratum or "" for entry in manifest.unseen})),
    }
    for name in made:
        value = getattr(data, name)
        if value not in (made[name], Data.model_fields[name].default):
            yield Problem("a setting of the manifest", f"{made[name]}, as there", str(value), fix, f"data.{name}")


def root_of(data: Data, manifest: Manifest) -> Path:
    """The folder that the manifest's paths start from: `data.root` where the data moved."""
    root = data.root or Path(manifest.root)
    if not is_folder(root):
        where = "data.root" if data.root is not None else data.manifest
        fix = "Pass `--set data.root=FOLDER` where the data moved."
        raise fault(where, "the manifest's root", "a folder", f"none at {root}", fix)
    return root


def compare(root: Path, entry: Entry, contents: bool = False) -> Problem | None:
    """What changed of one file since `prepare`: it is gone, has another size or, where asked, other contents."""
    path = root / entry.path
    expected = f"the {entry.bytes:,} bytes of the manifest"
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return Problem("a changed file", expected, f"{size:,}", AGAIN, str(path))
        if contents and (found := digest_of_file(path)) != entry.sha256:
            return Problem("a changed file", f"sha256 {entry.sha256[:12]}...", f"{found[:12]}...", AGAIN, str(path))
    except OSError as error:
        fix = "Pass `--set data.root=FOLDER` where the data moved, or run `prepare` again."
        return Problem("a missing file", expected, reason(error), fix, str(path))
    return None
