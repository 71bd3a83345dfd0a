"""Renderings of held-out views side by side, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from comparing.runs import Run
from reporting.pictures import Picture, data_uri, halves

AMPLIFIED = 8  # differences in the page are this many times as bright as they are
MOST_VIEWS = 3


@dataclass(frozen=True)
class Rendering:
    """Hold what a run made of a held-out view."""

    picture: Picture
    difference: Picture  # to the first run's; of the first run's to the photo


@dataclass(frozen=True)
class ComparedView:
    """Hold one held-out view of all runs that rendered it."""

    name: str
    photo: Picture
    renderings: list[Rendering]


def compared_views(runs: Sequence[Run]) -> list[ComparedView]:
    """Return the first, middle and last of the held-out views that every run with renderings has rendered."""
    runs = [run for run in runs if run.pictures]
    if not runs:
        return []
    shared = [name for name in runs[0].pictures if all(name in run.pictures for run in runs)]
    chosen = dict.fromkeys(shared[i] for i in (0, len(shared) // 2, -1)) if shared else {}
    return [view for name in list(chosen)[:MOST_VIEWS] if (view := _compare(name, runs)) is not None]


def _compare(name: str, runs: Sequence[Run]) -> ComparedView | None:
    pairs = [pair for run in runs if (pair := halves(run.pictures[name])) is not None]
    if len(pairs) < len(runs) or any(pair[0].shape != pairs[0][0].shape for pair in pairs):
        return None  # damaged, or of another scale
    photo = pairs[0][0]
    renderings = []
    for run, (_, rendering) in zip(runs, pairs, strict=True):
        is_first = run is runs[0]
        other = photo if is_first else pairs[0][1]
        difference = np.abs(rendering.astype(np.int16) - other)  # [H, W, 3] in levels of 255
        bright = np.minimum(AMPLIFIED * difference, 255).astype(np.uint8)
        caption = f"to {'the photo' if is_first else runs[0].name}: {difference.mean():.2f} of 255 in the mean"
        renderings.append(Rendering(Picture(run.name, data_uri(rendering)), Picture(caption, data_uri(bright))))
    return ComparedView(name, Picture("photo", data_uri(photo)), renderings)
