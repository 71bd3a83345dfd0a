"""Pictures that are kept are those that would be decoded, are decoded once, and make way for Gaussians."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import simple_trainer
import simple_trainer_hybrid_optimized_split
import simple_trainer_hybrid_streamed
from benchmarks.troubled_city import write_city
from datasets import free_memory, kept_pictures, loader
from datasets.kept_pictures import KeptPictures, what_is_kept
from datasets.loader import Batch, training_loader
from datasets.scene import Scene, load_scene
from strategies import ops
from strategies.ops import RoomForGrowth
from tests.interrupted_runs import run_script
from tests.small_scene import camera, write_scene
from tests.waiting import wait_until
from training.memory_estimate import Need, bytes_to_spare

AMPLE = 10**8  # bytes; all pictures of a test
FISHEYE = ("OPENCV_FISHEYE", (40, 40, 48, 32, 0.6, 0, 0, 0))
FIELDS = ("images", "masks", "Ks", "camtoworlds", "image_ids", "inverse_depths")


@pytest.fixture(autouse=True)
def ample_memory(monkeypatch) -> None:
    """Whatever else this machine does at the time."""
    monkeypatch.setattr(free_memory, "free_bytes", lambda: 100 * AMPLE)


@pytest.fixture(scope="module")
def mapped_city(tmp_path_factory) -> Path:
    """With depth maps, and masks that hide a corner of every other photo."""
    data_dir = tmp_path_factory.mktemp("data") / "city"
    write_city(data_dir, num_views=10, width=64, height=48, num_points=800, depths=True)
    (data_dir / "masks").mkdir()
    mask = np.full((48, 64), 255, np.uint8)
    mask[:20, :24] = 0
    for photo in sorted((data_dir / "images").iterdir())[::2]:
        assert cv2.imwrite(str(data_dir / "masks" / f"{photo.name}.png"), mask)
    return data_dir


@pytest.fixture
def decoded(monkeypatch) -> Counter[str]:
    """How often each picture has been decoded, by its name."""
    times: Counter[str] = Counter()
    decode = loader.decode_picture

    def counted(path: Path, size: tuple[int, int]):
        times[path.name] += 1
        return decode(path, size)

    monkeypatch.setattr(loader, "decode_picture", counted)
    return times


def small_scene(folder: Path, num_views: int, *cameras) -> Scene:
    """A scene whose pictures differ."""
    write_scene(folder, num_views, list(cameras))
    for index, path in enumerate(sorted((folder / "images").iterdir())):
        picture = np.roll(cv2.imread(str(path)), 7 * index, axis=1)
        assert cv2.imwrite(str(path), picture)
    return load_scene(folder)


def some_scene(kind: str, folder: Path, mapped_city: Path) -> Scene:
    if kind == "depths and masks":
        return load_scene(mapped_city, depths=True)
    cameras = {
        "plain": [camera()],
        "distorted": [camera(*FISHEYE)],
        "several sizes": [camera(), camera("PINHOLE", (50, 50, 24, 16), (48, 32)), camera(*FISHEYE)],
    }
    return small_scene(folder, 7, *cameras[kind])


def batches_of(scene: Scene, steps: int, **options) -> list[Batch]:
    with training_loader(scene, scene.train_ids, seed=2, **options) as batches:
        return list(islice(batches, steps))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for batch, other in zip(found, expected, strict=True):
        assert set(vars(batch)) == set(FIELDS)
        for name in FIELDS:
            one, two = getattr(batch, name), getattr(other, name)
            assert (one is None) == (two is None), name
            if one is not None:
                assert one.dtype == two.dtype, name
                assert torch.equal(one, two), name


def bytes_of_one(scene: Scene) -> int:
    """What one picture of a scene takes."""
    kept = KeptPictures(AMPLE)
    kept.keep(0, batches_of(scene, 1)[0])
    return kept.nbytes


@pytest.mark.parametrize("kept", ["all", "some"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start_step": 5},
        {"batch_size": 3},
        {"batch_size": 2, "start_step": 3},
        {"rank": 1, "num_ranks": 2},
        {"rank": 1, "num_ranks": 2, "batch_size": 2, "start_step": 2},
        {"view_window": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["plain", "distorted", "several sizes", "depths and masks"])
def test_batches_are_those_of_a_loader_that_keeps_nothing(tmp_path, mapped_city, kind, options, kept):
    scene = some_scene(kind, tmp_path, mapped_city)
    if kind == "several sizes" and options.get("batch_size", 1) * options.get("num_ranks", 1) > 1:
        pytest.skip("is refused")
    keep_bytes = AMPLE if kept == "all" else 3 * bytes_of_one(scene)
    expected = batches_of(scene, 24, **options)
    for workers in (1, 4):
        assert_same(batches_of(scene, 24, num_workers=workers, keep_bytes=keep_bytes, **options), expected)
    if kind == "depths and masks":
        assert expected[0].inverse_depths is not None
        assert any(batch.masks is not None for batch in expected)


def test_a_batch_of_several_views_has_those_of_one_beside_each_other(mapped_city):
    scene = load_scene(mapped_city, depths=True)
    single, several = batches_of(scene, 24), batches_of(scene, 8, batch_size=3)
    whole = torch.ones(1, 48, 64, dtype=torch.bool)
    assert 0 < sum(batch.masks is None for batch in single) < 24
    for batch, views in zip(several, zip(*[iter(single)] * 3, strict=True), strict=True):
        if any(view.masks is not None for view in views):
            views = [replace(view, masks=whole if view.masks is None else view.masks) for view in views]
        of_all = {name: [getattr(view, name) for view in views] for name in FIELDS}
        joined = {name: None if tensors[0] is None else torch.cat(tensors) for name, tensors in of_all.items()}
        assert_same([batch], [Batch(**joined)])


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"rank": 0, "num_ranks": 2}], ids=str)
def test_a_picture_that_is_kept_is_decoded_once(tmp_path, decoded, options):
    scene = small_scene(tmp_path, 7)
    batches_of(scene, 40, num_workers=1, keep_bytes=AMPLE, **options)
    assert decoded == {scene.image_names[image_id]: 1 for image_id in scene.train_ids}


def test_a_batch_of_one_kept_view_is_given_out_again_as_it_is(tmp_path):
    scene = small_scene(tmp_path, 7)
    first, second, third = [], [], []
    with training_loader(scene, scene.train_ids, num_workers=1, keep_bytes=AMPLE) as batches:
        for epoch in (first, second, third):
            epoch += sorted(islice(batches, len(scene.train_ids)), key=lambda batch: batch.image_ids.item())
    assert all(one.images.data_ptr() == two.images.data_ptr() for one, two in zip(first, second, strict=True))
    assert all(one is two for one, two in zip(second, third, strict=True))


def test_those_that_came_first_are_kept_within_the_bound(tmp_path, decoded):
    scene = small_scene(tmp_path, 9, camera(size=(200, 100)))
    n, one = len(scene.train_ids), bytes_of_one(scene)
    assert 60_000 < one < 60_000 + 2 * 4096  # 3 bytes a pixel, in whole pages
    decoded.clear()
    with training_loader(scene, scene.train_ids, num_workers=1, keep_bytes=3 * one + one // 2) as batches:
        first = [scene.image_names[batch.image_ids.item()] for batch in islice(batches, n)][:3]
        assert batches.spared_bytes == 3 * one
        list(islice(batches, 2 * n))
        assert batches.spared_bytes == 3 * one
    assert [name for name, times in decoded.items() if times == 1] == first
    assert all(decoded[name] >= 3 for name in decoded.keys() - first)
    assert batches.spared_bytes == 0


def test_nothing_is_kept_where_memory_is_short(tmp_path, monkeypatch):
    scene = small_scene(tmp_path, 7)
    one = bytes_of_one(scene)
    monkeypatch.setattr(free_memory, "free_bytes", lambda: 20 * one)  # of which 7 are to be free for each that is kept
    with training_loader(scene, scene.train_ids, num_workers=1, keep_bytes=AMPLE) as batches:
        list(islice(batches, 20))
        assert batches.spared_bytes == 2 * one


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}], ids=str)
def test_batches_go_on_where_pictures_are_given_up(tmp_path, monkeypatch, decoded, options):
    scene, mapped = small_scene(tmp_path, 7), []
    anonymous = kept_pictures._Memory.anonymous

    def watched(num_bytes: int, *, pinned: bool):
        memory = anonymous(num_bytes, pinned=pinned)
        mapped.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(kept_pictures._Memory, "anonymous", watched)
    expected = batches_of(scene, 40, **options)
    decoded.clear()
    with training_loader(scene, scene.train_ids, seed=2, num_workers=2, keep_bytes=AMPLE, **options) as batches:
        assert_same(list(islice(batches, 15)), expected[:15])
        assert len(mapped) == len(scene.train_ids)
        batches.give_up()

        def are_gone() -> bool:  # what was about to be given out holds none either
            gc.collect()
            return not any(memory() for memory in mapped)

        wait_until(are_gone)  # a thread lets go of its last batch
        assert_same(list(islice(batches, 25)), expected[15:])
        assert batches.spared_bytes == 0
    assert max(decoded.values()) > 1


# -------------------------------------------------------------------------------------------------------- pinned memory


class FakeCudart:
    """Registers memory as CUDA does."""

    def __init__(self, most: int) -> None:
        self.parts: dict[int, int] = {}
        self.threads: set[int] = set()  # that have registered some
        self._most = most

    def cudaHostRegister(self, start: int, num_bytes: int, flags: int) -> int:
        assert start % 4096 == num_bytes % 4096 == flags == 0
        if len(self.parts) == self._most:
            return 2
        self.parts[start] = num_bytes
        self.threads.add(get_ident())
        return 0

    def cudaHostUnregister(self, start: int) -> int:
        del self.parts[start]
        return 0


@pytest.mark.parametrize("most", [100, 3])
def test_pictures_are_pinned_as_far_as_cuda_does_it(tmp_path, monkeypatch, most):
    scene, cudart, waits = small_scene(tmp_path, 7), FakeCudart(most), list[int]()
    threads: list[tuple[int, int]] = []
    expected = batches_of(scene, 20)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: threads.append((device, get_ident())))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with training_loader(scene, scene.train_ids, seed=2, num_workers=2, keep_bytes=AMPLE, pin_memory=True) as batches:
        found = list(islice(batches, 20))
        assert len(cudart.parts) == min(most, len(scene.train_ids))
        assert batches.spared_bytes == sum(cudart.parts.values())
    assert_same(found, expected)
    del found
    gc.collect()
    assert not cudart.parts
    assert set(waits) == {1}  # the device that copied it, whoever lets it go
    assert {device for device, _ in threads} == {1}  # that of the thread which trains
    assert {thread for _, thread in threads} >= cudart.threads


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"rank": 1, "num_ranks": 2}], ids=str)
def test_kept_batches_are_pinned_and_copied_whole(tmp_path, options):
    scene = small_scene(tmp_path, 7, camera(*FISHEYE))
    expected = batches_of(scene, 30, **options)
    with training_loader(scene, scene.train_ids, seed=2, keep_bytes=AMPLE, pin_memory=True, **options) as batches:
        found = []
        for batch in islice(batches, 30):
            tensors = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
            assert all(tensor.is_pinned() for tensor in tensors.values())
            found.append(replace(batch, **{name: t.to("cuda", non_blocking=True) for name, t in tensors.items()}))
            if len(found) == 20:
                assert batches.spared_bytes > 0
                del batch, tensors
                batches.give_up()
    on_host = [replace(b, **{name: t.cpu() for name, t in vars(b).items() if t is not None}) for b in found]
    assert_same(on_host, expected)


# ------------------------------------------------------------------------------------------------ Gaussians come first


class Machine:
    """A machine of 1000 bytes, of which pictures hold some; Gaussians ask for more on the host."""

    num_gaussians = 1

    def __init__(self, monkeypatch, held: int, growth: int) -> None:
        self.spared_bytes, self._growth = held, growth
        for module in (free_memory, ops):
            monkeypatch.setattr(module, "free_bytes", lambda: 1000 - self.spared_bytes)
        monkeypatch.setattr(free_memory, "_sparing", weakref.WeakSet([self]))

    def give_up(self) -> None:
        self.spared_bytes = 0

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        return {torch.device("cpu"): self._growth}


@pytest.mark.parametrize(
    ("growth", "held_later", "holds"),
    [(0, 100, True), (200, 100, True), (201, 0, True), (950, 0, True), (1000, 0, True), (1001, 0, False)],
)
def test_growth_is_never_refused_for_pictures(monkeypatch, growth, held_later, holds):
    machine = Machine(monkeypatch, held=100, growth=growth)  # an eighth of 800
    assert RoomForGrowth("lower it").holds(machine, 1) is holds
    assert machine.spared_bytes == held_later


@pytest.mark.parametrize(("of_others", "held_later"), [(0, 50), (100, 50), (101, 0)])
def test_ranks_of_a_machine_give_up_for_what_all_of_them_need(monkeypatch, of_others, held_later):
    machine, waited = Machine(monkeypatch, held=50, growth=150), []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the other may hold as much: 7 * 2 * 50 = 700 of 950
    ranks = SimpleNamespace(
        sums=lambda counts: [count + of_others for count in counts],
        barrier=lambda: waited.append(machine.spared_bytes),
        gather=lambda sentence: [sentence, None],
    )
    assert RoomForGrowth("lower it", ranks).holds(machine, 1)
    assert waited == [machine.spared_bytes] == [held_later]


def test_an_eighth_of_what_training_leaves_is_spared():
    device = Need("GPU memory", 0, 10**9, 0, 1, "")
    host = Need("host memory", 20, 10, 100, 2500, "")
    assert bytes_to_spare([host, device], 20, 0) == (2500 - 400) // 8  # at its start
    assert bytes_to_spare([host, device], 20, 80) == (2500 - 900) // 8
    assert bytes_to_spare([host, device], 20, 80, share=0.5) == (2500 - 500) // 8
    assert bytes_to_spare([host, device], 20, 1000) == 0


def test_what_is_kept_is_said(tmp_path):
    scene = small_scene(tmp_path, 9, camera(size=(200, 100)))
    one, n = bytes_of_one(scene), len(scene.train_ids)
    all_of_them = f"{n * one / 1024:.4g} KiB"
    intro = "Decoded photos are kept in this machine's memory while it is not needed otherwise:"
    assert what_is_kept(scene, n * one) == f"{intro} about {all_of_them} for {n} training photos."
    partly = f"{intro} up to {2 * one / 1024:.4g} KiB, of {all_of_them} for {n} training photos."
    assert what_is_kept(scene, 2 * one) == partly
    assert what_is_kept(scene, one - 1) == ""


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (simple_trainer, ("--exposure", "bilateral_grid", "--background", "random", "--adam", "deferred")),
        pytest.param(simple_trainer_hybrid_optimized_split, ("--background", "sky", "--batch_size", 2),
            marks=pytest.mark.slow),
        pytest.param(simple_trainer_hybrid_streamed, ("--pose_opt", "--exposure", "affine"), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_training_changes_no_picture_that_is_kept(monkeypatch, mapped_city, tmp_path, capsys, script, options):
    kept: list[tuple[Batch, Batch]] = []  # as it is given out, and as it was
    keep = KeptPictures.keep

    def watched(self, image_id: int, batch: Batch) -> Batch:
        held = keep(self, image_id, batch)
        if held is not batch:
            kept.append((held, replace(held, **{n: t.clone() for n, t in vars(held).items() if t is not None})))
        return held

    monkeypatch.setattr(KeptPictures, "keep", watched)
    common = ("--depth_loss", "--max_steps", 40, "--refine_start_iter", 10, "--refine_every", 10, "--num_workers", 1)
    assert run_script(monkeypatch, script, mapped_city, tmp_path, *common, *options) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Decoded photos are kept")]
    assert len(said) == 1
    assert {batch.image_ids.item() for batch, _ in kept} == set(load_scene(mapped_city).train_ids.tolist())
    assert all(batch.inverse_depths is not None for batch, _ in kept)
    assert any(batch.masks is not None for batch, _ in kept)
    assert_same([batch for batch, _ in kept], [before for _, before in kept])
