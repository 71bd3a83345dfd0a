"""The pairs of photos that are matched are those that see the same, told by their largest features."""

import itertools
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from PIL import Image

from datasets import photogrammetry, reconstruct
from datasets.likely_pairs import NUM_FEATURES, _num_agreeing, largest_features, likely_pairs
from datasets.photogrammetry import PAIRS, find_likely_pairs, import_photos, match

NUM_PHOTOS, NUM_SEEN, STRIDE = 12, 64, 16  # each photo of a ring sees 64 things, 48 of which the next one sees too


def random_descriptors(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Descriptors of what is seen in one place alone, in floating point."""
    return np.abs(generator.normal(size=(*shape, 128))) ** 1.5 * 50


def to_bytes(descriptors: np.ndarray) -> np.ndarray:
    """As COLMAP stores them: of length 512, in 8 bits."""
    positive = descriptors.clip(0)
    return (positive / np.linalg.norm(positive, axis=-1, keepdims=True) * 512).round().clip(0, 255).astype(np.uint8)


def ring_of_photos() -> np.ndarray:
    """[P, F, 128] of 8 bits: what each photo sees, a little different each time, in an order of its own."""
    generator = np.random.default_rng(0)
    things = random_descriptors(generator, NUM_PHOTOS * STRIDE)
    photos = []
    for photo in range(NUM_PHOTOS):
        seen = things[(STRIDE * photo + generator.permutation(NUM_SEEN)) % len(things)]
        photos.append(to_bytes(seen + generator.normal(scale=4, size=seen.shape)))
    return np.stack(photos)


def pairs_of_ring(furthest: int) -> list[tuple[int, int]]:
    pairs = itertools.combinations(range(NUM_PHOTOS), 2)
    return [(i, j) for i, j in pairs if min(j - i, NUM_PHOTOS - (j - i)) <= furthest]


def test_partners_are_those_that_see_most_of_the_same(monkeypatch):
    photos = ring_of_photos()
    assert likely_pairs(photos) == pairs_of_ring(3)  # the others have nothing in common
    for num_partners, furthest in ((2, 1), (4, 2)):
        monkeypatch.setattr("datasets.likely_pairs.NUM_PARTNERS", num_partners)
        assert likely_pairs(photos) == pairs_of_ring(furthest)
    assert likely_pairs(photos[:0]) == []
    assert likely_pairs(np.zeros((3, NUM_FEATURES, 128), np.uint8)) == []  # blank photos


def test_of_partners_that_agree_equally_well_the_nearest_goes_first(monkeypatch):
    monkeypatch.setattr("datasets.likely_pairs.NUM_PARTNERS", 1)
    photos = np.repeat(ring_of_photos()[:1], 6, axis=0)
    assert likely_pairs(photos) == [(i, i + 1) for i in range(5)]


def test_features_agree_that_are_each_others_nearest_and_clearly_so():
    generator = np.random.default_rng(1)
    things = random_descriptors(generator, 60)
    photo = to_bytes(things + generator.normal(scale=12, size=things.shape))
    seen = np.stack([things, things, things])
    seen[:, :6] = things[6:12]  # seen twice: only the better one is the photo's nearest
    others = to_bytes(seen + generator.normal(size=seen.shape) * np.array([8, 40, 55])[:, None, None])
    photo[12:18] = photo[18:24]  # twice the same: which one is nearest is not clear
    others[2, 50:] = 0  # fewer features

    conditions = []
    for other in others:
        cosines = other.astype(float) @ photo.astype(float).T / 512**2
        table = np.arccos(np.minimum(cosines, 1))  # [others, photo's]
        rows = []
        for row in table:
            nearest, (best, second) = row.argmin(), np.sort(row)[:2]
            rows.append((best == table[:, nearest].min(), best < 0.7, best < 0.8 * second))
        conditions.append(rows)
    fulfilled = np.array(conditions)  # [B, F, 3]
    assert _num_agreeing(photo, others).tolist() == fulfilled.all(2).sum(1).tolist()
    for condition in range(3):  # each one alone rules out some
        assert (~fulfilled[..., condition] & np.delete(fulfilled, condition, 2).all(2)).any()


def test_the_largest_features_are_taken_and_missing_ones_are_zero():
    generator = np.random.default_rng(2)
    count = NUM_FEATURES + 100
    scales, angles = generator.permutation(count) + 1.0, generator.uniform(0, 2 * np.pi, count)
    cosines, sines = scales * np.cos(angles), scales * np.sin(angles)
    keypoints = np.stack([np.zeros(count), np.zeros(count), cosines, -sines, sines, cosines], axis=1)
    descriptors = generator.integers(1, 255, (count, 128), np.uint8)
    largest = np.argsort(-scales)[:NUM_FEATURES]
    np.testing.assert_array_equal(largest_features(keypoints, descriptors), descriptors[largest])
    few = largest_features(keypoints[:3], descriptors[:3])
    np.testing.assert_array_equal(few[:3], descriptors[:3][np.argsort(-scales[:3])])
    assert few.shape == (NUM_FEATURES, 128)
    assert not few[3:].any()
    assert not largest_features(keypoints[:0], descriptors[:0]).any()


@pytest.mark.slow
def test_likely_pairs_are_matched_whatever_their_names_and_interruptions(tmp_path, monkeypatch):
    database = tmp_path / "database.db"
    names = sorted([f"photo {number}.png" for number in range(NUM_PHOTOS - 2)] + ["#1.png", "a b/c\td.png"])
    (tmp_path / "a b").mkdir()
    for name in names:
        Image.new("RGB", (64, 48)).save(tmp_path / name)
    import_photos(database, tmp_path, names)
    shapes = np.tile([4.0, 0, 0, 4], (NUM_SEEN, 1))
    keypoints = np.hstack([np.random.default_rng(3).uniform(0, 48, (NUM_SEEN, 2)), shapes]).astype(np.float32)
    with closing(pycolmap.Database.open(database)) as opened:
        ids = [opened.read_image_with_name(name).image_id for name in names]
        for image_id, descriptors in zip(ids, ring_of_photos(), strict=True):
            opened.write_keypoints(image_id, keypoints)
            opened.write_descriptors(
                image_id, pycolmap.FeatureDescriptors(pycolmap.FeatureExtractorType.SIFT, descriptors)
            )
    find_likely_pairs(database)
    listed = (tmp_path / PAIRS).read_bytes()
    assert len(listed.splitlines()) == len(pairs_of_ring(3))

    def names_now() -> list[str]:
        with closing(pycolmap.Database.open(database)) as opened:
            return sorted(image.name for image in opened.read_all_images())

    with monkeypatch.context() as patched:

        def stop(*arguments: object, **options: object) -> None:
            assert names_now() != names  # what would be found if the whole command were killed now
            raise KeyboardInterrupt

        patched.setattr(photogrammetry, "run_in_child", stop)
        with pytest.raises(KeyboardInterrupt):
            match(database, "preemptive", None)
    assert names_now() == names
    photogrammetry._rename(database, photogrammetry._CODES)
    import_photos(database, tmp_path, names)
    assert names_now() == names

    match(database, "preemptive", None)
    assert names_now() == names
    with closing(pycolmap.Database.open(database)) as opened:
        pairs = itertools.combinations(range(NUM_PHOTOS), 2)
        assert [(i, j) for i, j in pairs if opened.exists_matches(ids[i], ids[j])] == pairs_of_ring(3)
        num_shared = len(opened.read_matches(ids[0], ids[1]))
    assert num_shared == NUM_SEEN - STRIDE
    find_likely_pairs(database)
    assert (tmp_path / PAIRS).read_bytes() == listed


@pytest.mark.slow
def test_pairs_that_are_known_are_not_looked_for_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 48), (60 * number, 90, 90)).save(tmp_path / f"photos/{number}.png")
    command = [str(tmp_path / "photos"), "--out", str(tmp_path / "scene"), "--matching", "preemptive"]

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reconstruct, "match", stop)
    with pytest.raises(SystemExit):
        reconstruct.main(command)
    steps = tmp_path / "scene/reconstruction/steps.json"
    assert "pairs" in json.loads(steps.read_text())
    assert Path(tmp_path / "scene/reconstruction" / PAIRS).read_text() == ""  # blank photos
    monkeypatch.undo()
    monkeypatch.setattr(reconstruct, "find_likely_pairs", stop)
    with pytest.raises(SystemExit) as ended:
        reconstruct.main(command)
    assert ended.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert "no two of them have enough in common" in sentence
    assert sentence.endswith("or compare all pairs of them with --matching exhaustive.")
