"""Where no program may write: the folders of a dataset whose files are taken for its photos or its model."""

from __future__ import annotations

import os
import re
from pathlib import Path

from datasets.formats import project_files
from datasets.model_choice import places_of
from errors import InputError

_READ = re.compile(r"(images|masks)(_[\d.]+)?|depths|sparse")  # names of folders in a dataset


def check_outside_datasets(option: str, path: Path, data_dir: Path | None = None, model_dir: str = "") -> None:
    """Refuse a place to write to that lies in a folder of photos, masks, depths or a model, whatever links lead there.

    Args:
        option: That names it.
        path: It; need not exist. In a dataset's own folder, beside those, it may lie.
        data_dir: A dataset that is known; others are seen by what lies in them.
        model_dir: As `datasets.model_choice.load_sparse_model` takes it.

    Raises:
        InputError: With the folder.
    """
    folder = _read_folder(path, data_dir, model_dir)
    if folder is not None:
        raise InputError(
            f"{option} {path} would write into {folder}, which a dataset is read from: name a place outside of it."
        )


def _read_folder(path: Path, data_dir: Path | None, model_dir: str) -> Path | None:
    ways = {_absolute(path), _real(path)}
    for way in ways:
        for folder in (way, *way.parents):
            if _READ.fullmatch(folder.name) and _is_dataset(folder.parent, data_dir):
                return folder
    if data_dir is None:
        return None
    folders = [each for each in data_dir.iterdir() if _READ.fullmatch(each.name)] if data_dir.is_dir() else []
    if model_dir:  # but not one that is, or holds, the dataset itself
        models = (place for place in places_of(data_dir, model_dir) if place.is_dir())
        folders += [model for model in models if not _real(data_dir).is_relative_to(_real(model))]
    for folder in folders:  # also what is a link to another place
        if any(way.is_relative_to(_real(folder)) for way in ways):
            return folder
    return None


def _is_dataset(folder: Path, data_dir: Path | None) -> bool:
    if data_dir is not None and _real(folder) == _real(data_dir):
        return True
    return (folder / "images").is_dir() and ((folder / "sparse").is_dir() or bool(project_files(folder)))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
