import threading
from itertools import islice

import numpy as np
import pytest
import torch

from datasets.image_files import decode_image
from datasets.loader import evaluation_loader, training_loader
from datasets.scene import load_scene
from errors import InputError
from tests.small_scene import camera, write_scene


@pytest.fixture
def scene(tmp_path):
    return load_scene(write_scene(tmp_path, 7))


def order(scene, steps, **options) -> list[list[int]]:
    with training_loader(scene, np.arange(1, 7), **options) as loader:
        return [batch.image_ids.tolist() for batch in islice(loader, steps)]


def test_batches_hold_the_pictures_and_cameras_of_their_images(scene):
    with training_loader(scene, np.arange(1, 7), batch_size=3, num_workers=2) as loader:
        for batch in islice(loader, 4):
            assert batch.images.shape == (3, 64, 96, 3)
            assert batch.images.dtype == torch.uint8
            assert batch.masks is None
            assert (batch.Ks.dtype, batch.camtoworlds.dtype, batch.image_ids.dtype) == (
                torch.float32,
                torch.float32,
                torch.int64,
            )
            for slot, image_id in enumerate(batch.image_ids.tolist()):
                np.testing.assert_array_equal(batch.images[slot], decode_image(scene.image_paths[image_id]))
                np.testing.assert_array_equal(batch.Ks[slot], scene.cameras[0].K.astype(np.float32))
                np.testing.assert_array_equal(batch.camtoworlds[slot], scene.camtoworlds[image_id].astype(np.float32))


def test_each_epoch_is_another_permutation(scene):
    ids = [i for (i,) in order(scene, 18, seed=3)]
    epochs = [ids[:6], ids[6:12], ids[12:]]
    assert all(sorted(epoch) == [1, 2, 3, 4, 5, 6] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_order_depends_on_the_seed_alone(scene, batch_size):
    reference = order(scene, 15, seed=1, batch_size=batch_size, num_workers=1)
    for workers in (2, 5):
        assert order(scene, 15, seed=1, batch_size=batch_size, num_workers=workers) == reference
    assert order(scene, 15, seed=2, batch_size=batch_size) != reference


@pytest.mark.parametrize("batch_size", [1, 4])
def test_resumed_run_continues_the_order(scene, batch_size):
    whole = order(scene, 20, seed=1, batch_size=batch_size)
    for start in (1, 6, 13):
        assert order(scene, 20 - start, seed=1, batch_size=batch_size, start_step=start) == whole[start:]


def test_evaluation_is_one_pass_in_order(scene):
    with evaluation_loader(scene, np.array([5, 0, 3]), num_workers=2) as loader:
        assert [batch.image_ids.tolist() for batch in loader] == [[5], [0], [3]]


def test_broken_picture_surfaces_in_its_turn(scene):
    broken = scene.image_paths[3]
    broken.write_bytes(broken.read_bytes()[:-30])
    with evaluation_loader(scene, np.arange(7)) as loader:
        assert [next(loader).image_ids.item() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(InputError, match=r"003\.png"):
            next(loader)


def test_changed_size_is_named(tmp_path, scene):
    other = load_scene(write_scene(tmp_path / "other", 3, [camera(size=(48, 32))]))
    scene.image_paths[2].write_bytes(other.image_paths[0].read_bytes())
    with evaluation_loader(scene, np.array([2])) as loader, pytest.raises(InputError, match=r"002\.png"):
        next(loader)


def test_leaving_the_block_ends_the_threads(scene):
    before = set(threading.enumerate())  # some of which, of other tests, may just be ending

    def interrupted_training():
        with training_loader(scene, np.arange(7), num_workers=4) as loader:
            next(loader)
            assert set(threading.enumerate()) - before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_training()
    assert set(threading.enumerate()) <= before


def test_masks_come_with_pictures_that_need_them(tmp_path):
    cameras = [camera("OPENCV_FISHEYE", (40, 40, 48, 32, 0.6, 0, 0, 0))]
    scene = load_scene(write_scene(tmp_path, 3, cameras))
    with training_loader(scene, np.arange(3), batch_size=2) as loader:
        batch = next(loader)
    assert batch.masks.dtype == torch.bool
    assert batch.masks.shape == batch.images.shape[:3]
    np.testing.assert_array_equal(batch.masks[1], scene.cameras[0].valid_mask)
    assert 0.5 < batch.masks.float().mean() < 1


def test_batches_of_different_sizes_are_refused(tmp_path):
    scene = load_scene(write_scene(tmp_path, 4, [camera(), camera("PINHOLE", (50, 50, 24, 16), (48, 32))]))
    with pytest.raises(InputError, match=r"--batch_size 2.*2 sizes.*: use --batch_size 1\.$"):
        training_loader(scene, np.arange(4), batch_size=2)
    with pytest.raises(InputError, match="--batch_size is 0: give at least 1"):
        training_loader(scene, np.arange(4), batch_size=0)
    with training_loader(scene, np.arange(4)) as loader:
        assert {next(loader).images.shape[1:3] for _ in range(4)} == {(64, 96), (32, 48)}
    with training_loader(scene, np.array([0, 2]), batch_size=2) as loader:  # these two are alike
        assert next(loader).images.shape == (2, 64, 96, 3)
