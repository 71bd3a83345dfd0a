"""Undistorted pictures that show hardly anything of their photos are named; those of ordinary lenses are not."""

import dataclasses

import numpy as np
import pycolmap
import pytest

from datasets.camera import kept_share, make_camera
from datasets.scene import load_scene
from datasets.undistortion import undistortion_warnings
from errors import InputError
from tests.small_scene import camera, write_scene

# Focal length as a share of the width, distortion; as programs calibrate them.
ORDINARY = {
    "the case of an optimal camera matrix that is none": ("RADIAL", (800, 600), 0.718, (-0.3058, 0.0091)),
    "GoPro, linear": ("OPENCV", (3840, 2160), 0.443, (-0.25, 0.07, 0.0005, -0.0003)),
    "GoPro, wide, full height": ("OPENCV", (4000, 3000), 0.445, (-0.26, 0.08, 0, 0)),
    "action camera, 1080p": ("OPENCV", (1920, 1080), 0.453, (-0.32, 0.11, 0, 0)),
    "early drone": ("OPENCV", (4000, 3000), 0.575, (-0.27, 0.11, 0.001, 0)),
    "drone, wide, folding in the corners": ("OPENCV", (4000, 3000), 0.4375, (-0.33, 0.15, 0, 0)),
    "drone of one inch": ("OPENCV", (5472, 3648), 0.669, (-0.01, 0.02, 0, -0.001)),
    "phone": ("SIMPLE_RADIAL", (4032, 3024), 0.8, (0.08,)),
    "phone, wide": ("OPENCV", (4000, 3000), 0.4, (0.05, -0.03, 0, 0)),
    "pincushion": ("RADIAL", (4000, 3000), 0.75, (0.5, 0)),
    "GoPro as a fisheye": ("OPENCV_FISHEYE", (2704, 2028), 0.44, (0.04, -0.01, 0.003, 0)),
    "fisheye": ("OPENCV_FISHEYE", (1752, 1168), 0.451, (-0.03, 0.006, -0.005, 0)),
    "fisheye, 180 degrees along the diagonal": ("OPENCV_FISHEYE", (4000, 3000), 0.398, (0, 0, 0, 0)),
    "fisheye, 180 degrees in a circle": ("OPENCV_FISHEYE", (4000, 4000), 0.318, (0, 0, 0, 0)),
}
ABSURD = {
    "folds near the centre": ("RADIAL", (-5, 0), "keeps 4.8% of its photo's pixels"),
    "folds in the middle": ("SIMPLE_RADIAL", (-1,), "of its photo's pixels"),
    "a higher term that folds": ("RADIAL", (-0.3, -5), "of its photo's pixels"),
    "tangential": ("OPENCV", (-0.1, 0, 3, 0), "of its photo's pixels"),
    "a fisheye that folds": ("OPENCV_FISHEYE", (-5, 0, 0, 0), "of its photo's pixels"),
    "a telephoto lens": ("RADIAL", (50, 0), "times its focal length"),
    "a fisheye that shrinks": ("OPENCV_FISHEYE", (50, 0, 0, 0), "pixels of 96x64"),
}


def made(model, size, focal, distortion):
    one = {"SIMPLE_RADIAL": 1, "RADIAL": 1}.get(model, 2)
    params = np.zeros(8)
    params[:4] = focal * size[0], focal * size[0], size[0] / 2, size[1] / 2
    params[4 : 4 + len(distortion)] = distortion
    given = (*params[:2][:one], *params[2:4], *distortion)
    return make_camera(model, params, np.array(size), size), camera(model, given, size)


@pytest.mark.parametrize("lens", ORDINARY)
def test_ordinary_calibrations_are_not_disturbed(lens):
    undistorted, _ = made(*ORDINARY[lens])
    assert undistortion_warnings(["a.jpg"], [undistorted], np.array([0])) == []


@pytest.mark.parametrize("lens", ORDINARY)
def test_the_share_that_is_kept_is_that_of_the_pixels_whose_rays_are_in_the_picture(lens):
    """COLMAP's own inverse is the oracle, for what is no fold and not beyond 90 degrees."""
    undistorted, source = made(*ORDINARY[lens])
    x, y = np.meshgrid((np.arange(80) + 0.5) / 80 * source.width, (np.arange(60) + 0.5) / 60 * source.height)
    pixels = np.stack([x.ravel(), y.ravel()], axis=1)
    rays = [source.cam_from_img(pixel) for pixel in pixels]
    found = np.array([[np.nan, np.nan] if ray is None else ray for ray in rays])
    places = found * undistorted.K[[0, 1], [0, 1]] + undistorted.K[:2, 2]
    back = np.array([[np.inf] * 2 if p is None else p for p in (source.img_from_cam([*r, 1.0]) for r in found)])
    with np.errstate(invalid="ignore"):
        inside = ((places >= 0) & (places <= [undistorted.width, undistorted.height])).all(axis=1)
        inside &= np.abs(back - pixels).max(axis=1) < 0.01 * source.width
    assert kept_share(undistorted) == pytest.approx(inside.mean(), abs=0.03)


def absurd_camera(model: str, distortion: tuple[float, ...]) -> pycolmap.Camera:
    focal = (62.0,) if model in ("SIMPLE_RADIAL", "RADIAL") else (62.0, 62.0)
    return camera(model, (*focal, 48.0, 32.0, *distortion))


@pytest.mark.parametrize("lens", ABSURD)
def test_absurd_calibrations_are_named_with_a_photo(tmp_path, lens):
    model, distortion, expected = ABSURD[lens]
    sound = camera()
    write_scene(tmp_path, 6, [sound, absurd_camera(model, distortion)])
    said: list[str] = []
    load_scene(tmp_path, say=said.append)
    (warning,) = (sentence for sentence in said if "calibrat" in sentence)
    assert warning.startswith("Warning: The camera of 001.png")
    assert expected in warning
    assert "3 photos have such a camera" in warning
    assert "\n" not in warning


@pytest.mark.parametrize("k1", [-50.0, -1e6])
def test_what_leaves_nothing_is_refused(tmp_path, k1):
    write_scene(tmp_path, 3, [absurd_camera("SIMPLE_RADIAL", (k1,))])
    with pytest.raises(InputError, match=r"The camera of 000\.png .* keeps 0\.[0-9]% of its photo's pixels"):
        load_scene(tmp_path)


def test_a_telephoto_lens_of_a_hundredfold_is_refused():
    undistorted, _ = made("RADIAL", (96, 64), 0.65, (0.0, 0.0))
    absurd = dataclasses.replace(
        undistorted, distortion=np.array([1e-9, 0, 0, 0, 0]), K=undistorted.K * [[100], [100], [1]]
    )
    with pytest.raises(InputError, match="calibrate it again"):
        undistortion_warnings(["a.jpg"], [absurd], np.array([0]))
