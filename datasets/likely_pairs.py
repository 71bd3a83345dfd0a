"""Tells which photos are likely to see the same, by their largest features alone.

There are few of those in a photo, and they are seen from near and far. So all photos can be compared with all others by
them in a fraction of the time that matching all features takes, which is then spent on the likely pairs alone. This is
preemptive matching: C. Wu, "Towards Linear-time Incremental Structure from Motion", 3DV 2013.
"""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

NUM_FEATURES = 512  # of each photo, those of largest scale
NUM_PARTNERS = 30  # of each photo, those that agree best; more where it is a partner of others

_UNIT = 512**2  # the dot product of a descriptor with itself, as COLMAP stores them in 8 bits
_MAX_ANGLE, _MAX_RATIO = 0.7, 0.8  # radians, and to the second-best angle: those of COLMAP's own matching
_BLOCK = 4  # photos that are compared with one at once; their similarities, 4 MiB, stay in a processor's cache


def largest_features(keypoints: np.ndarray, descriptors: np.ndarray) -> np.ndarray:
    """Return the descriptors of a photo's features of largest scale, the largest first.

    Args:
        keypoints: [K, 6] of COLMAP: x, y, and the 2x2 matrix of a feature's shape.
        descriptors: [K, 128] of 8 bits.

    Returns:
        [NUM_FEATURES, 128] of 8 bits; the last rows are 0 where there are fewer.
    """
    shapes = keypoints[:, 2:].reshape(-1, 2, 2)  # [K, 2, 2]
    areas = np.abs(shapes[:, 0, 0] * shapes[:, 1, 1] - shapes[:, 0, 1] * shapes[:, 1, 0])  # [K]
    chosen = np.argsort(-areas, kind="stable")[:NUM_FEATURES]
    features = np.zeros((NUM_FEATURES, descriptors.shape[1]), np.uint8)
    features[: len(chosen)] = descriptors[chosen]
    return features


def likely_pairs(features: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs of photos that agree best: each photo's best partners. Shows a bar.

    Photos of which no feature agrees are no pair. Of partners that agree equally well, the nearest in the order of the
    photos goes first, as it is often the order in which they were taken.

    Args:
        features: [P, F, 128] of 8 bits: of each photo, as `largest_features` returns them.

    Returns:
        Pairs of indices of photos, the smaller one first, in order.
    """
    num_photos = len(features)
    counts = np.zeros((num_photos, num_photos), np.uint16)  # [P, P] of features that agree
    num_pairs = num_photos * (num_photos - 1) // 2
    with tqdm(total=num_pairs, desc="likely pairs", unit="pair", unit_scale=True, dynamic_ncols=True) as bar:
        for photo in range(num_photos - 1):
            for begin in range(photo + 1, num_photos, _BLOCK):
                block = slice(begin, begin + _BLOCK)
                counts[photo, block] = _num_agreeing(features[photo], features[block])
            bar.update(num_photos - 1 - photo)
    counts += counts.T
    pairs = set()
    places = np.arange(num_photos)
    for photo, of_photo in enumerate(counts):
        best = np.lexsort((np.abs(places - photo), -of_photo.astype(np.int32)))[:NUM_PARTNERS]
        for partner in best[of_photo[best] > 0].tolist():
            pairs.add((min(photo, partner), max(photo, partner)))
    return sorted(pairs)


def _num_agreeing(photo: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return how many features of a photo and of each of B others are each other's nearest, and clearly so.

    Args:
        photo: [F, 128] of 8 bits.
        others: [B, F, 128] of 8 bits.

    Returns:
        [B] counts.
    """
    num_others, num_features, num_values = others.shape
    # Sums of 128 products of 8 bits are below 2^24: float32 holds them exactly, in whatever order they are added.
    rows = others.reshape(-1, num_values).astype(np.float32)
    similarities = rows @ photo.astype(np.float32).T  # [B * F, F]
    nearest = similarities.argmax(1)[:, None]  # [B * F, 1], the photo's feature
    best = np.take_along_axis(similarities, nearest, 1)[:, 0]  # [B * F]
    best_of_photo = similarities.reshape(num_others, num_features, -1).max(1)  # [B, F]
    is_mutual = best == best_of_photo[np.arange(len(rows)) // num_features, nearest[:, 0]]
    np.put_along_axis(similarities, nearest, 0, 1)
    angles, second_angles = _angles(best), _angles(similarities.max(1))
    agrees = is_mutual & (angles < _MAX_ANGLE) & (angles < _MAX_RATIO * second_angles)
    return np.asarray(agrees.reshape(num_others, num_features).sum(1))


def _angles(similarities: np.ndarray) -> np.ndarray:
    """Return the angles in radians between descriptors of these dot products."""
    return np.asarray(np.arccos(np.minimum(similarities / _UNIT, 1.0)))
