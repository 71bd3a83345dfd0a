"""Checks that the training views see what is trained, before anything expensive begins."""

import numpy as np

from datasets.normalize import transform_cameras
from datasets.scene import Scene
from datasets.view_order import SAMPLE, sample_of, sees
from errors import InputError, counted

FEWEST_VIEWS = 0.2  # must see one of many points: cameras turned away see some by chance
MANY_POINTS = 1000  # of fewer than this, those in view may be few
LEAST_DRAWN = 0.05  # of what is in the pictures
TOO_FEW = 0.5  # of either: a warning
OTHERWISE = 2.0  # times as many points in the pictures: poses are likely to be meant in another way
FEW_IN_VIEW = 0.25  # of the pictures have fewer in them than the number that is compared for that
VIEWS, VIEWS_OF_ALL = 256, 16  # looked at, evenly from all; on a sample of the points, on all of them


def check_views(scene: Scene, means: np.ndarray, near_plane: float, far_plane: float) -> list[str]:
    """Check that the training views see the Gaussians that training starts from.

    Args:
        scene: Gives the cameras.
        means: [N, 3] of the Gaussians, in the scene's world; a sample of them is looked at.
        near_plane: Depth, in the same units, before which nothing is drawn.
        far_plane: Depth beyond which nothing is drawn.

    Returns:
        Sentences to warn with.

    Raises:
        InputError: No training view, or hardly any, sees a Gaussian.
    """
    depths = _depths_in_views(scene, means)
    seeing = _share_seeing(depths)
    cause = _likely_cause(scene, means, seeing)
    if seeing == 0 or (seeing < FEWEST_VIEWS and len(means) >= MANY_POINTS):
        raise InputError(
            f"{'No' if seeing == 0 else 'Hardly any'} training picture of {scene.data_dir} sees any of the "
            f"{counted(len(means), 'point')} that training starts from: "
            + (
                cause
                or "they are of another world than the cameras, or the poses do not map world to camera as COLMAP's "
                "do; take points and poses from one reconstruction."
            )
        )
    everything = np.concatenate(depths)
    drawn = np.mean((everything > near_plane) & (everything < far_plane))
    least, most = np.quantile(everything, [0.05, 0.95])
    planes = (
        f"--near_plane {near_plane:g} and --far_plane {far_plane:g} hide {1 - drawn:.0%} of what the training pictures "
        f"see, which lies at depths of {least:.3g} to {most:.3g} in the normalized scene: set them around these."
    )
    if drawn < LEAST_DRAWN:
        raise InputError(planes)
    warnings = [planes] if drawn < TOO_FEW else []
    if seeing < TOO_FEW:
        few = len(means) < MANY_POINTS
        warnings.append(
            f"Only {seeing:.0%} of the training pictures see any of the {counted(len(means), 'point')} that training "
            "starts from: "
            + (cause or f"they may be {'too few, or ' if few else ''}of another world than the cameras.")
        )
    elif cause:
        warnings.append(cause[0].upper() + cause[1:])
    return warnings


def _likely_cause(scene: Scene, means: np.ndarray, seeing: float) -> str | None:
    """Say why the pictures have few points in them, where the cameras themselves tell it.

    Files of other programs hold poses in other conventions. In the right one the cameras look at the points, so that
    which shows pictures at least twice as many of them is likely to be meant.

    Args:
        scene: Gives the cameras.
        means: [N, 3] of the Gaussians, in the scene's world.
        seeing: Share of the training pictures that have any in them.
    """
    ids = scene.train_ids[:: -(-len(scene.train_ids) // VIEWS)]
    if seeing < TOO_FEW:
        for camera in (scene.cameras[scene.camera_indices[index]] for index in ids):
            x, y = camera.source_K[:2, 2]
            if not (0 <= x <= camera.source_width and 0 <= y <= camera.source_height):
                return (
                    f"the principal point {x:.6g}, {y:.6g} of a camera lies outside its pictures of "
                    f"{camera.source_width}x{camera.source_height}; it may have been calibrated at another size."
                )
    if len(means) < MANY_POINTS:
        return None
    points = sample_of(means, SAMPLE)
    as_given = scene.camtoworlds[ids]
    inverted = transform_cameras(
        scene.transform, np.linalg.inv(transform_cameras(np.linalg.inv(scene.transform), as_given))
    )
    turned = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL's cameras: y up, looking along -z
    readings = {
        "camera to world": inverted,
        "with OpenGL's axes (y up, z backwards)": as_given @ turned,
        "camera to world, with OpenGL's axes (y up, z backwards)": inverted @ turned,
    }
    shares = {how: _usual_share(scene, ids, poses, points) for how, poses in readings.items()}
    best = max(shares, key=shares.__getitem__)
    given = _usual_share(scene, ids, as_given, points)
    if shares[best] < max(OTHERWISE * given, LEAST_DRAWN):
        return None
    return (
        f"the poses look as if they were written {best}, where COLMAP's map world to camera (x right, y down, z "
        f"forwards): read so, three quarters of the pictures would show at least {shares[best]:.0%} of the points, and "
        f"as they are {given:.0%}. Convert them if that is so."
    )


def _usual_share(scene: Scene, ids: np.ndarray, camtoworlds: np.ndarray, points: np.ndarray) -> float:
    """Return the share of the points [S, 3] that all but the worst of the pictures have in them from these poses."""
    shares = []
    for index, camtoworld in zip(ids, camtoworlds, strict=True):
        camera = scene.cameras[scene.camera_indices[index]]
        shares.append(sees(points, np.linalg.inv(camtoworld), camera.K, camera.width, camera.height).mean())
    return float(np.quantile(shares, FEW_IN_VIEW, method="lower"))


def _depths_in_views(scene: Scene, means: np.ndarray) -> list[np.ndarray]:
    """Return the depths of the points [N, 3] that each training view has in it, of a sample of views and points."""
    ids = scene.train_ids[:: -(-len(scene.train_ids) // VIEWS)]
    depths = [_depths(scene, index, sample_of(means, SAMPLE)) for index in ids]
    if _share_seeing(depths) < TOO_FEW:  # what is in view may have fallen through the sample
        depths = [_depths(scene, index, means.astype(np.float64)) for index in ids[:: -(-len(ids) // VIEWS_OF_ALL)]]
    return depths


def _share_seeing(depths: list[np.ndarray]) -> float:
    return float(np.mean([len(of_view) > 0 for of_view in depths]))


def _depths(scene: Scene, index: int, points: np.ndarray) -> np.ndarray:
    """Return the depths of those of the points [S, 3] that a picture has in it."""
    camera = scene.cameras[scene.camera_indices[index]]
    worldtocam = np.linalg.inv(scene.camtoworlds[index])
    depths = points @ worldtocam[2, :3] + worldtocam[2, 3]  # [S]
    return depths[sees(points, worldtocam, camera.K, camera.width, camera.height)]
