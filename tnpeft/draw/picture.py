"""`draw_network`: from a spec or a network to a picture, and to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tnpeft.draw.files import checked_path, digest_of, need_matplotlib, write
from tnpeft.draw.page import Page, page_of
from tnpeft.draw.render import rendered
from tnpeft.draw.shapes import Quality
from tnpeft.errors import BindError, DrawError, Problem
from tnpeft.network import Layer, Network, Spec, load_spec
from tnpeft.spec.checks import SAMPLES
from tnpeft.spec.pattern import ELLIPSIS, KINDS

__all__ = ["Picture", "draw_network", "on_typical_layer"]


@dataclass(frozen=True, eq=False)
class Picture:
    """A network laid out. `with_sizes` says whether labels have sizes as well as names."""

    network: Network
    with_sizes: bool

    @cached_property
    def page(self) -> Page:
        need_matplotlib()
        return page_of(self.network, self.with_sizes)

    @property
    def places(self) -> tuple[dict[str, tuple[float, float]], ...]:
        """For each term, the centres of its cores as (x, y) in inches, to the right and up."""
        return tuple(
            {disc.node.name: (disc.x, disc.y) for disc in scene.discs if disc.node.core is not None}
            for scene, _, _ in self.page.panels[: len(self.network.terms)]
        )

    @property
    def quality(self) -> Quality:
        """Crossings and overlaps, counted."""
        return self.page.quality

    def data(self, suffix: str = "svg") -> bytes:
        """The picture as `svg`, `png` or `pdf`, the same bytes in every process."""
        spec = self.network.spec
        return rendered(self.page, suffix, spec.name, digest_of(spec))

    def save(self, path: str | Path) -> None:
        """Write it to a `.svg`, `.png` or `.pdf`. Raises DrawError."""
        checked = checked_path(path)
        write(checked, self.data(checked.suffix.lower()[1:]))


def draw_network(
    what: Network | Spec | str | Path, path: str | Path | None = None, layer: Any = None, **params: Any
) -> Picture:
    """Draw a network, or a spec on a layer; with `path`, write it to that `.svg`, `.png` or `.pdf`.

    `what` is a bound network, a spec, a shipped name or a spec's file, `layer` anything that `Spec.bind` takes. Without
    a layer a spec is drawn on a typical one of a kind that it supports: indices then have names but no sizes, and
    `k...` is one index. Raises DrawError, SpecError or BindError.
    """
    need_matplotlib()
    checked = None if path is None else checked_path(path)
    if isinstance(what, Network):
        if layer is not None or params:
            fix = "Pass the spec instead."
            raise DrawError(Problem("draw_network", "a bound network alone", "a layer or params beside it", fix))
        picture = Picture(what, True)
    else:
        spec = what if isinstance(what, Spec) else load_spec(what)
        network = on_typical_layer(spec, params) if layer is None else spec.bind(layer, **params)
        picture = Picture(network, layer is not None)
    if checked is not None:
        picture.save(checked)
    return picture


def on_typical_layer(spec: Spec, params: Mapping[str, Any]) -> Network:
    """The spec on the first of some typical layers that it fits; if it fits none, raises the first BindError.

    A spec with `k...` is drawn on a layer with a single kernel axis, whose index then stands for all.
    """
    errors = []
    kernel = any(ELLIPSIS in axis for core in spec.cores for axis in core.axes)
    for kind in sorted(spec.layers, key=lambda kind: kernel and (KINDS[kind] or len(KINDS))):
        for inputs, outputs, side, groups in SAMPLES:
            layer = Layer(kind, inputs, outputs, (side,) * KINDS[kind], groups if KINDS[kind] else 1)
            try:
                return spec.bind(layer, **params)
            except BindError as error:
                errors.append(error)
    raise errors[0]
