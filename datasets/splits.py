"""Which images are trained on and which are held out."""

import numpy as np

from errors import InputError


def split_indices(num_images: int, *, test_every: int, test_after: int) -> tuple[np.ndarray, np.ndarray]:
    """Split images, ordered by name, into training and test images.

    Args:
        num_images: how many images the scene has.
        test_every: every image whose index is a multiple of it is a test image; -1 where `test_after` is used.
        test_after: every image with a larger index is a test image; -1 where `test_every` is used.

    Returns:
        train and test indices, int64, ascending.

    Raises:
        InputError: both or neither option is set, one is out of range, or a side of the split is empty.
    """
    if (test_every == -1) == (test_after == -1):
        raise InputError(
            f"Set exactly one of test_every and test_after, and the other to -1 (got test_every={test_every}, "
            f"test_after={test_after})."
        )
    indices = np.arange(num_images)
    if test_after == -1:
        if test_every < 1:
            raise InputError(f"test_every must be at least 1, or -1 where test_after is used (got {test_every}).")
        is_test = indices % test_every == 0
    else:
        if test_after < 0:
            raise InputError(f"test_after must be at least 0, or -1 where test_every is used (got {test_after}).")
        is_test = indices > test_after
    option = f"test_every={test_every}" if test_after == -1 else f"test_after={test_after}"
    for side, members in (("train", ~is_test), ("test", is_test)):
        if not members.any():
            raise InputError(f"{option} leaves no {side} image among {num_images}: choose another value.")
    return indices[~is_test], indices[is_test]
