"""`tnpeft draw`: specs as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tnpeft.cli.arguments import parse_layer, parse_settings
from tnpeft.cli.check import expand, kind_of
from tnpeft.cli.output import Output, UsageError
from tnpeft.documents.paths import is_folder
from tnpeft.draw import Picture, draw_network
from tnpeft.draw.files import SUFFIXES
from tnpeft.errors import Problem, shown_path
from tnpeft.network import load_spec

__all__ = ["draw_again", "draw_specs"]


def draw_specs(
    output: Output, names: Sequence[str], target: str, layer: str | None, settings: Sequence[str], as_json: bool
) -> None:
    """Draw one spec to a file, or specs and folders of specs into a folder, each as NAME.svg."""
    specs = _specs(names)
    into_folder = is_folder(target) or target.endswith("/") or specs != list(names) or len(specs) > 1
    if into_folder:
        _make_folder(Path(target))
    chosen = None if layer is None else parse_layer(layer)
    params = parse_settings(settings)
    drawn = []
    for name in specs:
        spec = load_spec(name)
        path = Path(target) / f"{spec.name}.svg" if into_folder else Path(target)
        picture = draw_network(spec, path, chosen, **params)
        drawn.append(_data(picture, path))
        if not as_json:
            output.say(f"drew {path}")
    if as_json:
        output.data({"pictures": drawn})


def draw_again(
    output: Output, names: Sequence[str], target: str, layer: str | None, settings: Sequence[str], as_json: bool
) -> Callable[[Sequence[str]], None]:
    """Draw the specs that changed; other files of a folder are passed over."""

    def draw(changed: Sequence[str]) -> None:
        specs = [name for name in changed if name in names or kind_of(name) == "spec"]
        if specs:
            draw_specs(output, specs, target, layer, settings, as_json)

    return draw


def _specs(names: Sequence[str]) -> list[str]:
    """The specs among files that were named or found; other files of a folder are passed over."""
    found = [name for name, in_folder in expand(names).items() if not in_folder or kind_of(name) == "spec"]
    for name in found:
        if name and is_folder(name):
            raise UsageError(Problem("nothing to draw", "specs in this folder", "none", "Name another folder.", name))
    return found


def _make_folder(folder: Path) -> None:
    """Make the folder, if there is none. Raises UsageError if it cannot be made."""
    fix = "Name a folder for several pictures, with -o pictures/."
    if folder.suffix.lower() in SUFFIXES and not is_folder(folder):
        raise UsageError(Problem("-o", "a folder", "the name of one picture", fix, str(folder)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise UsageError(Problem("-o", "a folder", found, fix, shown_path(folder))) from error


def _data(picture: Picture, path: Path) -> dict[str, Any]:
    network = picture.network
    return {
        "spec": network.spec.name,
        "file": str(path),
        "layer": str(network.layer),
        "params": dict(network.params),
        **asdict(picture.quality),
    }
