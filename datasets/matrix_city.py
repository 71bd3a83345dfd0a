"""MatrixCity's small city from the air (arXiv 2309.16553), in the folders of its publishers.

    pose/block_all/transforms_train.json  transforms_test.json
    train/block_1/0000.png ...            test/block_1_test/0000.png ...       (or block_1/input/0000.png)
    point_cloud_ds20/aerial/Block_all.ply                                      of another download

Each JSON holds camera-to-world matrices with OpenGL's axes (y up, z backwards), in units of 100 m, and the pictures'
paths relative to itself; the point cloud has the same world. COLMAP models that were made of them name the k-th
picture of each half k.png.
"""

import json
import posixpath
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pycolmap

from datasets.colmap import LARGEST_SIDE, open_model
from datasets.colmap_merge import find_model, merge_models, model_of_poses, write_model
from datasets.links import link_file, write_whole
from datasets.paths import stays_inside
from datasets.ply import read_points
from datasets.prepared import check_writable_place, write_test_list
from errors import InputError, read_as

PARTS = ("train", "test")
LARGEST_JSON = 100_000_000  # bytes; the published ones have 3.3 MB


@dataclass(frozen=True)
class Transforms:
    """One half of the dataset."""

    camera: pycolmap.Camera
    files: list[Path]  # n pictures
    worldtocams: np.ndarray  # [n, 3, 4] float64, OpenCV convention


def prepare(source: Path, colmap: Path | None, points: Path | None, data_dir: Path) -> None:
    """Lay out `data_dir` for training: pictures numbered in the order of the poses, training pictures first.

    Args:
        source: the publishers' folder `aerial`, unpacked.
        colmap: folder with a COLMAP model in `train` and in `test`; poses come from the JSON files where None.
        points: the point cloud from depth; the points of the COLMAP models where None.
        data_dir: the folder to fill; may be `source`.

    Raises:
        InputError: something is missing, or does not fit together.
    """
    check_writable_place(data_dir)
    halves = {
        part: read_transforms(source / "pose" / "block_all" / f"transforms_{part}.json", source) for part in PARTS
    }
    if points is None and colmap is None:
        raise InputError(
            "MatrixCity needs initial points: name the point cloud from depth (Block_all.ply) with --points, or the "
            "folder of COLMAP models with --colmap."
        )
    names: dict[str, list[str]] = {}
    count = 0
    for part in PARTS:
        files = halves[part].files
        names[part] = [f"{count + index:04d}{file.suffix.lower()}" for index, file in enumerate(files)]
        count += len(files)

    if colmap is None:
        models = {
            part: model_of_poses(halves[part].camera, dict(zip(names[part], halves[part].worldtocams, strict=True)))
            for part in PARTS
        }
    else:
        models = {part: _open_part(colmap, part, halves[part], names[part]) for part in PARTS}
    merge_models(models["train"], models["test"])
    model = models["train"]
    centers = np.concatenate([_centers(halves[part].worldtocams) for part in PARTS])
    if points is not None:
        _check_points(points, centers)
    elif model.num_points3D() == 0:
        raise InputError(f"The COLMAP models in {colmap} hold no points: name the point cloud with --points.")

    write_test_list(data_dir, names["test"])
    for part in PARTS:
        for file, name in zip(halves[part].files, names[part], strict=True):
            link_file(file, data_dir / "images" / name)
    model_dir = write_model(model, data_dir)
    if points is not None:
        link_file(points, model_dir / "points.ply")
    else:
        write_whole(model_dir / "points.ply", lambda path: model.export_PLY(str(path)))


def read_transforms(path: Path, source: Path) -> Transforms:
    """Read one half of the dataset from its JSON file, its pictures found in `source`.

    Raises InputError where the file or a picture is missing or unusable.
    """
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: download the poses, and name the folder that holds pose with --source."
        )
    with read_as(path, "MatrixCity's poses", "download it again"):
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError("it is too large")
        content = json.loads(path.read_bytes())
        params = np.array([content[key] for key in ("fl_x", "fl_y", "cx", "cy")], np.float64)
        size = [float(content[key]) for key in ("w", "h")]
        matrices = np.array([frame["transform_matrix"] for frame in content["frames"]], np.float64)
        names = [frame["file_path"] for frame in content["frames"]]
        if matrices.ndim != 3 or matrices.shape[1:] not in ((4, 4), (3, 4)):
            raise ValueError("its matrices do not have the shape of poses")
        if not (np.isfinite(params).all() and (params > 0).all()):
            raise ValueError("its camera has no usable focal length or centre")
        if not all(side == int(side) and 0 < side <= LARGEST_SIDE for side in size):
            raise ValueError("its camera has no usable size")
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a file_path is not a text")
    rotations = matrices[:, :3, :3]
    deviation = (
        np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max() if np.isfinite(matrices).all() else np.inf
    )
    if deviation > 1e-3 or (np.linalg.det(rotations) < 0).any():
        raise InputError(
            f"{path} holds matrices that are not poses: use pose/block_all, whose rotations have been scaled to 1, not "
            "the transforms.json of a block."
        )
    camera = pycolmap.Camera(model="PINHOLE", width=int(size[0]), height=int(size[1]), params=params)
    return Transforms(camera, [_find_picture(path, name, source) for name in names], _worldtocams(matrices[:, :3]))


