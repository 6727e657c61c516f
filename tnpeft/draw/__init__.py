"""The network as a picture, as papers draw it: cores are circles, bonds are lines, open legs point to their side."""

from tnpeft.draw.files import is_current
from tnpeft.draw.front import Point, draw_front
from tnpeft.draw.picture import Picture, draw_network
from tnpeft.draw.shapes import Quality

__all__ = ["Picture", "Point", "Quality", "draw_front", "draw_network", "is_current"]
