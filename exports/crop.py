"""Regions that an export is cropped to: a box, or polygons on the ground."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from errors import InputError, read_as


class Region(Protocol):
    """Tells which points lie in it."""

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Return whether points [M, 3] lie inside, [M] bool."""
        ...


@dataclass(frozen=True)
class Box:
    """Hold a box along the axes."""

    low: np.ndarray  # [3]
    high: np.ndarray  # [3]

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Return whether points [M, 3] lie inside, [M] bool."""
        return np.all((points >= self.low) & (points <= self.high), axis=1)


@dataclass(frozen=True)
class Polygons:
    """Hold polygons in the plane of x and y, each of closed lines, its outline and holes; any height is inside."""

    polygons: tuple[tuple[np.ndarray, ...], ...]  # of each its lines, [n, 2] each

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Return whether points [M, 3] lie inside at least one, [M] bool."""
        inside = np.zeros(len(points), bool)
        for rings in self.polygons:
            inside |= _surrounded(points, rings)
        return inside


def _surrounded(points: np.ndarray, rings: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return of points [M, 3] whether a line to the right crosses an odd number of closed lines, [M] bool."""
    x, y = points[:, 0], points[:, 1]
    inside = np.zeros(len(points), bool)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if y0 != y1:
                inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
    return inside


def read_region(crop: Sequence[str]) -> Region | None:
    """Return the region that --crop says; None for nothing.

    Args:
        crop: Six numbers, the lowest x, y and z of a box and the highest, or the name of a file: GeoJSON, or text with
            one corner "x y" of one polygon a line.

    Raises:
        InputError: It says something else.
    """
    if not crop:
        return None
    if len(crop) == 1:
        return _read_polygons(Path(crop[0]))
    try:
        numbers = np.array([float(text) for text in crop])
    except ValueError:
        numbers = np.zeros(0)
    if len(numbers) != 6 or not np.isfinite(numbers).all():
        raise InputError(
            f"--crop {' '.join(crop)} must be six numbers, the lowest x y z of a box and then the highest, or one file "
            "with a polygon."
        )
    for axis, low, high in zip("xyz", crop[:3], crop[3:], strict=True):
        if float(low) >= float(high):
            raise InputError(
                f"--crop {' '.join(crop)} is an empty box, whose highest {axis}, {high}, is not above its lowest, "
                f"{low}: give the lowest x y z first, and then the highest."
            )
    return Box(numbers[:3], numbers[3:])


def _read_polygons(path: Path) -> Polygons:
    with read_as(f"--crop {path}", "a polygon", "give GeoJSON, or one corner x y a line"):
        text = path.read_text(encoding="utf-8-sig")  # some programs on Windows begin a file with a mark
        polygons = _polygons(json.loads(text)) if text.lstrip().startswith("{") else [[_corners(text)]]
        found = tuple(tuple(np.array(ring, np.float64)[:, :2] for ring in rings) for rings in polygons)
        rings = [ring for rings in found for ring in rings]
        if not rings or any(len(ring) < 3 or not np.isfinite(ring).all() for ring in rings):
            raise ValueError("it has fewer than three corners")
    return Polygons(found)


def _corners(text: str) -> list[list[float]]:
    lines = (line.replace(",", " ").split() for line in text.splitlines())
    return [[float(number) for number in line[:2]] for line in lines if line]


def _polygons(content: dict[str, Any]) -> list[Any]:
    """Return the polygons of GeoJSON (RFC 7946): of each its rings, the outline and holes."""
    kind = content["type"]
    if kind == "FeatureCollection":
        return [polygon for feature in content["features"] for polygon in _polygons(feature)]
    if kind == "Feature":
        return _polygons(content["geometry"])
    if kind == "GeometryCollection":
        return [polygon for geometry in content["geometries"] for polygon in _polygons(geometry)]
    if kind not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"{kind} is not a polygon")
    return list(content["coordinates"]) if kind == "MultiPolygon" else [content["coordinates"]]
