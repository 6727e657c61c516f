"""The picture that follows a text: at once with nodes near their last places, then as `tnpeft draw` draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tnpeft.draw.diagram import Diagram
from tnpeft.draw.files import digest_of
from tnpeft.draw.page import Page, page_of
from tnpeft.draw.placing import Places, place, place_near
from tnpeft.draw.render import rendered
from tnpeft.network import Network

__all__ = ["Drawing", "LivePicture", "structure_of"]

_KEPT = 256  # placements that are remembered


@dataclass(frozen=True)
class Drawing:
    """A picture as SVG. Where it is not `final`, a better placement may follow."""

    svg: bytes
    final: bool


class LivePicture:
    """Draws one network after another.

    Placements depend on how nodes are joined, not on names or sizes. Each is searched for once, and kept.
    """

    def __init__(self) -> None:
        self._known: dict[str, Places] = {}
        self._last: dict[str, tuple[float, float]] = {}

    def draw(self, network: Network, check: Callable[[], None] = lambda: None) -> Drawing:
        """The picture now; `check` is called between steps, and may raise to end it."""
        final = True

        def placer(diagram: Diagram) -> Places:
            nonlocal final
            check()
            places = self._known.get(structure_of(diagram))
            if places is None and not self._last:  # the first picture, for which there is time
                places = self._searched(diagram)
            if places is None:
                final = False
                places = place_near(diagram, self._last)
            self._last.update({node.name: at for node, at in zip(diagram.nodes, places, strict=True)})
            return places

        page = page_of(network, True, placer)
        check()
        if final:
            self._last = {name: at for name, at in self._last.items() if name in _names(page)}
        return Drawing(self.render(network, page, "svg"), final)

    def finish(self, network: Network, suffix: str) -> bytes:
        """The picture that `tnpeft draw` makes, as `svg`, `png` or `pdf`."""
        return self.render(network, page_of(network, True, self._searched), suffix)

    def keep(self, placements: dict[str, Places]) -> None:
        """Remember placements that another process found."""
        self._known.update({key: [(x, y) for x, y in places] for key, places in placements.items()})
        for key in list(self._known)[:-_KEPT]:
            del self._known[key]

    def search(self, network: Network) -> dict[str, Places]:
        """The best placement of each of a network's diagrams, by `structure_of`."""
        found: dict[str, Places] = {}

        def placer(diagram: Diagram) -> Places:
            key = structure_of(diagram)
            found[key] = self._searched(diagram)
            return found[key]

        page_of(network, True, placer)
        return found

    def _searched(self, diagram: Diagram) -> Places:
        key = structure_of(diagram)
        if key not in self._known:
            self.keep({key: place(diagram)})
        return self._known[key]

    @staticmethod
    def render(network: Network, page: Page, suffix: str) -> bytes:
        return rendered(page, suffix, network.spec.name, digest_of(network.spec))


def structure_of(diagram: Diagram) -> str:
    """All that `place` reads of a diagram, as a text."""
    nodes = [(node.core is None, node.own) for node in diagram.nodes]
    return repr((nodes, [line.ends for line in diagram.lines], [(stub.node, stub.role) for stub in diagram.stubs]))


def _names(page: Page) -> set[str]:
    return {disc.node.name for scene, _, _ in page.panels for disc in scene.discs}
