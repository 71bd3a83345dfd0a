"""Tiles of pictures that see too many Gaussians to be rendered at once."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Pixels x to x + width, y to y + height of one camera's picture."""

    camera: int
    x: int
    y: int
    width: int
    height: int
