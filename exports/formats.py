"""The formats that an export can have, by the ending of the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from errors import InputError
from exports.compressed_ply import compressed_ply_bytes, write_compressed_ply
from exports.gaussians import Gaussians
from exports.html import html_bytes, write_html
from exports.ply import ply_bytes, write_plain_ply
from exports.sog import sog_bytes, write_sog
from exports.splat import splat_bytes, write_splat
from exports.spz import spz_bytes, write_spz
from exports.streamed import INDEX, streamed_bytes, write_streamed


@dataclass(frozen=True)
class Format:
    """Hold what an export needs to know of a format."""

    ending: str
    name: str
    write: Callable[[Path, Gaussians], None]
    most_bytes: Callable[[int, int], int]  # that so many Gaussians, with harmonics of such a degree, take
    highest_degree: int = 3  # of harmonics that it can hold
    most_gaussians: int | None = None  # that it is for


SMALL = 1_000_000  # Gaussians, of which a page is made: 25 to 65 MB

PLY = Format(".ply", "3DGS's PLY", write_plain_ply, ply_bytes)
FORMATS = (  # an ending that is part of another one comes later
    Format(".compressed.ply", "PlayCanvas's compressed PLY", write_compressed_ply, compressed_ply_bytes),
    Format(".spz", "Niantic's SPZ", write_spz, spz_bytes),
    Format(".sog", "PlayCanvas's SOG", write_sog, sog_bytes),
    Format(".splat", "antimatter15's splat", write_splat, splat_bytes, highest_degree=0),
    Format(".html", "a page with a viewer", write_html, html_bytes, most_gaussians=SMALL),
    Format(INDEX, "PlayCanvas's streamed SOG", write_streamed, streamed_bytes),
    PLY,
)


def format_of(path: Path) -> Format:
    """Return the format of a file by its ending.

    Raises:
        InputError: No format has it.
    """
    for form in FORMATS:
        if path.name == INDEX if form.ending == INDEX else path.name.lower().endswith(form.ending):
            return form
    endings = ", ".join(form.ending for form in FORMATS if form.ending != INDEX)
    raise InputError(f"--to {path} has an ending that no format has: choose {endings} or FOLDER/{INDEX}.")
