"""`prepare`: a folder of scans → `manifest.json` and a table of what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ddpm_lab.config.settings import Config, Data
from ddpm_lab.data.files import Volume, each, fewest, find_volumes, inspect, split_volumes, stratum_of, subject_of
from ddpm_lab.data.manifest import VERSION
from ddpm_lab.data.outliers import Outliers, warnings_of
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import digest_of_file, write_json
from ddpm_lab.support.faults import MOST, LabError, fault, reason
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import at_work
from ddpm_lab.support.record import write_record
from tnpeft.errors import Problem

__all__ = ["prepare_data"]

ROWS = 12  # of a table on the screen; the manifest has everything


@dataclass(frozen=True)
class Examined:
    """One file of the data set and what reading it gave."""

    path: Path
    found: Volume | Problem
    sha256: str = ""
    size: int = 0  # bytes


def prepare_data(config: Config, out: Path, screen: Screen) -> Path:
    """Read every file of the data set and write `manifest.json` to `out`; returns its path.

    Files that are no volumes are listed there and do not stop it, unless too few are left to split. The same folder
    and settings give the same bytes.
    """
    if config.data.manifest is not None:
        fix = "Remove it, or give the files with `--set data.root=FOLDER`."
        raise fault("data.manifest", "`prepare`", "a folder to index", "a manifest", fix)
    paths = find_volumes(config.data)
    assert config.data.root is not None
    data = config.data.model_copy(update={"root": config.data.root.absolute()})
    make_folder(out)
    with at_work("prepare", out):
        return _prepared(config, data, paths, out, screen)


def _prepared(config: Config, data: Data, paths: Sequence[Path], out: Path, screen: Screen) -> Path:
    with screen.bar(f"read {len(paths)} files", len(paths)) as bar:
        examined = _unlike(each(_examine, [path.absolute() for path in paths], bar))
    _enough(examined, data)
    manifest = _manifest(examined, data)
    path = out / "manifest.json"
    write_json(path, manifest)
    counts = {name: len(manifest[name]) for name in ("train", "validation", "test", "rejected")}
    write_record(out, "prepare", config, volumes=counts)
    _show(examined, manifest, data, screen)
    screen.line(f"Written to {path}")
    return path


def _examine(path: Path) -> Examined:
    """Check and hash one file; its second reading comes from the system's cache."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return Examined(path, Problem("a file's name", "a name in UTF-8", "other bytes", "Rename it.", ascii(path)))
    found = inspect(path)  # first, for a device or a file without end must not be hashed
    if isinstance(found, Problem):
        return Examined(path, found)
    try:
        return Examined(path, found, digest_of_file(path), path.stat().st_size)
    except OSError as error:
        fix = "Replace or remove the file."
        return Examined(path, Problem("an unreadable volume", "a NIfTI file", reason(error), fix, str(path)))


def _unlike(examined: Iterable[Examined]) -> list[Examined]:
    """Reject all but the first of files with the same voxels: copies would stand on both sides of a split."""
    firsts: dict[str, Examined] = {}
    result = []
    for item in examined:
        if isinstance(item.found, Volume) and (first := firsts.setdefault(item.found.digest, item)) is not item:
            found = f"the {'bytes' if first.sha256 == item.sha256 else 'voxels'} of {first.path}"
            copy = Problem("a copy", "a scan of its own", found, "Remove one of the two.", str(item.path))
            item = Examined(item.path, copy, item.sha256, item.size)
        result.append(item)
    return result


def _enough(examined: Sequence[Examined], data: Data) -> None:
    """Raise LabError with the first few rejected files where too few volumes are left."""
    usable = sum(isinstance(item.found, Volume) for item in examined)
    if usable < fewest(data):
        problems = [item.found for item in examined if isinstance(item.found, Problem)]
        found = f"{usable} of {len(examined)} files"
        whole = Problem("usable volumes", f"at least {fewest(data)}", found, "Mend or add files.", str(data.root))
        raise LabError(*problems[:MOST], whole)


