"""Chooses the model of a dataset among all that lie there, COLMAP's before those of other programs, and says so.

COLMAP's mapper writes a model for each part of the photos that it could not join, and not the largest one first.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

from datasets.colmap import PARTS, SparseModel, has_model, load_model, model_suffixes
from datasets.formats import WHAT_IS_READ, ProjectFile, project_files, read_project
from datasets.paths import photo_names
from errors import InputError, counted

Say = Callable[[str], None]  # takes one sentence for the user

_SEARCHED_FOLDERS = 200  # of a dataset, for models that lie elsewhere than in sparse


def quiet(sentence: str) -> None:
    """Say nothing."""


def places_of(data_dir: Path, model_dir: str) -> tuple[Path, Path]:
    """Return where --model_dir may lie: in the dataset, or else from the working directory."""
    return data_dir / model_dir, Path(model_dir)


def is_named(path: Path, data_dir: Path, model_dir: str) -> bool:
    """Tell whether --model_dir names a folder or file, from the dataset or from the working directory."""
    places = places_of(data_dir, model_dir) if model_dir and path.exists() else ()
    return any(place.exists() and place.samefile(path) for place in places)


def load_sparse_model(data_dir: Path, model_dir: str = "", say: Say = quiet) -> tuple[SparseModel, Path]:
    """Load the dataset's reconstruction: the one that is named, else the one of most photos in `sparse`.

    Args:
        data_dir: The dataset.
        model_dir: Folder of the model, or another program's file, relative to the dataset or to the working directory;
            empty to choose.
        say: Is told what else there is, and what looks better.

    Returns:
        The model, and its folder; the file of another program's model.

    Raises:
        InputError: There is no such folder or no model, or the one to take is unreadable or unsupported.
    """
    if not data_dir.is_dir():
        raise InputError(f"{data_dir} does not exist or is no folder: name a dataset's folder with --data_dir.")
    folders = _folders_in_sparse(data_dir)
    projects = project_files(data_dir)
    named = [project for project in projects if is_named(project.path, data_dir, model_dir)]
    if named or (projects and not folders and not model_dir):
        chosen_project = (named or projects)[0]
        say(_program_line(chosen_project, projects, bool(folders), data_dir))
        model = read_project(chosen_project, data_dir)
        for remark in model.remarks:
            say(f"Warning: {remark}")
        return model, chosen_project.path
    if projects:
        say(f"Format: COLMAP; {_others(projects, data_dir)}.")
    if model_dir:
        wanted = next((folder for folder in places_of(data_dir, model_dir) if has_model(folder)), None)
        if wanted is None:
            raise InputError(f"--model_dir {model_dir} holds no COLMAP model: {_remedy(data_dir, folders)}.")
        others = [folder for folder in folders if not folder.samefile(wanted)]
        folders = [wanted, *others]
    if not folders:
        raise InputError(
            f"{data_dir} holds no COLMAP model (cameras, images and points3D, .bin or .txt, in "
            f"{data_dir / 'sparse' / '0'} or {data_dir / 'sparse'}), and no {WHAT_IS_READ}: {_remedy(data_dir, [])}."
        )
    models = {folders[0]: load_model(folders[0], data_dir)}  # which is refused where it is damaged
    for folder in folders[1:]:
        try:
            models[folder] = load_model(folder, data_dir)
        except InputError as error:
            say(f"Warning: {_name(folder, data_dir)} holds another COLMAP model, which cannot be used: {error}")
    photos = {folder: _present(data_dir, model) for folder, model in models.items()}
    chosen = folders[0] if model_dir else max(models, key=lambda folder: len(photos[folder]))  # the first of equals
    if len(models) > 1:
        say(_comparison(chosen, photos, data_dir))
    else:
        _look_elsewhere(chosen, len(photos[chosen]), data_dir, say)
    suffixes = model_suffixes(chosen)
    if len(suffixes) > 1:
        say(
            f"Warning: {_name(chosen, data_dir)} holds a model as {suffixes[0]} and as older {suffixes[1]} files: the "
            f"{suffixes[0]} files are used; remove those that are out of date."
        )
    else:
        _name_newer_parts(chosen, suffixes[0], data_dir, say)
    for remark in models[chosen].remarks:
        say(f"Warning: {remark}")
    return models[chosen], chosen


def points_ply(model_path: Path) -> Path:
    """Return where --init_ply takes points from: points.ply in a model's folder, or beside its file."""
    return (model_path if model_path.is_dir() else model_path.parent) / "points.ply"


def _program_line(project: ProjectFile, projects: list[ProjectFile], has_colmap: bool, data_dir: Path) -> str:
    """Say which program's file is read, and which others lie there."""
    rest = [other for other in projects if other != project]
    also = [_others(rest, data_dir)] if rest else []
    also += ["the COLMAP model in sparse is not read"] if has_colmap else []
    return f"Format: {'; '.join([f'{project.program}, {_name(project.path, data_dir)}', *also])}."


def _others(projects: list[ProjectFile], data_dir: Path) -> str:
    files = [f"{_name(project.path, data_dir)} ({project.program})" for project in projects]
    return f"{', '.join(files)} not read (--model_dir {_name(projects[0].path, data_dir)} takes it)"


