"""The picture of many networks by their parameters and errors."""

from __future__ import annotations

from torch import nn

import tnpeft
from tnpeft.draw import Point, draw_front
from tnpeft.draw.front import front_of


def test_the_front_has_what_no_smaller_network_betters():
    points = [Point(5, 0.5), Point(3, 0.6), Point(4, 0.6), Point(6, 0.2), Point(6, 0.3), Point(7, 0.2)]
    assert front_of(points) == [Point(3, 0.6), Point(5, 0.5), Point(6, 0.2)]
    network = tnpeft.load_spec("lora").bind(nn.Linear(3, 4))
    named = Point(3, 0.6, "1: lora", network)
    svg = draw_front([*points, named], [Point(4, 0.4, "other")]).decode()
    assert svg.count("<image") == 1
    for text in ("1: lora", "other", "parameters"):
        assert f">{text}</text>" in svg
    assert draw_front([named]) == draw_front([named])
