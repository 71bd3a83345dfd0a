"""Rows that are all on the device until they are too many: where they lie changes no bit, and nothing is lost."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import simple_trainer_hybrid_streamed
from configs import Config
from offload.culling.cameras import Cameras
from offload.device_memory import stretch_peak
from offload.errors import ParameterError
from offload.models import device_room, streamed
from offload.models.device_room import DeviceRoom
from offload.models.streamed import StreamedGaussians
from offload.pipelines.arena import CAUTION, USABLE
from offload.pipelines.packed import PackedPipeline
from offload.store.device_store import DeviceStore
from offload.store.growth import Growth
from offload.store.host_store import PEAK, HostStore
from offload.store.layout import compact_bytes
from strategies.ops import grow, lacking_memory
from tests.interrupted_runs import DENSIFYING, STEPS, assert_same_state, run_script, saved
from tests.test_one_algorithm import random_gradients
from tests.test_packed_pipeline import ADAM, start
from tests.tight_rows import same_rows
from training.checkpoint_folder import CheckpointFolder
from training.checkpoint_writing import PartialCheckpoint
from training.checkpoints import Checkpoint, peek_checkpoint
from training.reporting import Counted
from training.views import posed_cameras

CPU = torch.device("cpu")
N, ROW_BYTES = 300, 312 + 20  # on the device, with what culling needs


def let_stay(monkeypatch, most_bytes: int) -> None:
    """Have room for rows of so many bytes at once, on any device, where a group stands twice while some are added."""
    monkeypatch.setattr(DeviceRoom, "holds_at_start", lambda self, num_bytes: num_bytes <= most_bytes)
    monkeypatch.setattr(DeviceRoom, "holds", lambda self, taken, growth, times: taken + growth.peak <= most_bytes)


def model(device: torch.device = CPU, **options: object) -> StreamedGaussians:
    parameters = start(N)
    parameters["means"] = parameters["means"] * 3
    return StreamedGaussians(parameters, ADAM, device=device, state="compact", **options)


def stores_of(gaussians: StreamedGaussians) -> list[object]:
    return [group.store for group in gaussians._groups.values()]


def cameras_at(step: int) -> Cameras:
    viewmat = torch.eye(4)
    viewmat[:3, 3] = torch.tensor([0.4 * (step % 5) - 1, 0.3 * (step % 3), 4.0 + step % 2])
    K = torch.tensor([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]])
    return posed_cameras(viewmat[None], K[None], 64, 48, Config())


def train(gaussians: StreamedGaussians, first: int, last: int, device: torch.device = CPU) -> None:
    """Take steps with random gradients, each next view known ahead."""
    views = {step: cameras_at(step) for step in range(first, last)}
    for step in range(first, last):
        rows = gaussians.fetch(views[step])
        if step + 1 < last:
            gaussians.prefetch(views[step + 1])
        gradients = {name: value.to(device) for name, value in random_gradients(step, len(gaussians.ids)).items()}
        gradients["sh0"], gradients["shN"] = gradients.pop("colors").split([1, 15], dim=1)
        rows["shN"] = rows["shN"][:, :15]
        sum((rows[name] * gradient).sum() for name, gradient in gradients.items()).backward()
        gaussians.update()


def refine(gaussians: StreamedGaussians, seed: int) -> None:
    """Add 40 rows, of which 15 are halves, and remove 10."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(gaussians.num_gaussians, generator=generator)[:40].to(gaussians.device)
    grow(gaussians, chosen[:25].sort().values, chosen[25:].sort().values, False, generator)
    gaussians.keep(torch.arange(10, gaussians.num_gaussians, device=gaussians.device))


def assert_same_rows(actual: StreamedGaussians, expected: StreamedGaussians) -> None:
    mine, theirs = actual.state(), expected.state()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if name == "packed/geometry":
            assert same_rows(mine[name], value)
        else:
            assert torch.equal(mine[name].to(value.device), value), name


@pytest.mark.parametrize("place", ["device", "host"])
def test_rows_stay_while_there_is_room_and_are_the_same_afterwards(monkeypatch, place):
    told: list[str] = []
    expected = model(geometry=place)
    # Growth needs what there will be, and the larger group twice: the first refinement has room, the second has none.
    let_stay(monkeypatch, int(1.72 * N * ROW_BYTES))
    actual = model(geometry=place, resident_share=1.0, tell=told.append)
    assert all(isinstance(store, DeviceStore) for store in stores_of(actual))
    for number, where in enumerate([DeviceStore, HostStore, HostStore]):
        for gaussians in (actual, expected):
            train(gaussians, 8 * number, 8 * number + 8)
            refine(gaussians, number)
        assert all(isinstance(store, where) for store in stores_of(actual)), number
        assert_same_rows(actual, expected)
    train(actual, 24, 30)
    train(expected, 24, 30)
    assert_same_rows(actual, expected)
    assert told == [
        "After 16 steps 330 Gaussians have been moved to host memory: the GPU has no room for all that growth adds."
    ]


