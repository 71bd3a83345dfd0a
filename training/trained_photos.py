"""Which photos a model has been trained on: figures of those among them that are held out now flatter it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from datasets.consistency import some_names
from datasets.model_choice import Say
from datasets.scene import Scene
from datasets.splits import split_indices
from errors import InputError, counted
from training.checkpoints import Checkpoint

SAME_CAMERA = 1e-2  # of the scene's extent: farther off a photo of the same name is another one


def trained_photos(checkpoint: Checkpoint, names: Sequence[str] = ()) -> set[str]:
    """Return the names of all photos that a checkpoint has been trained on, as far as it says so.

    Args:
        checkpoint: Whose options say which of its photos were held out at last, and which others it has seen before.
        names: Of its photos, where it is of an earlier version, which did not keep them.
    """
    names = list(checkpoint.photos) or names
    held_out = _held_out(checkpoint, names)
    trained = set() if held_out is None else {*names} - held_out
    return trained | {*checkpoint.also_trained_on}


def trained_photos_in(checkpoint: Checkpoint, scene: Scene) -> set[str]:
    """Return those of `trained_photos` that are photos of a scene, which may be another than the checkpoint's.

    A photo is known again by its name and the place of its camera. Others of its name, as all cameras number theirs
    alike, are none that it was trained on.
    """
    move = scene.transform @ np.linalg.inv(checkpoint.transform)
    places = dict(zip(scene.image_names, scene.camtoworlds[:, :3, 3], strict=True))
    common = [name for name in checkpoint.photos if name in places]
    if not common:
        return set()
    before = np.array([checkpoint.photos[name] for name in common]) @ move[:3, :3].T + move[:3, 3]  # [c, 3]
    shifts = np.linalg.norm(before - np.array([places[name] for name in common]), axis=1)
    is_same = np.median(shifts) <= SAME_CAMERA * scene.scene_scale
    return trained_photos(checkpoint) if is_same else set()


def warn_of_trained(trained: Collection[str], scene: Scene, checkpoint: Checkpoint, say: Say) -> None:
    """Say where held-out photos of a scene are among those that a model was trained on, and what holds out others.

    Args:
        trained: Names of those photos.
        scene: What is evaluated on.
        checkpoint: The model's.
        say: Takes the sentence.
    """
    seen = [name for name in (scene.image_names[index] for index in scene.test_ids) if name in trained]
    if not seen:
        return
    before = _held_out(checkpoint, scene.image_names)
    remedy = f"; {_rule(checkpoint)} holds out photos that were not" if before and not before & {*trained} else ""
    say(
        f"Warning: of {counted(len(scene.test_ids), 'held-out photo')} {len(seen)} had been trained on before "
        f"({some_names(seen)}), so that their figures flatter the model{remedy}."
    )


def with_photos_before(checkpoint: Checkpoint, trained: Collection[str]) -> Checkpoint:
    """Return a checkpoint that names photos which were trained on before, where it does not say so by itself."""
    return replace(checkpoint, also_trained_on=sorted({*trained} - trained_photos(checkpoint)))


def _held_out(checkpoint: Checkpoint, names: Collection[str]) -> set[str] | None:
    """Return which of these photos the options of a checkpoint hold out; None where they do not say."""
    every, after = map(checkpoint.options.get, ("test_every", "test_after"))
    if not isinstance(every, int) or not isinstance(after, int):
        return None
    ordered = sorted(names)
    try:
        _, test_ids = split_indices(len(ordered), test_every=every, test_after=after)
    except InputError:  # the rule leaves none of these
        return None
    return {ordered[index] for index in test_ids}


def _rule(checkpoint: Checkpoint) -> str:
    every, after = map(checkpoint.options.get, ("test_every", "test_after"))
    return f"--test_every {every}" if after == -1 else f"--test_every -1 --test_after {after}"
