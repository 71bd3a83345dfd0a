"""Renderings of test views side by side, and how they differ."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from comparing.runs import Run

AMPLIFIED = 8  # differences in the page are this many times as bright as they are
MOST_VIEWS = 3
WIDEST = 640  # pixels, in the page


@dataclass(frozen=True)
class Picture:
    caption: str
    source: str  # a data URI


@dataclass(frozen=True)
class Rendering:
    """Hold what a run made of a test view."""

    picture: Picture
    difference: Picture  # to the first run's; of the first run's to the photo


@dataclass(frozen=True)
class ComparedView:
    """Hold one test view of all runs that rendered it."""

    name: str
    photo: Picture
    renderings: list[Rendering]


def compared_views(runs: Sequence[Run]) -> list[ComparedView]:
    """Return the first, middle and last of the test views that every run with renderings has rendered."""
    runs = [run for run in runs if run.pictures]
    if not runs:
        return []
    shared = [name for name in runs[0].pictures if all(name in run.pictures for run in runs)]
    chosen = dict.fromkeys(shared[i] for i in (0, len(shared) // 2, -1)) if shared else {}
    return [view for name in list(chosen)[:MOST_VIEWS] if (view := _compare(name, runs)) is not None]


def _compare(name: str, runs: Sequence[Run]) -> ComparedView | None:
    halves = [half for run in runs if (half := _halves(run, name)) is not None]
    if len(halves) < len(runs) or any(half[0].shape != halves[0][0].shape for half in halves):
        return None  # damaged, or of another scale
    photo = halves[0][0]
    renderings = []
    for run, (_, rendering) in zip(runs, halves, strict=True):
        is_first = run is runs[0]
        other = photo if is_first else halves[0][1]
        difference = np.abs(rendering.astype(np.int16) - other)  # [H, W, 3] in levels of 255
        bright = np.minimum(AMPLIFIED * difference, 255).astype(np.uint8)
        caption = f"to {'the photo' if is_first else runs[0].name}: {difference.mean():.2f} of 255 in the mean"
        renderings.append(Rendering(Picture(run.name, _data_uri(rendering)), Picture(caption, _data_uri(bright))))
    return ComparedView(name, Picture("photo", _data_uri(photo)), renderings)


def _halves(run: Run, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return photo and rendering [H, W, 3] uint8 of a test view."""
    try:
        with Image.open(run.pictures[name]) as image:
            pair = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):  # Pillow's ways to say that a PNG is damaged
        return None
    middle = pair.shape[1] // 2
    return pair[:, :middle], pair[:, middle:]


def _data_uri(picture: np.ndarray) -> str:
    image = Image.fromarray(picture)
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "webp", quality=88)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
