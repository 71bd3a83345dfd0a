"""A point of the world must lie in the undistorted, scaled picture where the pinhole camera says.

The oracle is pycolmap's own projection of the point into the picture as it was taken.
"""

import numpy as np
import pycolmap
import pytest
from scipy.ndimage import map_coordinates

from datasets.camera import Camera, make_camera
from datasets.loader import evaluation_loader
from datasets.scene import load_scene
from errors import InputError
from tests.small_scene import camera, camera_poses, write_scene

SIZE = (320, 240)
MODELS = {
    "SIMPLE_PINHOLE": (260, 170, 115),
    "PINHOLE": (260, 280, 170, 115),
    "SIMPLE_RADIAL": (260, 165, 117, -0.12),
    "RADIAL": (260, 165, 117, -0.15, 0.05),
    "OPENCV": (260, 270, 165, 117, -0.1, 0.02, 0.006, -0.005),
    "OPENCV_FISHEYE": (200, 206, 165, 117, 0.02, -0.01, 0.004, -0.001),
}


def world_points(item: pycolmap.Camera, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of the input world on the rays through a grid of source pixels, and those pixels."""
    u, v = np.meshgrid(np.linspace(8, SIZE[0] - 8, 15), np.linspace(8, SIZE[1] - 8, 12))
    pixels = np.stack([u.ravel(), v.ravel()], axis=1)
    depth = np.random.default_rng(1).uniform(2, 6, len(pixels))[:, None]
    in_camera = np.c_[item.cam_from_img(pixels), np.ones(len(pixels))] * depth
    rotation, translation = pose[:, :3], pose[:, 3]
    assert np.abs(item.img_from_cam(in_camera) - pixels).max() < 1e-3
    return (in_camera - translation) @ rotation, pixels


@pytest.mark.parametrize("factor", [1, 1.6])
@pytest.mark.parametrize("model", MODELS)
def test_points_land_where_the_pinhole_camera_says(tmp_path, model, factor):
    item = camera(model, MODELS[model], SIZE)
    scene = load_scene(write_scene(tmp_path, 3, [item]), data_factor=factor)
    batch = list(evaluation_loader(scene, np.arange(3)))[1]
    points, source_pixels = world_points(item, camera_poses(3)[1])
    normalized = points @ scene.transform[:3, :3].T + scene.transform[:3, 3]
    in_camera = np.c_[normalized, np.ones(len(points))] @ np.linalg.inv(batch.camtoworlds[0].double().numpy()).T
    pixels = in_camera[:, :3] @ batch.Ks[0].double().numpy().T
    pixels = pixels[:, :2] / pixels[:, 2:]

    picture = batch.images[0].numpy().astype(float)
    height, width = picture.shape[:2]
    inside = ((pixels > 1) & (pixels < [width - 1, height - 1])).all(axis=1)
    assert inside.mean() > 0.6
    # The colour at the pinhole pixel names the place in the picture as it was taken.
    at = (pixels[inside] - 0.5).T[::-1]
    found = np.stack([map_coordinates(picture[..., c], at, order=1) for c in (0, 1)], axis=1) / 255 * SIZE
    error = found - source_pixels[inside]
    # 8-bit ramps name a place within 1.3 pixels at worst; half a pixel too far on the average is a wrong camera.
    assert np.abs(error).max() < 1.5
    assert np.abs(error.mean(axis=0)).max() < 0.12


@pytest.mark.parametrize("k1", [-0.3, 0.0, 0.6])
def test_fisheye_mask_is_true_where_the_picture_has_a_source(k1):
    params = (120, 124, 150, 117, k1, 0.01, 0.0, 0.0)
    undistorted = make_camera("OPENCV_FISHEYE", np.array(params), np.array(SIZE), SIZE)
    columns, rows = np.meshgrid(np.arange(undistorted.width) + 0.5, np.arange(undistorted.height) + 0.5)
    x = (columns - undistorted.K[0, 2]) / undistorted.K[0, 0]
    y = (rows - undistorted.K[1, 2]) / undistorted.K[1, 1]
    rays = np.stack([x, y, np.ones_like(x)], axis=-1).reshape(-1, 3)
    source = camera("OPENCV_FISHEYE", params, SIZE).img_from_cam(rays).reshape(*x.shape, 2)
    has_source = ((source >= 0) & (source <= SIZE)).all(axis=-1)
    mask = undistorted.valid_mask if undistorted.valid_mask is not None else np.ones(x.shape, bool)
    assert (mask != has_source).mean() < 1e-3
    assert mask.any(axis=0).all()  # cut to the smallest rectangle
    assert mask.any(axis=1).all()
    assert (undistorted.valid_mask is None) == (k1 <= 0)


def test_fisheye_that_folds_is_masked_beyond_the_fold():
    params = np.array((120, 120, 160, 120, -0.4, 0.0, 0.0, 0.0))  # the angle's image shrinks from 0.913 rad on
    undistorted = make_camera("OPENCV_FISHEYE", params, np.array(SIZE), SIZE)
    row = np.round(undistorted.K[1, 2]).astype(int)
    offset = np.abs(np.arange(undistorted.width) + 0.5 - undistorted.K[0, 2]) / undistorted.K[0, 0]
    beyond = np.arctan(offset) > 0.913
    assert beyond.any() or undistorted.width < SIZE[0]
    mask = undistorted.valid_mask if undistorted.valid_mask is not None else np.ones((row + 1, len(offset)), bool)
    assert not mask[row][beyond].any()


def test_a_fisheye_is_cut_as_its_whole_mask_says():
    """The sides are found without looking at all pixels; a mask of all of them is the oracle."""
    rng = np.random.default_rng(0)
    num_cut = 0
    for _ in range(150):
        width, height = rng.integers(20, 300, 2).tolist()
        focal = width * rng.uniform(0.15, 1.2)
        K = np.array([[focal, 0, width * rng.random()], [0, focal, height * rng.random()], [0, 0, 1]])
        distortion = rng.normal(size=4) * rng.choice([0.01, 0.1, 1, 5]) * [1, 0.5, 0.2, 0.1]
        whole = Camera(K, width, height, K, width, height, distortion, fisheye=True)
        params, size = np.r_[focal, focal, K[:2, 2], distortion], (width, height)
        made = make_camera("OPENCV_FISHEYE", params, np.array(size), size)
        mask = np.ones((height, width), bool) if whole.valid_mask is None else whole.valid_mask
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        assert (made.width, made.height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
        np.testing.assert_allclose(made.K[:2, 2], K[:2, 2] - [columns[0], rows[0]])
        num_cut += (made.width, made.height) != (width, height)
    assert num_cut > 20


def test_perspective_pictures_have_no_empty_pixels():
    for model in ("SIMPLE_RADIAL", "RADIAL", "OPENCV"):
        params = np.zeros(8)
        params[:4] = 260, 270, 165, 117
        params[4] = -0.2
        assert make_camera(model, params, np.array(SIZE), SIZE).valid_mask is None


def test_pictures_of_another_size_than_the_model_scale_the_intrinsics():
    made = make_camera("PINHOLE", np.array([80, 82, 48, 30, 0, 0, 0, 0.0]), np.array([96, 64]), (49, 31))
    np.testing.assert_allclose(made.K, [[80 * 49 / 96, 0, 48 * 49 / 96], [0, 82 * 31 / 64, 30 * 31 / 64], [0, 0, 1]])
    assert (made.width, made.height) == (49, 31)


def test_hopeless_distortion_is_one_sentence():
    with pytest.raises(InputError, match="cannot be undistorted"):
        make_camera("OPENCV_FISHEYE", np.array([80, 80, -5000, 32, 0.1, 0, 0, 0.0]), np.array([96, 64]), (96, 64))
