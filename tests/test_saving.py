"""Saving while training goes on: what it takes of memory, and that the files hold what one moment had."""

import gc
import sys
from concurrent.futures import wait
from contextlib import nullcontext
from pathlib import Path
from threading import Semaphore, current_thread

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.aerial_scene import aerial_scene
from offload.adam.state import stored_values
from offload.store.device_store import DeviceStore
from offload.store.host_store import HostStore
from tests.aerial_training import KINDS, gaussians_of, rows_of, train_on_random_gradients, views_of
from tests.resident_memory import resident_bytes
from tests.training_scripts import slow_but
from training import checkpoint_writing
from training.checkpoint_folder import CheckpointFolder
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import Checkpoint, load_checkpoint, peek_checkpoint
from training.ply import load_ply, save_ply

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", slow_but(["gpu_only", "geometry on host", "streamed"], KINDS))
def test_a_ply_file_written_block_by_block_is_that_of_all_rows_at_once(monkeypatch, tmp_path, kind):
    parameters, cameras = aerial_scene(5000, seed=0)
    gaussians = gaussians_of(kind, parameters, CPU)
    train_on_random_gradients(gaussians, views_of(cameras), range(8))
    all_rows = {name: value.clone() for name, value in gaussians.rows(0, 5000).items()}
    once, blocks = tmp_path / "once" / "points.ply", tmp_path / "blocks" / "points.ply"  # each names its side file
    once.parent.mkdir()
    blocks.parent.mkdir()
    save_ply(once, rows_of(all_rows), 5000, np.eye(4))
    monkeypatch.setattr("training.ply.MOST_ROWS", 999)
    save_ply(blocks, gaussians.rows, 5000, np.eye(4))
    assert blocks.read_bytes() == once.read_bytes()
    assert torch.equal(load_ply(blocks)["shN"], all_rows["shN"])
    if kind.startswith(("geometry", "streamed")):
        assert not torch.equal(stored_values(gaussians.state(), "shN"), all_rows["shN"])  # some rows lag behind


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["gpu_only", "geometry on host", "streamed, bfloat16"])
def test_writing_a_ply_file_takes_little_memory(tmp_path, kind):
    """At most 5 % of the model."""
    num_gaussians = 200_000
    parameters, cameras = aerial_scene(num_gaussians, seed=0)
    gaussians = gaussians_of(kind, parameters, CPU)
    train_on_random_gradients(gaussians, views_of(cameras), range(1))
    save_ply(tmp_path / "a.ply", gaussians.rows, 1000, np.eye(4))  # threads have their stacks from now on
    model_bytes = sum(value.nbytes for value in gaussians.state().values())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    save_ply(tmp_path / "a.ply", gaussians.rows, num_gaussians, np.eye(4))
    assert resident_bytes("VmHWM") - before < 0.05 * model_bytes


# ------------------------------------------------------------------------------------------- checkpoints, meanwhile

GUARDED = (
    *("gpu_only, deferred", "geometry on device", "geometry on device, compact", "geometry on host", "split"),
    *("streamed", "streamed, bfloat16", "streamed, geometry on host"),
)


class SlowSaver:
    """Lets the thread that copies a checkpoint behind training copy a block only when a test says so."""

    def __init__(self, monkeypatch) -> None:
        self._turns = Semaphore(0)
        self.copied_before_change = 0  # blocks
        submit = checkpoint_writing._Guard._submit

        def waiting_submit(guard, blocks):
            behind = current_thread().name.startswith("checkpoint-publisher")
            if behind:
                self._turns.acquire()
            before = sum(copy is not None for copy in guard._copies)
            copies = submit(guard, blocks)
            if not behind:
                self.copied_before_change += sum(copy is not None for copy in guard._copies) - before
            return copies

        monkeypatch.setattr(checkpoint_writing._Guard, "_submit", waiting_submit)
        monkeypatch.setattr(checkpoint_writing, "GUARDED_ROWS", 64)

    def copy(self, blocks: int) -> None:
        self._turns.release(blocks)


def save_while_training(
    monkeypatch, folder: Path, kind: str, device: torch.device = CPU, *, densify: bool = False
) -> int:
    """Write ckpt_3.pt during five steps, after at_once.pt of the same moment; returns the blocks that did not wait."""
    parameters, cameras = aerial_scene(20_000, seed=0)
    views = views_of(cameras)
    gaussians = gaussians_of(kind, parameters, device)
    train_on_random_gradients(gaussians, views, range(3))
    saver, saving = SlowSaver(monkeypatch), CheckpointFolder(folder, keep=0)
    save_checkpoint(folder / "at_once.pt", Checkpoint(3, np.eye(4), gaussians.state()))
    path = saving.save(Checkpoint(3, np.eye(4), gaussians.state()), gaussians.copied_before_change())
    try:
        for step in range(3, 8):
            saver.copy(blocks=2)
            train_on_random_gradients(gaussians, views, [step])
        assert gaussians.steps_done == 8
        assert not path.exists()  # all these steps have passed meanwhile
        if densify:
            gaussians.append_copies(torch.arange(0, 20_000, 10))
            gaussians.keep(torch.randperm(22_000)[:21_000])
            train_on_random_gradients(gaussians, views, range(8, 10))
    finally:
        copied_before_change = saver.copied_before_change
        saver.copy(blocks=10_000)
    wait([saving._publishing])
    assert saving.wait() is None
    saving.close()
    return copied_before_change


