"""Masks of pictures: which file is whose, and which pixels they leave to be seen, beside alpha and undistortion."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from datasets.camera import Camera
from datasets.image_files import decode_mask
from datasets.model_choice import Say, quiet
from datasets.paths import refuse_unreadable
from errors import counted

Size = tuple[int, int]  # width and height in pixels


def find_masks(folder: Path, names: list[str], say: Say = quiet) -> dict[str, str]:
    """Find the mask of each picture: COLMAP's `NAME.jpg.png`, or `NAME.png`, or a file of the picture's own name.

    Args:
        folder: Where masks lie, in the same subfolders as the pictures; it need not exist.
        names: Names of the pictures.
        say: Is told of masks that belong to no picture, and of pictures without a mask.

    Returns:
        By picture name, the mask's path relative to `folder`; only of pictures that have one.
    """
    if not folder.is_dir():
        return {}
    present = {
        (Path(place).relative_to(folder) / file).as_posix()
        for place, _, files in os.walk(folder, onerror=refuse_unreadable)
        for file in files
        if not file.startswith(".")
    }
    found = {}
    for name in names:
        candidates = (f"{name}.png", str(PurePosixPath(name).with_suffix(".png")), name)
        mask = next((candidate for candidate in candidates if candidate in present), None)
        if mask is not None:
            found[name] = mask
    if present and len(found) < len(names):
        lacking = next(name for name in names if name not in found)
        as_png = PurePosixPath(lacking).with_suffix(".png")
        say(
            f"Warning: {folder} holds {counted(len(present), 'file')}, and masks of {len(found):,} of "
            f"{counted(len(names), 'photo')} (none of {lacking}, which would be {lacking}.png or {as_png}): "
            "photos without a mask are used whole."
        )
    unused = sorted(present - {*found.values()})
    if unused:
        which = f"{folder / unused[0]} belongs"
        if len(unused) > 1:
            which = f"{len(unused):,} files of {folder}, such as {unused[0]}, belong"
        say(f"{which} to no photo of the model as its mask.")
    return found


def scaled_mask(seen: np.ndarray, size: Size) -> np.ndarray:
    """Scale a mask as pictures are scaled: a pixel is seen where no hidden one has a part in it.

    Args:
        seen: [h, w] bool.
        size: Width and height of the result.

    Returns:
        [H, W] bool.
    """
    if seen.shape == size[::-1]:
        return seen
    share = Image.fromarray(seen.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return np.abs(np.asarray(share) - 1) < 1 / 512  # half a step of 8 bits


def seen_pixels(seen: np.ndarray | None, mask_path: Path | None, camera: Camera) -> np.ndarray | None:
    """Return which pixels of a picture neither its alpha, nor its mask, nor the undistortion hides.

    Args:
        seen: [source_height, source_width] bool, by the picture's alpha; None where it is opaque.
        mask_path: File of its mask, of any scale.
        camera: Its camera.

    Returns:
        [H, W] bool of the undistorted picture; None where nothing is hidden.
    """
    if mask_path is not None:
        by_mask = scaled_mask(decode_mask(mask_path), (camera.source_width, camera.source_height))
        seen = by_mask if seen is None else seen & by_mask
    valid = camera.valid_mask
    if seen is None:
        return valid
    # A pixel is a mean of four of the source; it is seen where all of them are.
    undistorted = camera.undistort(np.where(seen, np.uint8(255), np.uint8(0))) == 255
    return undistorted if valid is None else undistorted & valid
