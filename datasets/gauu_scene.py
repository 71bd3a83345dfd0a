"""GauU-Scene (arXiv 2404.04880): a folder for each scene with `images` and a COLMAP model in `sparse/0` or `sparse`.

A model may come with its points in points3D.ply alone.
"""

import os
import tempfile
from pathlib import Path

import pycolmap

from datasets.colmap_merge import find_model
from datasets.links import link_file, write_whole
from datasets.ply import read_points
from errors import InputError, reason


def prepare(source: Path, colmap: Path | None, data_dir: Path) -> None:
    """Link a downloaded scene into `data_dir`, whose points become a part of the COLMAP model where they are not.

    Args:
        source: the scene's folder, unpacked.
        colmap: folder of the COLMAP model; `source` where None.
        data_dir: the folder to fill; may be `source`.

    Raises:
        InputError: something is missing or unusable.
    """
    model_dir = find_model(colmap or source)
    if model_dir is None:
        raise InputError(
            f"{(colmap or source) / 'sparse'} holds no COLMAP model: download it as well and name its folder with "
            "--colmap."
        )
    images = source / "images"
    if not images.is_dir():
        raise InputError(f"{images} does not exist: unpack the scene and name its folder with --source.")
    target = data_dir / "sparse" / "0" if (data_dir / "sparse").resolve() != model_dir.resolve() else model_dir
    suffix = ".bin" if (model_dir / "cameras.bin").is_file() else ".txt"
    for name in ("cameras", "images", "points3D", "rigs", "frames"):
        if (model_dir / (name + suffix)).is_file():
            link_file(model_dir / (name + suffix), target / (name + suffix))
    if not (target / f"points3D{suffix}").is_file():
        _write_points(model_dir, suffix, target / f"points3D{suffix}")
    _link_folder(images, data_dir / "images")


def _write_points(model_dir: Path, suffix: str, target: Path) -> None:
    """Make points3D of the PLY file that stands in for it."""
    candidates = [model_dir / name for name in ("points3D.ply", "points3d.ply", "points.ply")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise InputError(f"{model_dir} holds neither points3D{suffix} nor points3D.ply: download the points as well.")
    points, colors = read_points(path)
    model = pycolmap.Reconstruction()
    for xyz, color in zip(points, colors, strict=True):
        model.add_point3D(xyz, pycolmap.Track(), color)
    with tempfile.TemporaryDirectory() as scratch:
        (model.write_binary if suffix == ".bin" else model.write_text)(scratch)
        content = (Path(scratch) / target.name).read_bytes()
    write_whole(target, lambda partial: partial.write_bytes(content))


def _link_folder(source: Path, target: Path) -> None:
    if target.exists() and os.path.samefile(source, target):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(source.resolve(), target, target_is_directory=True)
    except OSError as error:
        raise InputError(f"{target} cannot become a link to {source} ({reason(error)}): move it away.") from error