def is_of_one_moment(folder: Path) -> bool:
    actual, expected = (peek_checkpoint(folder / name).state for name in ("ckpt_3.pt", "at_once.pt"))
    assert actual.keys() == expected.keys()
    return all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", GUARDED)
def test_a_checkpoint_holds_one_moment_while_training_goes_on(monkeypatch, tmp_path, kind):
    copied = save_while_training(monkeypatch, tmp_path, kind)
    assert is_of_one_moment(tmp_path)
    load_checkpoint(tmp_path / "ckpt_3.pt")  # checksums and stamps are right
    groups = 2 if kind.endswith("geometry on host") else 1
    assert 0 < copied < groups * (20_000 // 64)  # some, and some have been left to the saver


@pytest.mark.cuda
@pytest.mark.parametrize("kind", GUARDED)
def test_a_checkpoint_holds_one_moment_while_training_goes_on_on_the_gpu(monkeypatch, tmp_path, kind):
    save_while_training(monkeypatch, tmp_path, kind, torch.device("cuda"))
    assert is_of_one_moment(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GUARDED)
def test_rows_that_change_without_a_word_are_noticed(monkeypatch, tmp_path, kind):
    for store_type in (HostStore, DeviceStore):
        monkeypatch.setattr(store_type, "changing", lambda store, ids: nullcontext(store.rows))
    save_while_training(monkeypatch, tmp_path, kind)
    assert not is_of_one_moment(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpu_only, deferred", "geometry on host", "streamed", "streamed, geometry on host"])
def test_a_refinement_lets_a_checkpoint_be_copied_first(monkeypatch, tmp_path, kind):
    copied = save_while_training(monkeypatch, tmp_path, kind, densify=True)
    assert is_of_one_moment(tmp_path)
    assert copied > 20_000 // 64 // 2


def test_a_refinement_on_the_device_gives_the_old_rows_back_while_a_checkpoint_is_written(monkeypatch, tmp_path):
    parameters, cameras = aerial_scene(20_000, seed=0)
    gaussians = gaussians_of("gpu_only, deferred", parameters, CPU)
    train_on_random_gradients(gaussians, views_of(cameras), range(3))
    saver, saving = SlowSaver(monkeypatch), CheckpointFolder(tmp_path, keep=0)
    saving.save(Checkpoint(3, np.eye(4), gaussians.state()), gaussians.copied_before_change())
    (store,) = {*gaussians.copied_before_change().values()}
    old = [StorageWeakRef(tensor.untyped_storage()) for tensor in store.rows.tensors()]
    try:
        gaussians.keep(torch.arange(19_000))
        gc.collect()
        assert all(storage.expired() for storage in old)
    finally:
        saver.copy(blocks=10_000)
        assert saving.wait() is None
        saving.close()


def test_a_disk_that_fails_behind_training_costs_that_checkpoint_alone(monkeypatch, tmp_path):
    parameters, cameras = aerial_scene(20_000, seed=0)
    views = views_of(cameras)
    gaussians = gaussians_of("geometry on host", parameters, CPU)
    stores = {*gaussians.copied_before_change().values()}
    saving = CheckpointFolder(tmp_path, keep=0)

    def save(steps_done: int) -> None:
        train_on_random_gradients(gaussians, views, [steps_done - 1])
        saving.save(Checkpoint(steps_done, np.eye(4), gaussians.state()), gaussians.copied_before_change())

    save(1)
    assert saving.wait() is None
    with monkeypatch.context() as patch:
        saver = SlowSaver(patch)
        save(2)
        patch.setattr("os.pwrite", fails)
        train_on_random_gradients(gaussians, views, [2])  # rows change, although they cannot be copied
        saver.copy(blocks=10_000)
        assert isinstance(saving.wait(), OSError)
    assert all(store.before_change is None for store in stores)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_1.pt"]
    assert saving.newest_valid(print).steps == 1
    save(4)
    assert saving.wait() is None
    saving.close()
    assert torch.equal(peek_checkpoint(tmp_path / "ckpt_4.pt").state["exp_avg/shN"], gaussians.state()["exp_avg/shN"])


def fails(*arguments: object) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["geometry on host", "streamed"])
def test_a_checkpoint_written_behind_training_takes_little_memory(tmp_path, kind):
    """At most 5 % of the model, also for rows that are copied because they change."""
    num_gaussians = 200_000
    parameters, _ = aerial_scene(num_gaussians, seed=0)
    gaussians = gaussians_of(kind, parameters, CPU)
    saving = CheckpointFolder(tmp_path, keep=1)

    def save(steps_done: int) -> None:
        saving.save(Checkpoint(steps_done, np.eye(4), gaussians.state()), gaussians.copied_before_change())
        for store in {*gaussians.copied_before_change().values()}:
            with store.changing(torch.arange(num_gaussians // 2)):
                pass
        assert saving.wait() is None

    save(0)  # threads have their stacks from now on
    model_bytes = sum(value.nbytes for value in gaussians.state().values())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    save(0)
    saving.close()
    assert resident_bytes("VmHWM") - before < 0.05 * model_bytes
