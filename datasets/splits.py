"""Which photos are trained on and which are held out."""

import numpy as np

from errors import InputError, counted


def split_indices(num_images: int, *, test_every: int, test_after: int) -> tuple[np.ndarray, np.ndarray]:
    """Split photos, ordered by name, into those to train on and those that are held out.

    Args:
        num_images: how many photos the scene has.
        test_every: every photo whose index is a multiple of it is held out; -1 where `test_after` is used.
        test_after: every photo with a larger index is held out; -1 where `test_every` is used.

    Returns:
        Indices of those trained on and of those held out, int64, ascending.

    Raises:
        InputError: both or neither option is set, one is out of range, or a side of the split is empty.
    """
    if test_every == -1 and test_after == -1:
        raise InputError(
            "--test_every -1 and --test_after -1 hold no photo out: give --test_every 8, which holds out every "
            "eighth, or --test_after with the index above which photos are held out."
        )
    if test_every != -1 and test_after != -1:
        raise InputError(
            f"--test_every {test_every} and --test_after {test_after} are two rules for what is held out: give "
            f"--test_every -1 with --test_after {test_after}, or --test_after -1 with --test_every {test_every}."
        )
    indices = np.arange(num_images)
    if test_after == -1:
        if test_every < 1:
            raise InputError(
                f"--test_every is {test_every}: give at least 2, or -1 together with --test_after, the index "
                "above which photos are held out."
            )
        is_test = indices % test_every == 0
        option = f"--test_every {test_every}"
    else:
        if test_after < 0:
            raise InputError(f"--test_after is {test_after}: give at least 0, or -1 where --test_every says the rule.")
        is_test = indices > test_after
        option = f"--test_after {test_after}"
    if num_images < 2:
        raise InputError(
            f"The dataset has {counted(num_images, 'photo')}: give it two or more, one to train on and one to hold out."
        )
    if is_test.all():
        raise InputError(f"{option} leaves no photo to train on among {num_images}: give at least 2.")
    if not is_test.any():
        raise InputError(f"{option} holds out no photo of {num_images}: give at most {num_images - 2}.")
    return indices[~is_test], indices[is_test]
