"""Makes one COLMAP model of two that share a world, or of known poses."""

import os
import shutil
from pathlib import Path

import numpy as np
import pycolmap

from errors import InputError, reason


def find_model(folder: Path) -> Path | None:
    """Return `sparse/0`, `sparse` or the folder itself, whichever holds a COLMAP model."""
    for model_dir in (folder / "sparse" / "0", folder / "sparse", folder):
        if any((model_dir / f"cameras.{suffix}").is_file() for suffix in ("bin", "txt")):
            return model_dir
    return None


def merge_models(first: pycolmap.Reconstruction, second: pycolmap.Reconstruction) -> None:
    """Add the cameras, posed images and points of `second` to `first`.

    The ids of `first` stay, those of `second` continue behind them. A camera of `second` that equals one of `first`
    becomes that one. Points are kept side by side, with their tracks.

    Args:
        first, second: models with the same world; their image names differ.

    Raises:
        InputError: an image name occurs in both, or the cameras of `second` are far from those of `first`.
    """
    posed = sorted((i for i in second.images.values() if i.has_pose), key=lambda image: image.image_id)
    names = {image.name for image in first.images.values()}
    twice = sorted(image.name for image in posed if image.name in names)
    if twice:
        raise InputError(f"{len(twice)} names occur in both COLMAP models ({twice[0]}): rename the pictures of one.")
    _check_same_world(first, posed)

    camera_ids = {i: _matching_camera(first, second.cameras[i]) for i in sorted({image.camera_id for image in posed})}
    image_ids = {}
    next_id = max([0, *first.images, *first.frames]) + 1
    for new_id, image in enumerate(posed, next_id):
        keypoints = np.array([point.xy for point in image.points2D], np.float64).reshape(-1, 2)
        added = pycolmap.Image(
            name=image.name, keypoints=keypoints, camera_id=camera_ids[image.camera_id], image_id=new_id
        )
        first.add_image_with_trivial_frame(added, image.cam_from_world())
        image_ids[image.image_id] = new_id
    for point in second.points3D.values():
        track = pycolmap.Track()
        for element in point.track.elements:
            if element.image_id in image_ids:
                track.add_element(image_ids[element.image_id], element.point2D_idx)
        first.points3D[first.add_point3D(point.xyz, track, point.color)].error = point.error


def model_of_poses(camera: pycolmap.Camera, poses: dict[str, np.ndarray]) -> pycolmap.Reconstruction:
    """Make a model without points, of one camera and [3, 4] world-to-camera poses by image name (as OpenCV's)."""
    model = pycolmap.Reconstruction()
    camera.camera_id = 1
    model.add_camera_with_trivial_rig(camera)
    for image_id, (name, pose) in enumerate(poses.items(), 1):
        image = pycolmap.Image(name=name, camera_id=1, image_id=image_id)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
    return model


def write_model(model: pycolmap.Reconstruction, data_dir: Path) -> Path:
    """Write `sparse/0` of a dataset in place of the one that is there. Returns that folder.

    Raises InputError where it cannot be written; what was there is then still there.
    """
    made, old, final = (data_dir / name for name in ("sparse.part", "sparse.old", "sparse"))
    try:
        for leftover in (made, old):
            shutil.rmtree(leftover, ignore_errors=True)
        (made / "0").mkdir(parents=True)
        model.write_binary(str(made / "0"))
        if final.exists():
            os.rename(final, old)
        os.rename(made, final)
    except (OSError, RuntimeError, ValueError) as error:  # pycolmap has its own for a disk that is full
        raise InputError(
            f"{final} cannot be written ({reason(error)}): make room there, or make it writable."
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    return final / "0"


def _matching_camera(model: pycolmap.Reconstruction, camera: pycolmap.Camera) -> int:
    """Return the id of an equal camera that is alone in the rig of its id; it is added where there is none."""

    def facts(item: pycolmap.Camera) -> tuple:
        return item.model.name, item.width, item.height, *item.params.tolist()

    trivial = {i for i, rig in model.rigs.items() if rig.num_sensors() == 1 and rig.ref_sensor_id.id == i}
    for camera_id, present in model.cameras.items():
        if camera_id in trivial and facts(present) == facts(camera):
            return camera_id
    new_id = max([0, *model.cameras, *model.rigs]) + 1
    model.add_camera_with_trivial_rig(
        pycolmap.Camera(
            camera_id=new_id, model=camera.model, width=camera.width, height=camera.height, params=camera.params
        )
    )
    return new_id


def _check_same_world(first: pycolmap.Reconstruction, added: list[pycolmap.Image]) -> None:
    """Raise InputError where an added camera is farther from the box around the first model's than its diagonal."""
    centers = np.array([image.projection_center() for image in first.images.values() if image.has_pose])
    new_centers = np.array([image.projection_center() for image in added])
    if not len(centers) or not len(new_centers):
        raise InputError("One of the COLMAP models to merge holds no image with a pose: export it again.")
    lowest, highest = centers.min(axis=0), centers.max(axis=0)
    outside = np.linalg.norm(new_centers - np.clip(new_centers, lowest, highest), axis=1)
    if outside.max() > np.linalg.norm(highest - lowest):
        name = added[int(outside.argmax())].name
        raise InputError(
            f"The camera of {name} is far from all cameras of the other COLMAP model: the two models have different "
            "worlds and cannot be merged; take both from one source."
        )
