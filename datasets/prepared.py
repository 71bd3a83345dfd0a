"""Checks a dataset folder before it is trained on: counts, sizes, the test split, the initial points."""

from pathlib import Path

import numpy as np

from configs import Config, scene_config
from datasets.camera import check_shape
from datasets.images import picture_sizes
from datasets.links import write_whole
from datasets.model_choice import load_sparse_model
from datasets.ply import read_points
from datasets.splits import split_indices
from errors import InputError

TEST_LIST = "test_images.txt"  # the published test pictures of a prepared dataset, a name on each line


def write_test_list(data_dir: Path, names: list[str]) -> None:
    """Remember which pictures the publishers of a dataset hold out."""
    write_whole(data_dir / TEST_LIST, lambda path: path.write_text("\n".join(sorted(names)) + "\n"))


def check_writable_place(data_dir: Path) -> None:
    """Raise InputError where `data_dir` holds a COLMAP model that was not made by preparing it."""
    if (data_dir / "sparse").exists() and not (data_dir / TEST_LIST).is_file():
        raise InputError(
            f"{data_dir / 'sparse'} exists and was not made by this command: move it away, or name another --data_dir."
        )


def check_prepared(dataset: str, data_dir: Path) -> list[str]:
    """Return the lines of a short report on a dataset that can be trained on as it is.

    Raises InputError where pictures are missing, without a picture's header or of another shape than their camera,
    where there are no initial points, or where the trainers would hold out other pictures than the published ones.
    """
    cfg = scene_config(dataset)
    if not data_dir.is_dir():
        raise InputError(f"{data_dir} does not exist: prepare the dataset first, or name its folder with --data_dir.")
    model, model_dir = load_sparse_model(data_dir)
    names = model.image_names
    images = data_dir / "images"
    missing = [name for name in names if not (images / name).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} pictures of the COLMAP model are missing from {images} ({missing[0]}): "
            "complete the download and prepare it again."
        )
    sizes = picture_sizes(images, names)
    for name, size, camera in zip(names, sizes, model.camera_indices, strict=True):
        shape = (int(model.camera_sizes[camera, 0]), int(model.camera_sizes[camera, 1]))
        check_shape(images / name, size, shape)
    train_ids, test_ids = split_indices(len(names), test_every=cfg.test_every, test_after=cfg.test_after)
    return [
        f"pictures: {len(names)}, {_ranges(sizes)}",
        f"cameras:  {len(model.camera_models)}, {', '.join(sorted(set(model.camera_models)))}, "
        f"{_ranges([tuple(size) for size in model.camera_sizes.tolist()])}",
        f"split:    {len(train_ids)} train, {len(test_ids)} test, {_check_split(data_dir, names, test_ids, cfg)}",
        f"points:   {_count_points(model_dir, len(model.points), cfg)}",
    ]


def _check_split(data_dir: Path, names: list[str], test_ids: np.ndarray, cfg: Config) -> str:
    """Say how the split came about. InputError where it holds out other pictures than the published ones."""
    rule = f"--test_after {cfg.test_after}" if cfg.test_after >= 0 else f"--test_every {cfg.test_every}"
    test_list = data_dir / TEST_LIST
    if not test_list.is_file():
        return f"by {rule}"
    published = set(test_list.read_text().split("\n")) - {""}
    selected = {names[i] for i in test_ids}
    if selected == published:
        return f"by {rule}, as published"
    num_train = len(names) - len(published)
    at_the_end = published == set(names[num_train:])
    if at_the_end and selected and selected < published:
        return (
            f"by {rule}; of the {len(published)} published test pictures {len(published - selected)} would be trained "
            f"on, --test_after {num_train - 1} holds them all out"
        )
    if at_the_end:
        remedy = f"train with --test_every -1 --test_after {num_train - 1}"
    else:
        remedy = "compare the download and its COLMAP models with what was published: some pictures are missing"
    raise InputError(
        f"{rule} selects {len(selected & published)} of the {len(published)} published test pictures of {data_dir} and "
        f"{len(selected - published)} others, since the COLMAP model has {num_train} training pictures: {remedy}."
    )


def _count_points(model_dir: Path, num_model_points: int, cfg: Config) -> str:
    if cfg.init_ply:
        return f"{len(read_points(model_dir / 'points.ply')[0])} in points.ply"
    if num_model_points == 0:
        raise InputError(f"{model_dir} holds no points to start from: use one that does.")
    return f"{num_model_points} in points3D"


def _ranges(sizes: list[tuple[int, int]]) -> str:
    smallest, largest = min(sizes), max(sizes)
    size = f"{smallest[0]}x{smallest[1]}"
    return f"{size} pixels" if smallest == largest else f"{size} to {largest[0]}x{largest[1]} pixels"