def _folders_in_sparse(data_dir: Path) -> list[Path]:
    """Return `sparse/0`, `sparse/1`, ..., other folders in `sparse`, and `sparse`: those that hold a model."""
    sparse = data_dir / "sparse"
    inside = [path for path in sparse.iterdir() if path.is_dir()] if sparse.is_dir() else []
    inside.sort(key=lambda path: (not path.name.isdecimal(), int(path.name) if path.name.isdecimal() else 0, path.name))
    found = [folder for folder in (*inside, sparse) if has_model(folder)]
    return [folder for folder in found if _is_whole(folder)] or found[:1]


def _is_whole(folder: Path) -> bool:
    try:
        return bool(model_suffixes(folder))
    except InputError:
        return False


def _present(data_dir: Path, model: SparseModel) -> set[str]:
    return {name for name in model.image_names if (data_dir / "images" / name).is_file()}


def _comparison(chosen: Path, photos: dict[Path, set[str]], data_dir: Path) -> str:
    """Say which of several models is used, what the others hold, and how to take them."""
    ours = photos[chosen]
    others = []
    for folder, theirs in photos.items():
        if folder != chosen:
            more = f", {len(theirs - ours):,} of which it lacks" if theirs - ours else ""
            others.append(f"{_name(folder, data_dir)} holds {len(theirs):,}{more}")
    looks_better = any(len(theirs) > len(ours) or theirs - ours for theirs in photos.values())
    first = next(iter(photos))
    return (
        ("Warning: " if looks_better or chosen != first else "")
        + f"Of {len(photos)} COLMAP models {_name(chosen, data_dir)} is used, which holds "
        + f"{counted(len(ours), 'photo')}; "
        + ", ".join(others)
        + f" (--model_dir {_name(next(folder for folder in photos if folder != chosen), data_dir)} takes "
        + ("the other)." if len(photos) == 2 else "that one).")
    )


def _name_newer_parts(model_dir: Path, suffix: str, data_dir: Path, say: Say) -> None:
    """Warn of parts of a model in another format that are newer than those in use, and no whole model."""
    for part in PARTS:
        used = model_dir / (part + suffix)
        for other in (".bin", ".txt", ".ply"):
            path = used.with_suffix(other)
            if other != suffix and path.is_file() and path.stat().st_mtime_ns > used.stat().st_mtime_ns:
                say(f"Warning: {_name(path, data_dir)} is newer than {used.name}, which is used in its place.")


def _look_elsewhere(chosen: Path, num_photos: int, data_dir: Path, say: Say) -> None:
    """Warn where a model outside `sparse` holds more of the photos; looked for where photos are left over."""
    if num_photos >= len(photo_names(data_dir / "images")):
        return
    for folder in _models_elsewhere(data_dir):
        if folder.samefile(chosen):
            continue
        try:
            num_there = len(_present(data_dir, load_model(folder, data_dir)))
        except InputError:
            continue
        if num_there > num_photos:
            name = _name(folder, data_dir)
            say(
                f"Warning: {_name(chosen, data_dir)} holds {counted(num_photos, 'photo')}, and {name} {num_there:,}: "
                f"--model_dir {name} takes that model."
            )


def _models_elsewhere(data_dir: Path) -> list[Path]:
    """Return folders up to three levels below the dataset, but for those in `sparse`, that hold a whole model."""
    found, level = [], [data_dir]
    searched = 0
    for _ in range(3):
        below = []
        for folder in level:
            for path in sorted(folder.iterdir()) if os.access(folder, os.R_OK | os.X_OK) else []:
                skipped = path.name.startswith((".", "images", "masks")) or path == data_dir / "sparse"
                searched += 1
                if skipped or searched > 50 * _SEARCHED_FOLDERS or not path.is_dir():
                    continue
                below.append(path)
                if has_model(path) and _is_whole(path):
                    found.append(path)
        level = below[:_SEARCHED_FOLDERS]
    return found


def _remedy(data_dir: Path, folders: list[Path]) -> str:
    elsewhere = _models_elsewhere(data_dir)
    datasets = [] if (data_dir / "images").is_dir() else _datasets_of(elsewhere, data_dir)
    if datasets and not folders:
        options = [f"--data_dir {shlex.quote(str(folder))}" for folder in datasets[:5]]
        return f"{'a dataset lies' if len(datasets) == 1 else 'datasets lie'} below it, so give {' or '.join(options)}"
    found = [_name(folder, data_dir) for folder in (*folders, *elsewhere)][:5]
    if not found:
        return (
            "python -m datasets.reconstruct PHOTOS --out DATASET makes one of photos, and --model_dir names the "
            "folder of one that lies elsewhere"
        )
    return f"there are models in {', '.join(found)}, which --model_dir takes"


def _datasets_of(models: list[Path], data_dir: Path) -> list[Path]:
    """Return the folders below `data_dir` that hold both pictures and one of the models."""
    found = {
        folder: None
        for model in models
        for folder in model.parents
        if data_dir in folder.parents and (folder / "images").is_dir()
    }
    return list(found)


def _name(folder: Path, data_dir: Path) -> str:
    return str(folder.relative_to(data_dir)) if folder.is_relative_to(data_dir) else str(folder)
