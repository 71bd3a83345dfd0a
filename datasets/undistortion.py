"""Checks that undistorted pictures show what their photos show: a calibration that is nonsense also has a pinhole."""

from collections.abc import Sequence

import numpy as np

from datasets.camera import Camera, kept_share
from errors import InputError

# Ordinary calibrations of wide-angle lenses keep 77 % and more of a photo's pixels, and 0.8 to 1.2 of its focal length.
# A fisheye keeps its focal length, and half of its pixels where it sees 140 degrees, 30 % where it sees all of 180.
LEAST_KEPT, LEAST_KEPT_OF_FISHEYE = 0.6, 0.25  # of the photo's pixels; below that, a warning
NOTHING_KEPT = 0.02  # of the same, or of the photo's size: refused
SEVERAL = 2.0  # times the photo's focal length, or one side of it: a warning


def undistortion_warnings(names: Sequence[str], cameras: Sequence[Camera], camera_indices: np.ndarray) -> list[str]:
    """Return a sentence for each way in which undistorted pictures differ from their photos more than lenses do.

    Args:
        names: n names of photos.
        cameras: k cameras.
        camera_indices: [n] int64, into cameras.

    Raises:
        InputError: Hardly anything of a photo is left.
    """
    told: dict[str, str] = {}  # the sentence by what is wrong, of the first camera of each kind
    photos: dict[str, int] = {}
    for index, camera in enumerate(cameras):
        if not camera.is_distorted:
            continue
        found = _difference(camera)
        if found is None:
            continue
        kind, difference, is_refused = found
        of_camera = np.flatnonzero(camera_indices == index)
        parameters = ", ".join(f"{value:.6g}" for value in camera.distortion)
        sentence = (
            f"The camera of {names[of_camera[0]]} (focal length {camera.source_K[0, 0]:.0f}, "
            f"{'fisheye ' if camera.fisheye else ''}distortion {parameters}) {difference}: its calibration is likely "
            "to be wrong; calibrate it again, or undistort the photos with COLMAP"
        )
        if is_refused:
            raise InputError(sentence + ".")
        told.setdefault(kind, sentence)
        photos[kind] = photos.get(kind, 0) + len(of_camera)
    return [
        f"{sentence}{f' ({photos[kind]:,} photos have such a camera)' if photos[kind] > 1 else ''}."
        for kind, sentence in told.items()
    ]


def _difference(camera: Camera) -> tuple[str, str, bool] | None:
    """Return how the undistorted picture differs from the photo: the kind, in words, and whether it is hopeless."""
    share = kept_share(camera)
    if share < (LEAST_KEPT_OF_FISHEYE if camera.fisheye else LEAST_KEPT):
        return "share", f"keeps {share:.1%} of its photo's pixels when that is undistorted", share < NOTHING_KEPT
    size, source_size = camera.width * camera.height, camera.source_width * camera.source_height
    if size * SEVERAL**2 < source_size:
        return (
            "size",
            f"leaves {camera.width}x{camera.height} pixels of {camera.source_width}x{camera.source_height} when they "
            "are undistorted",
            size < NOTHING_KEPT * source_size,
        )
    factor = float(np.sqrt(camera.K[0, 0] * camera.K[1, 1] / (camera.source_K[0, 0] * camera.source_K[1, 1])))
    if not 1 / SEVERAL < factor < SEVERAL:
        degrees = [2 * np.degrees(np.arctan(camera.width / 2 / K[0, 0])) for K in (camera.K, camera.source_K)]
        return (
            "focal length",
            f"has {factor:.2g} times its focal length when its photo is undistorted, which then shows "
            f"{degrees[0]:.0f} degrees in place of {degrees[1]:.0f}",
            not NOTHING_KEPT < factor < 1 / NOTHING_KEPT,
        )
    return None
