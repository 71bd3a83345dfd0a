"""Pinhole cameras, and the undistortion that makes them of the others.

COLMAP and gsplat count pixels from the picture's corner (the first pixel's centre is 0.5, 0.5), OpenCV counts
from the first pixel's centre; matrices kept here follow the former.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from errors import InputError

# Maps take 8 bytes a pixel; datasets with one camera per picture must not keep all of them.
_CAMERAS_WITH_MAPS = 32

_CELLS = 48  # of each side of an undistorted picture, whose areas in its photo are added up
_BORDER_POINTS = 33  # of each side of a picture, that are undistorted to find what is inside
_LARGEST_RADIUS = 100.0  # at depth 1, as far as undistortion looks: 89.4 degrees
_HALVINGS = 16  # of that radius, to where Newton's method converges
_NEWTON_STEPS = 5


@dataclass(frozen=True, eq=False)
class Camera:
    """Hold a pinhole camera, with what is needed to undistort its pictures.

    The `source_*` fields describe the picture file, the others the picture that `undistort` makes of it.
    """

    K: np.ndarray  # [3, 3] float64, pixels
    width: int  # of the undistorted picture, as is height
    height: int
    source_K: np.ndarray  # [3, 3] float64, pixels
    source_width: int
    source_height: int
    distortion: np.ndarray  # float64: [5] k1 k2 p1 p2 k3, or [4] k1 k2 k3 k4 of a fisheye; all zero for a pinhole
    fisheye: bool

    @property
    def is_distorted(self) -> bool:
        """Tell whether pictures of this camera must be undistorted."""
        return self.fisheye or bool(self.distortion.any())

    @property
    def valid_mask(self) -> np.ndarray | None:
        """Return [H, W] bool, false where the undistorted picture has no source; None where every pixel has one."""
        return _maps(self)[2] if self.is_distorted else None

    def undistort(self, image: np.ndarray) -> np.ndarray:
        """Return the picture [source_height, source_width, ...] as the pinhole camera sees it  # [H, W, ...]."""
        if not self.is_distorted:
            return image
        map_x, map_y, _ = _maps(self)
        return cv2.remap(image, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def has_shape(size: tuple[int, int], shape: tuple[int, int]) -> bool:
    """Tell whether a size can be another, scaled as a whole: the smaller was rounded by a pixel at most."""
    low, high = 0.0, np.inf  # factors that take `shape` to `size`
    for side, wanted in zip(size, shape, strict=True):
        # Rounding up or down moves the smaller picture's side by less than a pixel.
        slack = max(1.0, side / wanted)
        low, high = max(low, (side - slack) / wanted), min(high, (side + slack) / wanted)
    return low <= high


def check_shape(path: Path, size: tuple[int, int], shape: tuple[int, int], mask_of: str | None = None) -> None:
    """Check that a photo or mask is another picture, scaled as a whole: the smaller was rounded by a pixel at most.

    A picture that was padded, cropped or turned is of another shape, and its camera's centre and focal length would be
    taken for places in it that they are not.

    Args:
        path: The file.
        size: Its width and height.
        shape: Width and height of the other: what COLMAP saw, or of a mask its photo.
        mask_of: Name of the photo that it is a mask of; None where it is a photo.

    Raises:
        InputError: It cannot be.
    """
    if not has_shape(size, shape):
        is_, of_shape = f"{path} is {size[0]}x{size[1]} pixels, which is not the shape of", f"({shape[0]}x{shape[1]})"
        raise InputError(
            f"{is_} its camera in the model {of_shape}: use the picture that the model was made of, scaled as a "
            "whole where it is scaled, and neither cropped, padded nor turned."
            if mask_of is None
            else f"{is_} its photo {mask_of} {of_shape}: make the mask of that photo as it is stored, whatever its "
            "EXIF orientation says, at any size but neither cropped, padded nor turned; or remove it."
        )


def make_camera(model_name: str, params: np.ndarray, model_size: np.ndarray, source_size: tuple[int, int]) -> Camera:
    """Make the pinhole camera for pictures of `source_size` taken by a COLMAP camera.

    Args:
        model_name: COLMAP's name of the camera model.
        params: [9] fx, fy, cx, cy, distortion as `SparseModel` keeps it, at `model_size`, in pixels; zeros at the end
            may be missing.
        model_size: width and height of the pictures that the model was made of.
        source_size: width and height of the pictures at hand, which may be scaled ones.

    Raises:
        InputError: the distortion is such that no picture remains.
    """
    width, height = source_size
    scale_x, scale_y = width / model_size[0], height / model_size[1]
    fx, fy, cx, cy = params[:4]
    K = np.array([[fx * scale_x, 0.0, cx * scale_x], [0.0, fy * scale_y, cy * scale_y], [0.0, 0.0, 1.0]])
    fisheye = model_name == "OPENCV_FISHEYE"
    distortion = np.zeros(4 if fisheye else 5)
    given = params[4 : 4 + len(distortion)]
    distortion[: len(given)] = given
    camera = Camera(K, width, height, K, width, height, distortion, fisheye)
    if not camera.is_distorted:
        return camera
    try:
        pinhole = _fisheye_pinhole(camera) if fisheye else _perspective_pinhole(camera)
    except (cv2.error, np.linalg.LinAlgError):  # parameters so large that nothing can be computed with them
        pinhole = None
    if pinhole is None or not np.isfinite(pinhole.K).all():
        raise InputError(
            f"A camera of the model cannot be undistorted ({model_name} with {params.tolist()}): calibrate it "
            "again, or undistort the pictures with COLMAP."
        )
    return pinhole


def kept_share(camera: Camera) -> float:
    """Return which share of a photo's pixels its undistorted picture shows, within a percent or so."""
    shrunk = np.array([[_CELLS / camera.width], [_CELLS / camera.height], [1.0]]) * camera.K
    map_x, map_y, valid = _compute_maps(replace(camera, K=shrunk, width=_CELLS, height=_CELLS))
    (x_down, x_along), (y_down, y_along) = np.gradient(map_x), np.gradient(map_y)
    areas = np.abs(x_along * y_down - x_down * y_along)  # [_CELLS, _CELLS], in the photo's pixels
    return float(areas[valid].sum()) / (camera.source_width * camera.source_height)


def _perspective_pinhole(camera: Camera) -> Camera | None:
    """Return the camera of the widest pinhole picture, of the same size, that has no empty pixels.

    This is what OpenCV's getOptimalNewCameraMatrix(alpha=0) is for. But that inverts the distortion by a fixed number
    of iterations, which leave ordinary wide-angle calibrations anywhere, such as at a focal length of 5e8 pixels, and
    does not say so.
    """
    K = _shift_centre(camera.source_K, -0.5)  # OpenCV's counting, as all below
    width, height = camera.width, camera.height
    along, zero = np.linspace(0, 1, _BORDER_POINTS), np.zeros(_BORDER_POINTS)
    sides = [(zero, along), (zero + 1, along), (along, zero), (along, zero + 1)]  # left, right, top, bottom
    pixels = np.array(sides).transpose(0, 2, 1) * [width - 1, height - 1]  # [4, n, 2]
    with np.errstate(all="ignore"):  # parameters that nothing can be computed with give NaN, which is looked for
        border = _undistorted((pixels.reshape(-1, 2) - K[:2, 2]) / K[[0, 1], [0, 1]], camera).reshape(pixels.shape)
        left, right = border[0, :, 0].max(), border[1, :, 0].min()
        top, bottom = border[2, :, 1].max(), border[3, :, 1].min()
    if not (left < right and top < bottom):
        return None
    fx, fy = (width - 1) / (right - left), (height - 1) / (bottom - top)
    K = np.array([[fx, 0.0, -fx * left], [0.0, fy, -fy * top], [0.0, 0.0, 1.0]])
    return replace(camera, K=_shift_centre(K, 0.5))


def _undistorted(distorted: np.ndarray, camera: Camera) -> np.ndarray:
    """Find the points that a perspective camera's distortion takes to these.

    Where a point lies beyond all that the radial polynomial reaches before it folds, the one at the fold stands for it.

    Args:
        distorted: [n, 2] at depth 1.
        camera: Whose distortion it is.

    Returns:
        [n, 2] at depth 1.
    """
    k1, k2, p1, p2, k3 = camera.distortion
    fold = min(_folding_radius(camera), _LARGEST_RADIUS)

    # The radial part is monotonous up to its fold, so halving intervals finds its inverse wherever there is one.
    wanted = np.hypot(distorted[:, 0], distorted[:, 1])
    low, high = np.zeros_like(wanted), np.full_like(wanted, fold)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        square = middle * middle
        below = middle * (1 + square * (k1 + square * (k2 + square * k3))) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    x, y = (distorted * (low / np.maximum(wanted, 1e-12))[:, None]).T
    # The tangential part is small beside it: Newton's method from there, for what the radial part reaches.
    reached = high < fold
    for _ in range(_NEWTON_STEPS):
        square = x * x + y * y
        radial = 1 + square * (k1 + square * (k2 + square * k3))
        slope = k1 + square * (2 * k2 + square * (3 * k3))
        error_x = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x) - distorted[:, 0]
        error_y = y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y - distorted[:, 1]
        xx = radial + 2 * x * x * slope + 2 * p1 * y + 6 * p2 * x  # the Jacobian, which is symmetric
        xy = 2 * x * y * slope + 2 * p1 * x + 2 * p2 * y
        yy = radial + 2 * y * y * slope + 6 * p1 * y + 2 * p2 * x
        determinant = xx * yy - xy * xy
        step_x = (error_x * yy - error_y * xy) / determinant
        step_y = (error_y * xx - error_x * xy) / determinant
        usable = reached & (np.hypot(step_x, step_y) < 0.5 * np.hypot(x, y) + 1e-6)
        x, y = np.where(usable, x - step_x, x), np.where(usable, y - step_y, y)
    return np.stack([x, y], axis=1)


