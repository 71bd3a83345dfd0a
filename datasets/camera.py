"""Pinhole cameras, and the undistortion that makes them of the others.

COLMAP and gsplat count pixels from the picture's corner (the first pixel's centre is 0.5, 0.5), OpenCV counts
from the first pixel's centre; matrices kept here follow the former.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np

from errors import InputError

# Maps take 8 bytes a pixel; datasets with one camera per picture must not keep all of them.
_CAMERAS_WITH_MAPS = 32


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera, with what is needed to undistort its pictures.

    The `source_*` fields describe the picture file, the others the picture that `undistort` makes of it.
    """

    K: np.ndarray  # [3, 3] float64, pixels
    width: int  # of the undistorted picture, as is height
    height: int
    source_K: np.ndarray  # [3, 3] float64, pixels
    source_width: int
    source_height: int
    distortion: np.ndarray  # [4] float64: k1 k2 p1 p2, or k1 k2 k3 k4 of a fisheye; all zero for a pinhole
    fisheye: bool

    @property
    def is_distorted(self) -> bool:
        """Whether pictures of this camera must be undistorted."""
        return self.fisheye or bool(self.distortion.any())

    @property
    def valid_mask(self) -> np.ndarray | None:
        """[H, W] bool, false where the undistorted picture has no source; None where every pixel has one."""
        return _maps(self)[2] if self.is_distorted else None

    def undistort(self, image: np.ndarray) -> np.ndarray:
        """The picture [source_height, source_width, 3] as the pinhole camera sees it  # [H, W, 3]."""
        if not self.is_distorted:
            return image
        map_x, map_y, _ = _maps(self)
        return cv2.remap(image, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def make_camera(model_name: str, params: np.ndarray, model_size: np.ndarray, source_size: tuple[int, int]) -> Camera:
    """The camera for pictures of `source_size` taken by a COLMAP camera.

    Args:
        model_name: COLMAP's name of the camera model.
        params: [8] fx, fy, cx, cy, distortion at `model_size`, in pixels.
        model_size: width and height of the pictures that COLMAP saw.
        source_size: width and height of the pictures at hand, which may be scaled ones.

    Raises:
        InputError: the distortion is such that no picture remains.
    """
    width, height = source_size
    scale_x, scale_y = width / model_size[0], height / model_size[1]
    fx, fy, cx, cy = params[:4]
    K = np.array([[fx * scale_x, 0.0, cx * scale_x], [0.0, fy * scale_y, cy * scale_y], [0.0, 0.0, 1.0]])
    distortion = np.array(params[4:], np.float64)
    fisheye = model_name == "OPENCV_FISHEYE"
    camera = Camera(K, width, height, K, width, height, distortion, fisheye)
    if not camera.is_distorted:
        return camera
    try:
        camera = _fisheye_pinhole(camera) if fisheye else _perspective_pinhole(camera)
        usable = camera is not None and np.isfinite(camera.K).all() and _compute_maps(camera)[2].any()
    except (cv2.error, np.linalg.LinAlgError):  # parameters so large that nothing can be computed with them
        usable = False
    if not usable:
        raise InputError(
            f"A camera of the COLMAP model cannot be undistorted ({model_name} with {params.tolist()}): calibrate it "
            "again, or undistort the pictures with COLMAP."
        )
    return camera


def _perspective_pinhole(camera: Camera) -> Camera | None:
    """The camera with the widest pinhole picture that has no empty pixels (OpenCV's alpha = 0)."""
    K, (left, top, width, height) = cv2.getOptimalNewCameraMatrix(
        _shift_centre(camera.source_K, -0.5), camera.distortion, (camera.width, camera.height), 0
    )
    return _cropped(camera, _shift_centre(K, 0.5), left, top, width, height) if width > 0 and height > 0 else None


def _fisheye_pinhole(camera: Camera) -> Camera | None:
    """The camera with its own focal length, so that the centre of the picture keeps its resolution.

    What has no source is cut off as far as a rectangle can, and left to the mask where it cannot.
    """
    _, _, mask = _compute_maps(camera)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    left, top = int(columns[0]), int(rows[0])
    return _cropped(camera, camera.K, left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)


def _cropped(camera: Camera, K: np.ndarray, left: int, top: int, width: int, height: int) -> Camera:
    return replace(camera, K=K - np.array([[0, 0, left], [0, 0, top], [0, 0, 0]]), width=width, height=height)


@lru_cache(maxsize=_CAMERAS_WITH_MAPS)
def _maps(camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    map_x, map_y, mask = _compute_maps(camera)
    return map_x, map_y, None if mask.all() else mask


def _compute_maps(camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each undistorted pixel comes from (x and y, [H, W] float32, OpenCV's counting) and whether it does."""
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
    """The radius (of a fisheye: the angle) from which the radial polynomial turns back into the picture."""
    radial = camera.distortion if camera.fisheye else camera.distortion[:2]
    slope = np.zeros(2 * len(radial) + 1)  # coefficients of d/dr (r + k1 r^3 + k2 r^5 + ...), constant first
    slope[0] = 1.0
    slope[2::2] = radial * (2 * np.arange(1, len(radial) + 1) + 1)
    roots = np.polynomial.polynomial.polyroots(slope)
    turning = roots.real[(np.abs(roots.imag) < 1e-9) & (roots.real > 0)]
    return float(turning.min()) if len(turning) else np.inf


def _shift_centre(K: np.ndarray, shift: float) -> np.ndarray:
    shifted = K.copy()
    shifted[:2, 2] += shift
    return shifted