def test_rows_begin_on_the_host_where_there_is_no_room(monkeypatch):
    let_stay(monkeypatch, N * ROW_BYTES - 1)
    assert all(isinstance(store, HostStore) for store in stores_of(model(resident_share=1.0)))
    let_stay(monkeypatch, N * ROW_BYTES)
    assert all(isinstance(store, DeviceStore) for store in stores_of(model(resident_share=1.0)))
    assert all(isinstance(store, HostStore) for store in stores_of(model(resident_share=0.99)))


def test_growth_asks_for_the_memory_where_rows_will_be(monkeypatch):
    let_stay(monkeypatch, 10**9)
    gaussians = model(resident_share=1.0)
    # The appearance stands twice, after geometry has; both at once never do.
    assert gaussians.growth_bytes(50) == {CPU: 50 * ROW_BYTES + 192 * N}
    let_stay(monkeypatch, N * ROW_BYTES)
    assert gaussians.growth_bytes(50) == {CPU: int(PEAK * (N + 50) * 328)}
    # On the host one group is re-ordered after the other, for which up to a tenth more is taken.
    travelling = model()
    assert travelling.growth_bytes(50) == {CPU: 50 * (328 + 20) + int(PEAK * (N + 50) * 196) - (N + 50) * 196}
    assert all(isinstance(store, DeviceStore) for store in stores_of(gaussians))  # it was only asked
    monkeypatch.setattr("strategies.ops.free_bytes", lambda: 1000)
    assert "of host memory and only" in (lacking_memory(gaussians, 50, "free memory") or "")


def test_a_checkpoint_that_is_being_written_has_the_rows_of_before(monkeypatch, tmp_path):
    """Rows move to the host while a checkpoint of them is half written."""
    let_stay(monkeypatch, N * ROW_BYTES)
    gaussians = model(resident_share=1.0)
    train(gaussians, 0, 5)
    state = gaussians.state()
    frozen = {name: value.clone() for name, value in state.items()}
    partial = PartialCheckpoint(tmp_path / "5.pt", Checkpoint(5, np.eye(4), state), gaussians.copied_before_change())
    refine(gaussians, 0)
    assert all(isinstance(store, HostStore) for store in stores_of(gaussians))
    train(gaussians, 5, 8)
    partial.publish()
    written = peek_checkpoint(partial.path).state
    for name, value in frozen.items():
        assert torch.equal(written[name], value), name


@pytest.mark.parametrize("is_written", [False, True], ids=["half written", "written"])
def test_nothing_holds_the_rows_on_the_device_once_they_have_moved(monkeypatch, tmp_path, is_written):
    """Of 18 million Gaussians they are 6 GB, which a checkpoint would hold until the next one."""
    let_stay(monkeypatch, N * ROW_BYTES)
    gaussians = model(resident_share=1.0)
    train(gaussians, 0, 5)
    stores = [weakref.ref(store) for store in stores_of(gaussians)]
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(Checkpoint(5, np.eye(4), gaussians.state()), gaussians.copied_before_change())
    if is_written:
        assert folder.wait() is None
    refine(gaussians, 0)
    gc.collect()
    assert [store() for store in stores] == [None, None]
    folder.close()


@pytest.mark.parametrize("fails", ["making the second store", "filling it"])
def test_a_move_that_fails_loses_nothing_and_may_succeed_later(monkeypatch, fails):
    let_stay(monkeypatch, N * ROW_BYTES)
    expected, actual = model(), model(resident_share=1.0)
    for gaussians in (actual, expected):
        train(gaussians, 0, 5)
    with monkeypatch.context() as broken:
        if fails == "filling it":
            broken.setattr(streamed, "PackedPipeline", PipelineWithoutMemory)
        else:
            broken.setattr(streamed, "groups_beside", without_memory)
        with pytest.raises((torch.cuda.OutOfMemoryError, ParameterError)):
            refine(actual, 0)
    assert all(isinstance(store, DeviceStore) for store in stores_of(actual))
    actual.keep(torch.arange(N))
    for name in ("means", "scales", "opacities"):  # so that both are caught up
        assert torch.equal(actual.read(name), expected.read(name))
    assert_same_rows(actual, expected)
    for gaussians in (actual, expected):
        refine(gaussians, 0)
        train(gaussians, 5, 9)
    assert all(isinstance(store, HostStore) for store in stores_of(actual))
    assert_same_rows(actual, expected)


def without_memory(*arguments: object, **named: object) -> None:
    raise ParameterError("CUDA does not pin so much memory.")


class PipelineWithoutMemory(PackedPipeline):
    """Fails when all else of a state has been loaded."""

    def load_state(self, state: object) -> None:
        raise torch.cuda.OutOfMemoryError("there is none")


def test_what_is_taken_is_measured_anew_once_no_rows_are_on_the_device(monkeypatch):
    """Else space for views and residents would be what rendering and all rows together have left."""
    let_stay(monkeypatch, N * ROW_BYTES)
    gaussians = model(resident_share=1.0)
    train(gaussians, 0, 5)
    stores, alive = [weakref.ref(store) for store in stores_of(gaussians)], []
    monkeypatch.setattr(device_room, "begin_stretch", lambda device: alive.append([store() for store in stores]))
    gaussians._room._device = torch.device("cuda")
    refine(gaussians, 0)
    assert alive == [[None, None]]


