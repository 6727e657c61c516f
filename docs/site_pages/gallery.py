"""A page for each shipped spec, one with all of their pictures, and one of the recipes, made from the files."""

from __future__ import annotations

from collections.abc import Sequence

from site_pages.links import Links
from tnpeft.cli.catalogue import COLUMNS, cells
from tnpeft.cli.peers import FACTS, Peer, peer_rows
from tnpeft.network import Spec, load_spec
from tnpeft.recipe import list_recipes, load_recipe
from tnpeft.spec import list_specs
from tnpeft.spec.library import shipped_folder

__all__ = ["note_gallery", "write_gallery"]

# Links in these texts are written as from the folder of the specs.
_SOURCE = "specs/README.md"
_INDEX = """\
# Gallery

All {count} specs that ship, as `tnpeft draw` draws them. A disc is a core; a line is an index that joins cores; open
legs make the weight. Each spec has a page with its formula, trained parameters, source and file, and with what agrees
with other code. [How a network is drawn](../docs/start.md#how-a-network-is-drawn) shows one as a table of cores and
indices.

## All specs

<div class="grid cards gallery" markdown>

{cards}
</div>
"""
_NAMES = {"formula": "update", "parameters": "trained parameters", "marks": "it uses"}
_BESIDE = """\

## Beside other code

| code | as | value | count | first values | what differs |
|-|-|-|-|-|-|
{rows}

Value: the same stored tensors give the same update to 1e-5. Count: as many numbers train. First values: they are equal;
random ones have the same distribution. Tests check [all rows](README.md#beside-other-code).
"""
_RECIPES = """\
# Shipped recipes

A recipe says which spec goes on which layers, and what else trains. `tnpeft.attach(model, "lora_llama")` attaches one
by its name. To change one, copy its file and attach that: `tnpeft.attach(model, "mine.yaml")`. [The
language](README.md#recipes) has all keys.
"""


def note_gallery(links: Links) -> None:
    """Say where the pages will stand, before any text links to them."""
    links.pages |= {f"specs/{name}.yaml": f"gallery/{name}.md" for name in list_specs()}
    links.pages |= {f"specs/recipes/{name}.yaml": f"recipes.md#{name}" for name in list_recipes()}
    links.pages |= {"specs": "gallery/index.md", "specs/recipes": "recipes.md"}


def write_gallery(links: Links) -> None:
    """Write `gallery/` and `recipes.md`; pictures are copied as they are linked."""
    specs, peers = [load_spec(name) for name in list_specs()], peer_rows()
    links.write("gallery/index.md", _INDEX.format(count=len(specs), cards="\n".join(map(_card, specs))), _SOURCE)
    for spec in specs:
        links.write(f"gallery/{spec.name}.md", _page(spec, peers), _SOURCE)
    links.write("recipes.md", _RECIPES + "".join(map(_recipe, list_recipes())), _SOURCE)


def _card(spec: Spec) -> str:
    picture = f"![{spec.name}](pictures/{spec.name}.svg){{ loading=lazy }}"
    return f"-   [{picture}]({spec.name}.yaml)\n\n    [**{spec.name}**]({spec.name}.yaml)<br>{spec.title or ''}\n"


def _page(spec: Spec, peers: Sequence[Peer]) -> str:
    row = dict(zip(COLUMNS, cells(spec, tuple(peers)), strict=True))
    shown = {name: row[name] for name in COLUMNS if row[name] and name not in ("spec", "compared with")}
    table = "\n".join(f"| {_NAMES.get(name, name)} | {text} |" for name, text in shown.items())
    beside = "\n".join(_beside(peer) for peer in peers if peer.spec == spec.name)
    return (
        f"# {spec.name}\n\n{spec.title or ''}\n\n![{spec.name}](pictures/{spec.name}.svg)\n\n| | |\n|-|-|\n{table}\n\n"
        f"## The file\n\n```yaml\n{spec.text.rstrip()}\n```\n{_BESIDE.format(rows=beside) if beside else ''}"
    )


def _beside(peer: Peer) -> str:
    facts = " | ".join("yes" if fact in peer.agrees else "no" for fact in FACTS)
    return f"| {peer.library} | {peer.tuner} | {facts} | {peer.note} |"


def _recipe(name: str) -> str:
    text = (shipped_folder() / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return f"\n## {name}\n\n{load_recipe(name).title}\n\n```yaml\n{text.rstrip()}\n```\n"