def _manifest(examined: Sequence[Examined], data: Data) -> dict[str, Any]:
    """The manifest's data; paths are below the root, so that the data can move."""
    assert data.root is not None
    entries: dict[Path, dict[str, Any]] = {}
    rejected = []
    for item in examined:
        name = _below(item.path, data.root)
        if isinstance(item.found, Volume):
            shape, spacing = list(item.found.shape), list(item.found.spacing)
            stratum = stratum_of(item.path, data)
            entries[item.path] = {
                "path": name, "sha256": item.sha256, "bytes": item.size, "shape": shape, "spacing": spacing,
                **({"stratum": stratum} if stratum is not None else {}),
            }  # fmt: skip
        else:
            rejected.append({"path": name, "reason": _why(item.found, data.root)})
    split = split_volumes(list(entries), data)
    outliers = [{"path": _below(path, data.root), "reason": str(each)} for path, each in _outliers(examined).items()]
    return {
        "version": VERSION,
        "root": str(data.root),
        "layout": data.layout,
        "seed": data.split_seed,
        "validation_share": data.validation_share,
        "test_share": data.test_share,
        "train": [entries[path] for path in split.train],
        "validation": [entries[path] for path in split.validation],
        "test": [entries[path] for path in split.test],
        **({"strata": data.strata} if data.strata is not None else {}),
        **({"unseen": [entries[path] for path in split.unseen]} if split.unseen else {}),
        "rejected": rejected,
        **({"outliers": outliers} if outliers else {}),
    }


def _outliers(examined: Sequence[Examined]) -> dict[Path, Outliers]:
    """The volumes in which a few voxels lie far from the rest."""
    return {
        item.path: item.found.outliers
        for item in examined
        if isinstance(item.found, Volume) and item.found.outliers is not None
    }


def _below(path: Path, root: Path) -> str:
    """The path below the root; bytes that are no UTF-8 are written as escapes."""
    return path.relative_to(root).as_posix().encode(errors="backslashreplace").decode()


def _why(problem: Problem, root: Path) -> str:
    """Why a file was rejected, without the root: it says the same wherever the data lie."""
    return f"expected {problem.expected}, found {problem.found}".replace(f"{root}/", "")


def _show(examined: Sequence[Examined], manifest: dict[str, Any], data: Data, screen: Screen) -> None:
    """Counts, sizes, and what was rejected and why."""
    volumes = [item.found for item in examined if isinstance(item.found, Volume)]
    size = sum(item.size for item in examined if isinstance(item.found, Volume))
    screen.line("")
    tested = f"to validate, {_people(manifest['test'], data)} to test " if manifest["test"] else ""
    unseen = f"; {_people(manifest['unseen'], data)} of strata that nothing sees" if "unseen" in manifest else ""
    screen.line(
        f"{len(volumes)} of {len(examined)} files are volumes ({_bytes(size)}); "
        f"{_people(manifest['train'], data)} train, {_people(manifest['validation'], data)} are held out "
        f"{tested}(seed {data.split_seed}){unseen}"
    )
    sizes = Counter((_times(volume.shape), _times(volume.spacing)) for volume in volumes)
    rows = ((shape, spacing, str(count)) for (shape, spacing), count in sizes.most_common())
    screen.console.print(_table("Volumes", ("voxels", "mm", "files"), rows))
    if len(sizes) > 1 and data.crop is None and data.resize is None:
        screen.line("Their sizes differ: set `data.crop` or `data.resize` before training.")
    if manifest["rejected"]:
        why = ((item["path"], item["reason"]) for item in manifest["rejected"])
        screen.console.print(_table(f"Rejected ({len(manifest['rejected'])})", ("file", "why"), why))
    for line in warnings_of(_outliers(examined), data.percentiles):
        screen.line(line)


def _people(entries: Sequence[dict[str, Any]], data: Data) -> str:
    """How many files a list has and, where a subject may have several, of how many subjects."""
    assert data.root is not None
    if data.layout == "plain":
        return f"{len(entries)} files"
    subjects = {subject_of(data.root / entry["path"], data) for entry in entries}
    return f"{len(entries)} files of {len(subjects)} subjects"


def _table(title: str, columns: Sequence[str], rows: Iterator[tuple[str, ...]]) -> Table:
    """The first rows as a table, and how many more there are."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    every = list(rows)
    for row in every[:ROWS]:
        table.add_row(*(Text(cell) for cell in row))  # a name with brackets is no markup
    if len(every) > ROWS:
        table.add_row(f"... and {len(every) - ROWS} more, in manifest.json")
    return table


def _times(numbers: Sequence[float]) -> str:
    return "x".join(f"{number:g}" for number in numbers)


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