def _worldtocams(camtoworlds: np.ndarray) -> np.ndarray:
    """Turn camera-to-world poses [n, 3, 4] with OpenGL's axes into world-to-camera ones [n, 3, 4] with OpenCV's."""
    left, _, right = np.linalg.svd(camtoworlds[:, :, :3] * np.array([1.0, -1.0, -1.0]))  # the nearest rotation
    rotations = (left @ right).transpose(0, 2, 1)
    return np.concatenate([rotations, -rotations @ camtoworlds[:, :, 3:]], axis=2)


def _agree(a: np.ndarray, b: np.ndarray) -> bool:
    """Tell whether two poses [3 or 4, 4] differ by at most 1 degree and 2 m, in the units of 100 m."""
    distance = np.linalg.norm(_centers(a[None]) - _centers(b[None]))
    return bool(np.abs(a[:, :3] - b[:, :3]).max() < 0.02 and distance <= 0.02)


def _centers(worldtocams: np.ndarray) -> np.ndarray:
    return -np.einsum("nij,ni->nj", worldtocams[:, :, :3], worldtocams[:, :, 3])


def _find_picture(json_path: Path, name: str, source: Path) -> Path:
    """Find the picture that a frame names: relative to the JSON file, where it lies or in `input` beside it."""
    relative = posixpath.normpath(posixpath.join(json_path.parent.relative_to(source).as_posix(), name))
    if not stays_inside(relative):
        raise InputError(f"{json_path} names a picture {name[:100]!r}, which is outside {source}: download it again.")
    file = source / relative
    for candidate in (file, file.parent / "input" / file.name):
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{file} does not exist: unpack {file.parent.name}.tar in {file.parent.parent}, or complete the download."
    )


def _open_part(colmap: Path, part: str, half: Transforms, names: list[str]) -> pycolmap.Reconstruction:
    """Make a COLMAP model of one half, its images renamed; InputError unless its poses are the JSON file's."""
    model_dir = find_model(colmap / part)
    if model_dir is None:
        raise InputError(
            f"{colmap / part / 'sparse' / '0'} holds no COLMAP model: name the folder that holds train and test with "
            "--colmap, or leave it out to take the poses from the JSON files."
        )
    model = open_model(model_dir)
    for image in sorted(model.images.values(), key=lambda image: image.name):
        stem = PurePosixPath(image.name).stem
        index = int(stem) if stem.isascii() and stem.isdigit() and len(stem) < 9 else len(names)
        pose = half.worldtocams[index] if index < len(names) else None
        found = image.cam_from_world().matrix() if image.has_pose else None
        if pose is None or found is None or not _agree(found, pose):
            raise InputError(
                f"The image {image.name} of {model_dir} is not the picture of this number in transforms_{part}.json: "
                "the model was made of other pictures; leave --colmap out to take the poses from the JSON files."
            )
        image.name = names[index]
    if model.num_images() != len(names):
        raise InputError(
            f"{model_dir} has {model.num_images()} of the {len(names)} pictures of transforms_{part}.json: leave "
            "--colmap out to take the poses from the JSON files."
        )
    return model


def _check_points(path: Path, centers: np.ndarray) -> None:
    """Raise InputError where the point cloud cannot be read or has other units than the poses."""
    points, _ = read_points(path)
    extent, cameras = (np.linalg.norm(np.ptp(values, axis=0)) for values in (points, centers))
    if not 0.05 < extent / cameras < 20:
        raise InputError(
            f"{path} extends over {extent:.3g} units and the cameras over {cameras:.3g}: use the point cloud of the "
            "small city, in units of 100 m."
        )