def test_rows_that_travel_count_from_where_a_reader_last_asked(monkeypatch):
    """Also where none had travelled then: the mean is over the steps since."""
    let_stay(monkeypatch, N * ROW_BYTES)
    gaussians, counted, totals = model(resident_share=1.0), Counted(), []
    for first, last in [(0, 6), (6, 9), (9, 12)]:
        train(gaussians, first, last)
        run = SimpleNamespace(model=gaussians, steps_of_this_run=gaussians.steps_done)
        per_step = counted.since_last(run).get("per_step")
        if first == 0:
            assert per_step is None
            refine(gaussians, 0)
        else:
            totals.append(3 * per_step["link_bytes"])
            assert sum(totals) == pytest.approx(gaussians.counters().traffic["link_bytes"])


def test_room_counts_what_rendering_takes(monkeypatch):
    monkeypatch.setattr(device_room, "most_bytes", lambda device: 1000)
    monkeypatch.setattr(device_room, "stretch_peak", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 120)
    room, most = DeviceRoom(torch.device("cuda")), USABLE * 1000
    assert room.holds_at_start(int(0.5 * most))
    assert not room.holds_at_start(int(0.5 * most) + 1)
    rendering = 300 - 100  # at the peak, beside the rows that there are
    fits = int(most - CAUTION * 1.5 * rendering) - 100
    assert room.holds(100, Growth(fits), 1.5)
    assert not room.holds(100, Growth(fits + 1), 1.5)
    # While rows are added nothing is rendered: what stands twice is beside what is there now.
    twice = int(most) - 120 - 50
    assert room.holds(100, Growth(50, twice), 1.5)
    assert not room.holds(100, Growth(50, twice + 1), 1.5)
    on_cpu = DeviceRoom(CPU)
    assert not on_cpu.holds_at_start(1)
    assert not on_cpu.holds(0, Growth(1), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["device", "host"])
def test_a_run_of_rows_that_move_ends_in_the_bits_of_one_that_travels(monkeypatch, city_block, tmp_path, capsys, place):
    """Also where it stops before they move, is resumed, densifies, resets opacities and is evaluated."""
    options = ("--state", "compact", "--geometry", place, *DENSIFYING)
    run = (monkeypatch, simple_trainer_hybrid_streamed, city_block)
    assert run_script(*run, tmp_path / "travels", *options) == 0
    let_stay(monkeypatch, 2 * 600 * (compact_bytes(3) + 20))
    stays = ("--resident_share", 1, "--save_steps", 14, STEPS, "--eval_steps", 17)
    capsys.readouterr()
    assert run_script(*run, tmp_path / "stays", *options, *stays) == 0
    assert "Gaussians have been moved to host memory" in "".join(capsys.readouterr())
    assert_same_state(saved(tmp_path / "stays"), saved(tmp_path / "travels"))
    (tmp_path / f"stays/ckpts/ckpt_{STEPS}.pt").unlink()
    assert run_script(*run, tmp_path / "stays", *options, "--resident_share", 1, "--resume") == 0
    assert_same_state(saved(tmp_path / "stays"), saved(tmp_path / "travels"))


@pytest.mark.cuda
@pytest.mark.parametrize("place", ["device", "host"])
def test_rows_that_move_on_a_gpu_are_those_that_travel(monkeypatch, place):
    device = torch.device("cuda")
    expected = model(device, geometry=place)
    let_stay(monkeypatch, int(1.72 * N * ROW_BYTES))
    actual = model(device, geometry=place, resident_share=1.0)
    for number, where in enumerate([DeviceStore, HostStore, HostStore]):
        for gaussians in (actual, expected):
            train(gaussians, 8 * number, 8 * number + 8, device)
            refine(gaussians, number)
        assert all(isinstance(store, where) for store in stores_of(actual)), number
        assert_same_rows(actual, expected)


@pytest.mark.cuda
def test_a_gpu_has_the_memory_of_rows_that_have_moved(monkeypatch):
    device = torch.device("cuda")
    let_stay(monkeypatch, N * ROW_BYTES)
    gaussians = model(device, resident_share=1.0)
    train(gaussians, 0, 5, device)
    stores = [weakref.ref(store) for store in stores_of(gaussians)]
    refine(gaussians, 0)
    assert [store() for store in stores] == [None, None]
    assert stretch_peak(device) < torch.cuda.memory_allocated(device) + N * ROW_BYTES


@pytest.mark.cuda
def test_a_gpu_has_room_for_few_rows_and_none_for_all_its_memory(monkeypatch):
    device = torch.device("cuda")
    assert all(store.device.type == "cuda" for store in stores_of(model(device, resident_share=1.0)))
    monkeypatch.setattr(device_room, "most_bytes", lambda device: N * ROW_BYTES)
    assert all(store.device.type == "cpu" for store in stores_of(model(device, resident_share=1.0)))