def _fisheye_pinhole(camera: Camera) -> Camera | None:
    """Return the camera with its own focal length, so that the centre of the picture keeps its resolution.

    What has no source is cut off as far as a rectangle can, and left to the mask where it cannot.
    """
    x, y = (int(value) for value in camera.K[:2, 2])
    if not (0 <= x < camera.width and 0 <= y < camera.height):
        _, _, mask = _compute_maps(camera)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            return None
        left, right, top, bottom = int(columns[0]), int(columns[-1]), int(rows[0]), int(rows[-1])
    else:
        # What has a source is seen from the principal point in straight lines, so each side is found by bisection: a
        # dataset may have as many cameras as pictures, and maps of all their pixels take minutes.
        left, right = (_outermost(camera, x, side, along=0) for side in (0, camera.width - 1))
        top, bottom = (_outermost(camera, y, side, along=1) for side in (0, camera.height - 1))
    return _cropped(camera, camera.K, left, top, right + 1 - left, bottom + 1 - top)


def _outermost(camera: Camera, inner: int, side: int, *, along: int) -> int:
    """Return the column (along 0) or row (along 1) nearest a side that has a source; the inner one has."""

    def has_source(at: int) -> bool:
        left, top, width, height = (at, 0, 1, camera.height) if along == 0 else (0, at, camera.width, 1)
        return bool(_compute_maps(_cropped(camera, camera.K, left, top, width, height))[2].any())

    if has_source(side):
        return side
    outside = side
    while abs(outside - inner) > 1:
        middle = (outside + inner) // 2
        inner, outside = (middle, outside) if has_source(middle) else (inner, middle)
    return inner


