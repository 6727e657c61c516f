"""The README's picture, from a spec, `tnpeft draw` and a training run: `docs/overview.svg`.

    python docs/draw_overview.py

Light on dark where the reader's setting says so. The run takes seconds on a CPU.
Another processor may move the curve by a pixel.
"""

from __future__ import annotations

import re
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import nn

import tnpeft

PICTURE = Path(__file__).parent / "overview.svg"
SPEC = """\
tnpeft: 1
name: cp
layers: [Conv2d]
params: {r: 8}
bond: r
sizes:
  o: out_channels
  i: in_channels
  kh kw: kernel_size
cores:
  out:    {legs: o a, init: zeros}
  in:     i a
  height: kh a
  width:  kw a
weight: o i kh kw
start: zero
"""
STEPS = 120
_WIDTH, _HEIGHT, _TOP = 960, 310, 44
# What is dark on light becomes light on dark: `tnpeft draw`'s colours, by what it writes into each shape.
_DARK = {
    "#ffffff": "#161b22",
    "#1a1a1a": "#e6e6e6",
    "#404040": "#c8c8c8",
    "#707070": "#9a9a9a",
    "#b3d9f2": "#1f4e73",
    "#f9d9a4": "#6b4a12",
    "#a8dccb": "#1c5a47",
    "#0072b2": "#6db7e8",
    "#b85400": "#f0a35e",
    "#007a58": "#5fcfaa",
}


def losses() -> list[float]:
    """The error of an adapted layer at each step, as a share of the first. It learns an update of the spec's kind."""
    torch.manual_seed(0)
    spec = tnpeft.Spec.from_yaml(SPEC)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    images = torch.randn(8, 3, 12, 12)
    handle = tnpeft.attach(model, spec, match="2", r=4)
    with torch.no_grad():
        for core in handle.parameters():
            core.normal_(std=0.5)
        target = model(images)
    tnpeft.detach(model)
    handle = tnpeft.attach(model, spec, match="2", r=8)
    optimiser = torch.optim.Adam(handle.parameters(), lr=2e-2)
    found = []
    for _ in range(STEPS):
        loss = (model(images) - target).square().mean()
        found.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return [loss / found[0] for loss in found]


def network(x: int, y: int, width: int, height: int) -> str:
    """The spec as `tnpeft draw` draws it, as a part of a larger SVG."""
    drawn = tnpeft.draw_network(tnpeft.Spec.from_yaml(SPEC)).data("svg").decode()
    (box,) = re.findall(r'viewBox="([^"]*)"', drawn)
    inner = drawn.partition("</metadata>")[2].rpartition("</svg>")[0]
    return f'<svg x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{box}">{inner}</svg>'


def curve(x: int, y: int, width: int, height: int, shares: list[float]) -> str:
    """The shares as a line over two axes, with the layer's sentence at its start and its end."""
    points = [
        f"{x + width * step / (len(shares) - 1):.0f},{y + height * (1 - share):.0f}"
        for step, share in enumerate(shares)
    ]
    return "\n".join(
        [
            f'<path class="axis" d="M{x},{y - 6} V{y + height} H{x + width}"/>',
            f'<polyline class="curve" points="{" ".join(points)}"/>',
            f'<text x="{x + 12}" y="{y + 4}">step 0: the base model, bit for bit</text>',
            f'<text x="{x + width}" y="{y + height - 62}" text-anchor="end">after {len(shares)} steps: '
            f"{shares[-1]:.1%} of the error</text>",
            f'<text class="small" x="{x + width}" y="{y + height + 18}" text-anchor="end">'
            "steps of Adam on the four cores</text>",
        ]
    )


def picture() -> str:
    """The three panels, left to right."""
    dark = "".join(
        f'[style*="{what}: {light}"]{{{what}:{shade}!important}}'
        for light, shade in _DARK.items()
        for what in ("fill", "stroke")
    )
    style = (
        "rect.paper{fill:#fff}text{fill:#1a1a1a}.code{font-family:monospace;white-space:pre}.small{font-size:11px}.head{font-weight:bold;"
        "font-size:14px}.axis{stroke:#707070;fill:none}.curve{stroke:#0072b2;stroke-width:2.5;fill:none}.to{fill:#707070}"
        "@media(prefers-color-scheme:dark){rect.paper{fill:#161b22}text{fill:#e6e6e6}.axis{stroke:#9a9a9a}"
        f".curve{{stroke:#6db7e8}}.to{{fill:#9a9a9a}}{dark}}}"
    )
    lines = [
        f'<text class="code" x="24" y="{_TOP + 20 + 15 * row}" xml:space="preserve">{escape(line)}</text>'
        for row, line in enumerate(SPEC.splitlines())
    ]
    heads = (
        (24, "A spec: cores, and the indices that join them"),
        (368, "is a tensor network"),
        (672, "and a layer that trains"),
    )
    arrows = [f'<path class="to" d="M{x},{_TOP + 112} l14,9 l-14,9 z"/>' for x in (332, 634)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
            f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
            "<title>A spec in YAML, the tensor network that it declares, and the error of an adapted layer</title>",
            f"<style>{style}</style>",
            f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>',
            *(f'<text class="head" x="{x}" y="{_TOP - 12}">{escape(head)}</text>' for x, head in heads),
            *lines,
            network(360, _TOP, 268, _HEIGHT - _TOP - 20),
            f'<text class="code" x="672" y="{_TOP + 20}">attach(model, spec, match="2")</text>',
            curve(676, _TOP + 60, 256, 170, losses()),
            *arrows,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
