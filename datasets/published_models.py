"""The models of a reconstruction, put where a dataset has them; one that was there before is kept."""

from __future__ import annotations

import filecmp
import itertools
import shutil
from pathlib import Path

from datasets.georeference import SIDE_FILE, LocalFrame
from datasets.photogrammetry import read_models, registered_names
from errors import InputError, counted


def publish(models: Path, out: Path, frame: LocalFrame | None) -> list[str]:
    """Write the models into `sparse`, the one of most photos as `sparse/0`; returns sentences on them.

    Args:
        models: The folder of those that were made, in COLMAP's files.
        out: The dataset's folder, which may hold others.
        frame: The place on the Earth that they are brought to; None: they stay as they are.

    Raises:
        InputError: The largest cannot be brought there.
    """
    sparse = out / "sparse"
    partial = sparse.with_name(".sparse.part")
    shutil.rmtree(partial, ignore_errors=True)
    found = read_models(models)
    sentences = []
    for number, model in enumerate(found):
        if frame is not None:
            distance = frame.align(model)
            if distance is None and number == 0:
                raise InputError(
                    "--georeference found no place for the model where its photos' GPS positions agree: leave it out."
                )
            sentences.append(
                f"sparse/{number} could not be georeferenced: too few of its photos have GPS that agrees."
                if distance is None
                else f"sparse/{number} is in metres east, north and up of the place in {SIDE_FILE}; the median camera "
                f"is {distance:.2f} m from its GPS position."
            )
        model.update_point_3d_errors()  # in pixels, which the global mapper's are not
        (partial / str(number)).mkdir(parents=True)
        model.write(partial / str(number))
    if _hold_the_same(partial, sparse):
        shutil.rmtree(partial)
    else:
        sentences += _set_aside(out)
        partial.rename(sparse)
    (out / SIDE_FILE).unlink(missing_ok=True)
    if frame is not None:
        frame.write(out / SIDE_FILE)
    if len(found) > 1:
        names = [registered_names(model) for model in found]
        num_others = len(set.union(*names) - names[0])
        sentences.append(
            f"The photos fell into {len(found)} models that could not be joined: sparse/0, the largest, is trained on; "
            f"the others hold {counted(num_others, 'photo')} that it lacks."
        )
    return sentences


def _hold_the_same(first: Path, second: Path) -> bool:
    """Tell whether two folders of models hold the same files."""
    files = [{path.relative_to(folder) for path in folder.glob("*/*.bin")} for folder in (first, second)]
    return files[0] == files[1] and all(filecmp.cmp(first / name, second / name, shallow=False) for name in files[0])


def _set_aside(out: Path) -> list[str]:
    """Move the model that OUT holds, with its place on the Earth, into a folder of its own; returns a sentence."""
    sparse = out / "sparse"
    if not sparse.exists():
        return []
    if (out / SIDE_FILE).exists():  # before its model goes, so that no interruption parts them
        (out / SIDE_FILE).rename(sparse / SIDE_FILE)
    folder = next(path for number in itertools.count(1) if not (path := out / f"replaced_{number}").exists())
    sparse.rename(folder)
    return [
        f"The model that was here before is kept in {folder}: training that began with it goes on with --model_dir "
        f"{folder.name}/0; train with the new one into another --result_dir."
    ]