def _cropped(camera: Camera, K: np.ndarray, left: int, top: int, width: int, height: int) -> Camera:
    return replace(camera, K=K - np.array([[0, 0, left], [0, 0, top], [0, 0, 0]]), width=width, height=height)


@lru_cache(maxsize=_CAMERAS_WITH_MAPS)
def _maps(camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    map_x, map_y, mask = _compute_maps(camera)
    return map_x, map_y, None if mask.all() else mask


def _compute_maps(camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find where each undistorted pixel comes from (x and y, [H, W] float32, OpenCV's counting) and whether it does."""
    source_K, K = _shift_centre(camera.source_K, -0.5), _shift_centre(camera.K, -0.5)
    make_maps = cv2.fisheye.initUndistortRectifyMap if camera.fisheye else cv2.initUndistortRectifyMap
    map_x, map_y = make_maps(source_K, camera.distortion, np.eye(3), K, (camera.width, camera.height), cv2.CV_32FC1)
    # Half a pixel beyond the outermost centres is still inside the picture.
    valid = (map_x >= -0.5) & (map_x <= camera.source_width - 0.5)
    valid &= (map_y >= -0.5) & (map_y <= camera.source_height - 0.5)

    columns, rows = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    radius = np.hypot((columns - K[0, 2]) / K[0, 0], (rows - K[1, 2]) / K[1, 1])  # [H, W], at depth 1
    valid &= (np.arctan(radius) if camera.fisheye else radius) < _folding_radius(camera)
    return map_x, map_y, valid


def _folding_radius(camera: Camera) -> float:
    """Find the radius (of a fisheye: the angle) from which the radial polynomial turns back into the picture."""
    return _folding_radius_of(*(camera.distortion if camera.fisheye else camera.distortion[[0, 1, 4]]).tolist())


@lru_cache(maxsize=4096)
def _folding_radius_of(*radial: float) -> float:
    slope = np.zeros(2 * len(radial) + 1)  # coefficients of d/dr (r + k1 r^3 + k2 r^5 + ...), constant first
    slope[0] = 1.0
    slope[2::2] = np.array(radial) * (2 * np.arange(1, len(radial) + 1) + 1)
    roots = np.polynomial.polynomial.polyroots(slope)
    turning = roots.real[(np.abs(roots.imag) < 1e-9) & (roots.real > 0)]
    return float(turning.min()) if len(turning) else np.inf


def _shift_centre(K: np.ndarray, shift: float) -> np.ndarray:
    shifted = K.copy()
    shifted[:2, 2] += shift
    return shifted
