"""Mill 19 and UrbanScene3D as Mega-NeRF (arXiv 2112.10703) publishes them, with COLMAP models of both halves.

    train/rgbs  train/metadata  val/rgbs  val/metadata  mappings.txt      pictures NNNNNN.jpg, metadata NNNNNN.pt
    train/sparse/0  val/sparse/0                                          COLMAP models, from elsewhere

The downloads of UrbanScene3D have no rgbs: each line of mappings.txt names a photo of the dataset's publishers and the
metadata (size, intrinsics, distortion) with which it becomes a picture.
"""

import os
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pycolmap
from PIL import Image

from configs import Config
from datasets.colmap import open_model
from datasets.colmap_merge import find_model, merge_models, write_model
from datasets.image_files import decode_image
from datasets.images import in_threads, save_jpeg
from datasets.links import link_file, write_whole
from datasets.paths import stays_inside
from datasets.prepared import check_writable_place, write_test_list
from errors import InputError, read_as

PARTS = ("train", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")  # of pictures, in lower case


def prepare(cfg: Config, source: Path, colmap: Path | None, photos: Path | None, data_dir: Path) -> None:
    """Lay out `data_dir` for training: `images` and `sparse/0` with both halves, the published test pictures listed.

    Where `cfg` holds out every k-th picture, pictures keep their names, which count through both halves. Where it
    holds out what follows an index, they get the folders `train` and `val`, which sort in this order.

    Args:
        cfg: the scene's options.
        source: the unpacked download of Mega-NeRF.
        colmap: folder with a COLMAP model in `train` and in `val`; `source` where None.
        photos: folder with the photos that mappings.txt names; needed where there are no `rgbs`.
        data_dir: the folder to fill; may be `source`.

    Raises:
        InputError: something is missing, or does not fit together.
    """
    for part in PARTS:
        if not (source / part).is_dir():
            raise InputError(f"{source / part} does not exist: unpack the download and name its folder with --source.")
    check_writable_place(data_dir)
    models = {part: _open_part(colmap or source, part) for part in PARTS}
    folders = {part: _picture_folder(source, part) or data_dir / part / "rgbs" for part in PARTS}
    if photos is not None or not all(folder.is_dir() for folder in folders.values()):
        _undistort_photos(source, photos, folders)

    by_folder = cfg.test_after >= 0
    files = {}
    for part, model in models.items():
        found = _match_pictures(model, folders[part], part)
        for image in model.images.values():
            file = found[image.name]
            image.name = f"{part}/{image.name}" if by_folder else image.name
            files[part, image.name] = file
    test_names = [name for part, name in files if part == "val"]
    merge_models(models["train"], models["val"])
    write_test_list(data_dir, test_names)
    for (_, name), file in files.items():
        link_file(file, data_dir / "images" / name)
    write_model(models["train"], data_dir)


def _open_part(folder: Path, part: str) -> pycolmap.Reconstruction:
    model_dir = find_model(folder / part)
    if model_dir is None:
        raise InputError(
            f"{folder / part / 'sparse' / '0'} holds no COLMAP model: download the models of both halves and name "
            "the folder that holds train and val with --colmap."
        )
    return open_model(model_dir)


def _picture_folder(source: Path, part: str) -> Path | None:
    return next((source / part / name for name in ("rgbs", "images") if (source / part / name).is_dir()), None)


def _match_pictures(model: pycolmap.Reconstruction, folder: Path, part: str) -> dict[str, Path]:
    """Find the file of each image of a model: of its name, or of its name but for the suffix.

    Raises InputError where one has no file, and where a test picture has no place in the model.
    """
    files = (path for path in folder.rglob("[!.]*") if path.suffix.lower() in SUFFIXES and path.is_file())
    present = {path.relative_to(folder).as_posix(): path for path in files}
    by_stem: dict[str, list[str]] = {}
    for name in present:
        by_stem.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(name)
    found: dict[str, Path] = {}
    missing: list[str] = []
    taken: set[str] = set()
    for wanted in sorted(image.name for image in model.images.values()):
        same_stem = by_stem.get(str(PurePosixPath(wanted).with_suffix("")), [])
        file = wanted if wanted in present else same_stem[0] if len(same_stem) == 1 else None
        if file is None or file in taken:
            missing.append(wanted)
        else:
            found[wanted] = present[file]
            taken.add(file)
    if missing:
        raise InputError(
            f"{len(missing)} of {model.num_images()} pictures of the {part} model are missing from {folder} "
            f"({missing[0]}): complete the download, or use the COLMAP model that belongs to it."
        )
    left_out = present.keys() - taken
    if left_out and part == "val":
        raise InputError(
            f"{len(left_out)} test pictures in {folder} are not in the COLMAP model of val ({min(left_out)}): use a "
            "model of all of them."
        )
    return found


def _undistort_photos(source: Path, photos: Path | None, folders: dict[str, Path]) -> None:
    """Make the pictures that are missing from the folders of train and val of the publishers' photos."""
    mappings = source / "mappings.txt"
    if photos is None:
        raise InputError(
            f"{source} holds no rgbs of train and val: download the dataset's photos as well and name their folder "
            "with --photos."
        )
    if not mappings.is_file():
        raise InputError(f"{mappings} does not exist: unpack the whole download of Mega-NeRF.")
    present = {part: {path.stem for path in folder.glob("*")} for part, folder in folders.items()}
    todo = []
    for line in mappings.read_text(errors="replace").splitlines():
        photo, _, metadata = (word.strip() for word in line.partition(","))
        usable = stays_inside(photo) and stays_inside(metadata)
        part = next((p for p in PARTS if usable and (source / p / "metadata" / metadata).is_file()), None)
        if part is None:
            raise InputError(
                f"{mappings} has the line {line[:100]!r}, which names no photo and metadata of this download: download "
                "it again."
            )
        stem = PurePosixPath(metadata).stem
        if stem in present[part]:
            continue
        if not (photos / photo).is_file():
            raise InputError(
                f"{photos / photo} of {mappings} does not exist: complete the photos, or correct --photos."
            )
        todo.append((photos / photo, source / part / "metadata" / metadata, folders[part] / f"{stem}.jpg"))
    in_threads(lambda task: _undistort(*task), todo, os.cpu_count() or 1, "Undistorting photos")


def _undistort(photo: Path, metadata: Path, target: Path) -> None:
    size, K, distortion = read_metadata(metadata)
    image = decode_image(photo)
    if image.shape[1::-1] != size:
        raise InputError(
            f"{photo} is {image.shape[1]}x{image.shape[0]} pixels where {metadata} has {size[0]}x{size[1]}: use the "
            "publishers' original photos."
        )
    undistorted = Image.fromarray(cv2.undistort(image, K, distortion))
    write_whole(target, lambda path: save_jpeg(undistorted, path))


def read_metadata(path: Path) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """Read width and height, [3, 3] intrinsics as OpenCV takes them, and OpenCV's distortion coefficients."""
    import torch  # the files are its checkpoints

    with read_as(path, "Mega-NeRF's metadata", "download it again"):
        metadata = torch.load(path, map_location="cpu", weights_only=True)
        fx, fy, cx, cy = np.asarray(metadata["intrinsics"], np.float64).reshape(4)
        distortion = np.asarray(metadata["distortion"], np.float64).reshape(-1)
        size = int(metadata["W"]), int(metadata["H"])
        K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        if not (np.isfinite(K).all() and np.isfinite(distortion).all() and min(fx, fy, *size) > 0):
            raise ValueError("its numbers are not those of a camera")
    return size, K, distortion
