"""Says what of a dataset is used, and leaves out what cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datasets.colmap import SparseModel
from datasets.images import Pictures
from datasets.model_choice import Say, points_ply
from datasets.paths import photo_names
from errors import InputError, counted


def seen_ids(
    train_ids: np.ndarray, test_ids: np.ndarray, names: list[str], pictures: Pictures, say: Say
) -> tuple[np.ndarray, np.ndarray]:
    """Leave out images that are hidden entirely: nothing can be learned of them, and nothing compared.

    Args:
        train_ids, test_ids: The split, int64.
        names: Names of all images.
        pictures: Their files.
        say: Is told what is left out.

    Returns:
        The split of the others.

    Raises:
        InputError: No image to train on, or to test with, is left.
    """
    hidden = pictures.seen_shares == 0
    if not hidden.any():
        return train_ids, test_ids
    first = names[int(np.flatnonzero(hidden)[0])]
    which = f"{first} is" if hidden.sum() == 1 else f"{hidden.sum():,} photos, such as {first}, are"
    say(f"Warning: {which} left out, since alpha or a mask hides all of it.")
    sides = {"training": train_ids[~hidden[train_ids]], "test": test_ids[~hidden[test_ids]]}
    for side, ids in sides.items():
        if not len(ids):
            raise InputError(
                f"Alpha or masks hide every pixel of every {side} picture, such as {first}: remove the alpha channel "
                "or the masks, or write them so that 0 is what to ignore."
            )
    return sides["training"], sides["test"]


def say_what_is_used(
    data_dir: Path,
    model_dir: Path,
    model: SparseModel,
    pictures: Pictures,
    num_points: int,
    *,
    init_ply: bool,
    say: Say,
) -> None:
    """Say which photos, points and masks are used, from where, and what lies beside them and is not.

    Args:
        data_dir: The dataset.
        model_dir: Folder of its model, or the file that holds it.
        model: The same, read.
        pictures: The files that are used.
        num_points: How many points there are to start from.
        init_ply: Whether they are those of points.ply.
        say: Takes the sentences.
    """
    place = str(model_dir.relative_to(data_dir)) if model_dir.is_relative_to(data_dir) else str(model_dir)
    num_photos = int((pictures.seen_shares > 0).sum())  # others are left out
    unused = sorted(photo_names(data_dir / "images") - set(model.image_names))
    num_there = len(model.image_names) + len(unused)
    source = " of points.ply" if init_ply else ""
    say(
        f"Dataset: {num_photos:,} of {counted(num_there, 'photo')}, {counted(num_points, 'point')}{source}, "
        f"from {place}; pictures of {_range(pictures.sizes)}, "
        f"cameras of {_range(list(map(tuple, model.camera_sizes.tolist())))}."
    )
    if unused:
        which = f"{unused[0]} is" if len(unused) == 1 else f"{len(unused):,} photos, such as {unused[0]}, are"
        say(f"{which} not in the model, and not used.")
    if not init_ply and points_ply(model_dir).is_file():
        say(f"points.ply in {place} is not used; --init_ply starts from its points.")
    kinds = []
    if any(pictures.masks):
        kinds.append(f"masks of {counted(sum(mask is not None for mask in pictures.masks), 'photo')}")
    if pictures.num_alpha:
        kinds.append(f"alpha of {counted(pictures.num_alpha, 'photo')}")
    if kinds:
        share = 100 * (1 - pictures.seen_shares.mean())
        say(f"{share:.1f} % of all pixels are neither trained nor scored, by {' and '.join(kinds)}.")


def subset_of_points(
    points: np.ndarray, points_rgb: np.ndarray, max_points: int, say: Say
) -> tuple[np.ndarray, np.ndarray]:
    """Choose at most so many points at random, always the same ones, in their order.

    Args:
        points: [P, 3].
        points_rgb: [P, 3].
        max_points: 0 keeps all.
        say: Is told where points are left out.

    Returns:
        The points and their colours.
    """
    if not 0 < max_points < len(points):
        return points, points_rgb
    chosen = np.sort(np.random.default_rng(0).choice(len(points), max_points, replace=False))
    say(
        f"--max_gaussians {max_points:,} allows fewer than {counted(len(points), 'point')}: a random subset of them is "
        "used."
    )
    return points[chosen], points_rgb[chosen]


def _range(sizes: list[tuple[int, int]]) -> str:
    smallest, largest = min(sizes), max(sizes)
    size = f"{smallest[0]}x{smallest[1]}"
    return size if smallest == largest else f"{size} to {largest[0]}x{largest[1]}"
