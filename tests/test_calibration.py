"""What calibration predicts, against steps measured on the same machine, and where its verdict is kept and shown."""

import json
import sys
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import calibrate
from datasets.synthetic import write_city_block
from errors import InputError, NotEnoughMemory
from offload.adam import rows as row_kernels
from offload.adam.host import DeferredAdam
from offload.models.device_room import DeviceRoom, bytes_there
from offload.pipelines.arena import IDLE, USABLE
from trainers import TRAINERS, footprint_of
from training import calibration, command_line, memory_estimate
from training.calibration import Scene, Speeds, advise, estimate, print_last_verdict, save_verdict, verdict

# NVIDIA H200: ceilings measured in runs of 2026-11-21 to 29 (benchmarks/README.md, results/streamed_rows_h200.md,
# results/train_step_compact_h200.md), rows of a compact state on 2026-11-30. Rendering 1.4 million Gaussians in view
# and its backward pass took 7.6 ms.
H200 = Speeds(
    host=71e9,
    copies=55e9,
    copies_both_ways=101e9,
    rows_both_ways=70e9,
    packed_both_ways=72e9,
    device=4.2e12,
    launching=2.7e-3,
    rendering=4.9e-9,
    host_packed=36e9,  # the worker's commits in a step of optimized_compact, and those of rows that two views share
)
AERIAL, CITY = 1152 * 864, 1920 * 1080  # pixels
# benchmarks.train_step on such machines: ms of a step and GB on the device, by trainer and residents; those of one run
# or of one day, since medians of one commit differ by up to 10 % from run to run.
MEASURED = [
    (
        (1_000_000, 0.0779, AERIAL),
        {
            "gpu_only": (3.48, 1.19),
            "streamed_bfloat16": (6.47, 0.41),
            "streamed": (6.95, 0.47),
            "streamed_geometry_on_host": (7.57, 0.19),
            "optimized": (8.34, 0.34),
            "optimized_geometry_on_host": (9.85, 0.21),
            "baseline": (22.8, 0.21),
        },
    ),
    (
        (1_000_000, 0.0779, AERIAL),
        {
            "gpu_only": (4.20, 1.00),
            "streamed_compact_geometry_on_host": (5.33, 0.20),
            "gpu_only_deferred": (5.98, 0.83),
            "streamed": (6.88, 0.43),
            "streamed_geometry_on_host": (7.31, 0.16),
        },
    ),
    (
        (1_000_000, 0.0779, AERIAL),
        {
            "gpu_only": (3.71, 1.00),
            "gpu_only_compact": (4.05, 0.45),
            "streamed_compact --resident_share 1": (4.30, 0.45),
            "streamed_compact": (5.62, 0.21),
            "optimized_compact": (7.78, 0.26),
        },
    ),
    (
        (1_000_000, 0.0779, AERIAL),
        {
            "gpu_only": (3.42, 1.00),
            "streamed_compact --resident_share 1": (3.69, 0.47),
            "gpu_only_compact": (3.84, 0.47),
            "gpu_only_deferred": (4.66, 0.83),
            "streamed_compact": (5.07, 0.20),
        },
    ),
    (
        (4_000_000, 0.0759, AERIAL),
        {
            "gpu_only": (5.70, 4.59),
            "streamed_bfloat16": (6.03, 1.31),
            "streamed": (7.34, 1.54),
            "optimized": (12.3, 0.99),
            "streamed_geometry_on_host": (15.9, 0.44),
            "optimized_geometry_on_host": (20.0, 0.55),
            "baseline": (73.5, 0.46),
        },
    ),
    (
        (4_000_000, 0.0759, AERIAL),
        {
            "gpu_only_compact": (3.66, 1.57),
            "gpu_only_deferred": (4.78, 3.02),
            "streamed_compact": (5.15, 0.53),
            "gpu_only": (5.65, 3.92),
        },
    ),
    (
        (4_000_000, 0.0759, AERIAL),  # means of five medians each
        {
            "gpu_only_compact": (4.49, 1.52),
            "streamed_compact --resident_share 1": (4.55, 1.52),
            "gpu_only": (5.54, 3.92),
        },
    ),
    (
        (18_000_000, 0.0750, AERIAL),
        {
            "gpu_only_deferred": (7.54, 13.39),
            "gpu_only_compact": (6.43, 6.85),
            "streamed_bfloat16": (15.5, 5.54),
            "streamed_compact": (13.6, 2.15),
            "streamed_compact_geometry_on_host": (14.2, 1.84),
            "gpu_only": (18.3, 20.45),
            "streamed": (21.0, 6.61),
            "optimized": (34.7, 4.26),
            "streamed_geometry_on_host": (54.8, 1.74),
            "optimized_geometry_on_host": (61.9, 2.12),
            "baseline": (279.0, 1.78),
        },
    ),
    (
        (18_000_000, 0.0750, AERIAL),
        {
            "gpu_only_deferred": (6.19, 13.34),
            "gpu_only_compact": (6.72, 6.57),
            "streamed_compact": (12.9, 2.16),
            "streamed_compact_geometry_on_host": (13.7, 1.87),
            "optimized_compact": (20.1, 3.02),
            "optimized": (31.8, 3.51),
            "optimized_compact_geometry_on_host": (38.8, 1.34),
        },
    ),
    (
        (18_000_000, 0.0750, AERIAL),
        {
            "gpu_only_deferred": (6.25, 13.34),
            "gpu_only_compact": (6.41, 6.59),
            "streamed_compact --resident_share 0.2": (10.7, 3.52),
            "streamed_compact": (13.2, 2.25),
            "streamed_compact_geometry_on_host": (13.5, 2.01),
            "optimized_compact": (21.3, 3.05),
        },
    ),
    (
        (40_000_000, 0.0747, AERIAL),
        {
            "streamed_bfloat16": (32.5, 13.85),
            "gpu_only": (43.0, 40.27),
            "optimized": (75.9, 9.65),
            "streamed_geometry_on_host": (116.0, 4.45),
        },
    ),
    (
        (100_000_000, 0.0747, AERIAL),  # bound to 8 GB
        {"streamed_geometry_on_host": (313.0, 7.89), "streamed_compact_geometry_on_host": (94.8, 7.20)},
    ),
    (
        (102_231_360, 0.0039, CITY),
        {
            "streamed_compact_geometry_on_host": (7.28, 0.98),
            "streamed_bfloat16": (8.9, 15.2),
            "streamed_geometry_on_host": (23.8, 0.51),
        },
    ),
]
# The same of compact rows, geometry on the host, where the GPU's memory is bound so that rows wait for room, or stay on
# the host: of bigcity the mean of its views that stay, of some 1.15 million rows.
BOUND = [
    (Scene(100_000_000, 0.0747, AERIAL, 8e9, 135e9), 94.8, False),
    (Scene(102_231_360, 1.15e6 / 102_231_360, CITY, 0.69e9, 135e9), 31.0, True),
]
NAMES = [f"{scene[0]}, {len(measured)} trainers" for scene, measured in MEASURED]
HOST_MEMORY = 135e9
FAST_CPU = replace(
    H200, host=500e9, host_packed=250e9, copies=12e9, copies_both_ways=20e9, rows_both_ways=15e9, packed_both_ways=15e9
)
SMALL = Scene(10_000_000, 0.1, AERIAL, 5e9, 64e9)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def _on_some_gpu(monkeypatch):
    monkeypatch.setattr(calibration, "machine_name", lambda device: "some GPU in some host")


def advised(speeds: Speeds, scene: Scene, among: Container[str]) -> list[str]:
    """The trainers of some that fit, with their residents, the fastest first."""
    return [named for each in advise(speeds, scene) if (named := name_of(each)) in among]


def name_of(advice: calibration.Advice) -> str:
    """The trainer's name, and the option of its residents if it has any."""
    return f"{advice.trainer} --resident_share {advice.resident_share:g}".removesuffix(" --resident_share 0")


def estimate_of(name: str, scene: Scene) -> calibration.Advice:
    """What is thought of a trainer that `name_of` has named."""
    trainer, _, share = name.partition(" --resident_share ")
    return estimate(trainer, H200, scene, float(share or 0))


def accepts(monkeypatch, name: str, scene: Scene) -> bool:
    """Whether a trainer accepts --max_gaussians N where there is so much memory."""
    free = {"cpu": int(scene.host_memory), "cuda": int(scene.device_memory)}
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: free[device.type])
    trainer = TRAINERS[name]
    footprint = footprint_of(trainer, replace(trainer.load().CONFIGS["default"], **trainer.options))
    needs = memory_estimate.needs(footprint, scene.visible, scene.num_pixels, torch.device("cuda"))
    try:
        memory_estimate.check_memory(needs, 1, scene.num_gaussians, what_helps=lambda memory: "")
    except NotEnoughMemory:
        return False
    return True


@pytest.mark.parametrize("host_memory", [30e9, HOST_MEMORY], ids=lambda num_bytes: f"{num_bytes:.2g}")
@pytest.mark.parametrize("num_gaussians", [1_000_000, 18_000_000, 40_000_000, 102_231_360, 250_000_000])
def test_what_fits_is_what_the_trainers_accept(monkeypatch, num_gaussians, host_memory):
    counts = set()
    for visible in (0.0039, 0.0106, 0.0747, 0.3, 1.0):
        for device_memory in (0.25e9, 0.69e9, 1.2e9, 2.2e9, 4e9, 8e9, 24e9, 141e9):
            scene = Scene(num_gaussians, visible, CITY, device_memory, host_memory)
            found = {each.trainer for each in advise(H200, scene) if not each.resident_share}
            assert found == {name for name in TRAINERS if accepts(monkeypatch, name, scene)}, scene
            counts.add(len(found))
    assert len(counts) > 1 or num_gaussians * 328 > host_memory  # the grid tells some from others


@pytest.mark.parametrize(
    ("scene", "gigabytes", "slows"),
    [
        (Scene(100_000_000, 0.0747, AERIAL, 4e9, 135e9), 2.54, True),
        (Scene(40_000_000, 0.0747, AERIAL, 2.2e9, 135e9), 1.08, True),
        (Scene(18_000_000, 0.075, AERIAL, 1.2e9, 135e9), 0.54, False),
        (Scene(102_231_360, 0.0106, CITY, 0.69e9, 135e9), 0.61, True),
    ],
    ids=["100 million", "40 million", "18 million", "bigcity"],
)
def test_rows_of_the_largest_views_may_stay_on_the_host(scene, gigabytes, slows):
    """Then the trainer fits, and what it says of its steps is said."""
    text = verdict(H200, scene)
    best = "simple_trainer_hybrid_streamed.py --state compact --geometry host"
    assert f"use {best} (at least" in text
    assert (f"With {best}" in text) == slows
    if slows:
        assert text.endswith(memory_estimate.NO_ROOM)
    least = int(1.02e9 * gigabytes)
    assert estimate("streamed_compact_geometry_on_host", H200, replace(scene, device_memory=least)).fits
    assert not estimate("streamed_compact_geometry_on_host", H200, replace(scene, device_memory=0.96 * least)).fits


@pytest.mark.parametrize(("scene", "measured", "slows"), BOUND, ids=["100 million", "bigcity"])
def test_steps_that_lack_memory_take_longer(scene, measured, slows):
    found = estimate("streamed_compact_geometry_on_host", H200, scene)
    with_room = estimate("streamed_compact_geometry_on_host", H200, replace(scene, device_memory=24e9))
    assert 1.15 * with_room.milliseconds < found.milliseconds
    assert 0.8 * measured < found.milliseconds < 1.05 * measured
    assert (found.at_least, found.slows) == (True, slows)
    assert (with_room.at_least, with_room.slows) == (False, False)


@pytest.mark.parametrize(
    "device_memory", [141e9, 24e9, 12e9, 8e9, 6e9, 2.2e9], ids=lambda num_bytes: f"{num_bytes:.2g}"
)
@pytest.mark.parametrize(("scene", "measured"), MEASURED, ids=NAMES)
def test_advice_is_the_fastest_that_was_measured_of_those_that_fit(scene, measured, device_memory):
    """Or one that runs cannot tell from it. What was measured had room for the rows of two views."""
    there = Scene(*scene, device_memory, HOST_MEMORY)
    advice = [name for name in advised(H200, there, measured) if not estimate_of(name, there).at_least]
    if advice:
        assert measured[advice[0]][0] <= 1.1 * min(measured[name][0] for name in advice)


@pytest.mark.parametrize(("scene", "measured"), MEASURED, ids=NAMES)
def test_estimates_are_near_what_was_measured(scene, measured):
    """Time may be too low, where the CPU does more than Adam by nearly half. It is too high by what does not
    travel, up to a quarter of the rows, and where the host is faster than copies are, as in the baseline. Memory is
    that of a model that is densified, which these were not: an array of all rows once more, where it lies there. Where
    the optimized trainer is without a compact state it ran when harmonics had gradients of 192 bytes, on the device and
    on the host."""
    for name, (time, gigabytes) in measured.items():
        found = estimate_of(name, Scene(*scene, 141e9, HOST_MEMORY))
        had_gradients = name.startswith("optimized") and "optimized_compact" not in measured
        rows_with_gradients = scene[0] * scene[1] if had_gradients else 0
        milliseconds = found.milliseconds + 1000 * (192 - 24) * rows_with_gradients / H200.host
        device_memory = found.device_memory + (192 - 24 - 24) * rows_with_gradients
        assert 0.55 * time < milliseconds < (1.7 if name == "baseline" else 1.25) * time, name
        assert 0.7 * gigabytes - 0.3 < device_memory / 1e9 < 1.45 * gigabytes + 0.3, name


def test_residents_are_advised_where_they_make_steps_shorter():
    """That is where the link is what a step waits for, and where all may lie on the device."""
    large = Scene(18_000_000, 0.075, AERIAL, 6e9, 135e9)
    assert "use simple_trainer_hybrid_streamed.py --state compact --resident_share 0.2 (" in verdict(H200, large)
    without, few = (estimate("streamed_compact", H200, large, share) for share in (0, 0.2))
    assert few.milliseconds == pytest.approx(0.8 * without.milliseconds)
    assert few.device_memory - without.device_memory == pytest.approx(18e6 * (66 + 5))
    assert few.host_memory == without.host_memory
    slow_device = replace(H200, launching=8e-3)
    (first, *_) = [each for each in advise(slow_device, large) if each.trainer == "streamed_compact"]
    assert first.resident_share == 0  # saves nothing

    small = Scene(4_000_000, 0.0759, AERIAL, 6e9, 135e9)
    text = verdict(H200, small)
    assert text.count("simple_trainer_hybrid_streamed.py --state compact --resident_share 1 (") == 1
    assert "--resident_share 0.2" not in text
    alone, all_there = estimate("gpu_only_compact", H200, small), estimate("streamed_compact", H200, small, 1)
    assert alone.milliseconds < all_there.milliseconds < 1.05 * alone.milliseconds
    assert all_there.device_memory == alone.device_memory


@pytest.mark.parametrize("share", [0.2, 1])
def test_residents_have_what_views_leave(monkeypatch, share):
    """Few where rows of two views are there beside them; all where the trainer would begin with all."""
    for device_memory in (1.2e9, 2.2e9, 2.8e9, 3.2e9, 4e9, 8e9, 12e9, 13.5e9, 24e9):
        scene = Scene(18_000_000, 0.075, AERIAL, device_memory, HOST_MEMORY)
        without, found = (estimate("streamed_compact", H200, scene, each) for each in (0, share))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=int(device_memory): (free, free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        if share == 1:
            room = DeviceRoom(torch.device("cuda"))
            expected = room.holds_at_start(bytes_there(18_000_000, sh_degree=3, geometry="device"))
        else:
            expected = without.device_memory + 18e6 * (66 + 5) <= USABLE * device_memory - IDLE
        assert found.fits == (without.fits and expected), device_memory


def test_a_compact_state_is_known():
    """Its sizes and floors decide: the host of 128 GB holds 250 million, and the link carries half as much."""
    (best, *_) = advise(H200, Scene(250_000_000, 0.0039, CITY, 8e9, 137e9))
    assert best.trainer == "streamed_compact_geometry_on_host"
    assert best.command == "simple_trainer_hybrid_streamed.py --state compact --geometry host"
    assert 82e9 < best.host_memory < 100e9
    assert best.device_memory < 2e9
    scene = Scene(18_000_000, 0.075, AERIAL, 8e9, 135e9)
    compact, bfloat16 = (estimate(name, H200, scene) for name in ("streamed_compact", "streamed_bfloat16"))
    assert compact.device_memory < 0.6 * bfloat16.device_memory
    slow_link = replace(H200, packed_both_ways=20e9)
    assert estimate("streamed_compact", slow_link, scene).milliseconds == pytest.approx(1e3 * 328 * 1.35e6 / 10e9)
    deferred, dense = (estimate(name, H200, scene) for name in ("gpu_only_deferred", "gpu_only"))
    assert deferred.milliseconds < dense.milliseconds


def test_adam_on_a_slow_host_says_nothing_of_what_streams():
    """The device reads and writes the host's memory itself, at the speed that was measured so."""
    scene = Scene(18_000_000, 0.075, AERIAL, 8e9, 135e9)
    for name in ("streamed", "streamed_compact", "streamed_geometry_on_host", "optimized"):
        found, slow = (estimate(name, speeds, scene).milliseconds for speeds in (H200, replace(H200, host=20e9)))
        assert (slow > found) == (name == "optimized"), name


def test_a_fast_host_and_a_slow_link_are_for_the_cpu():
    assert advised(FAST_CPU, SMALL, ("streamed", "optimized"))[0] == "optimized"
    assert advised(H200, SMALL, ("streamed", "optimized"))[0] == "streamed"
    assert advised(FAST_CPU, SMALL, ("streamed_compact", "optimized_compact"))[0] == "optimized_compact"
    assert advised(H200, SMALL, ("streamed_compact", "optimized_compact"))[0] == "streamed_compact"


def test_verdicts_say_what_to_run_and_what_it_takes():
    text = verdict(H200, SMALL)
    assert text.startswith(
        "10,000,000 Gaussians, 10 % of them visible, in 5.0 GB of GPU and 64.0 GB of host memory: use"
    )
    assert "simple_trainer_hybrid_streamed.py --state compact --resident_share 0.2 (" in text
    assert text.count("ms a step,") == text.count("(about ") == 3
    assert "\n" not in text
    assert "no trainer fits" in verdict(H200, replace(SMALL, host_memory=1e9, device_memory=1e9))


def test_verdicts_of_several_machines_are_kept(monkeypatch, capsys):
    save_verdict("another GPU in another host", FAST_CPU, SMALL)
    monkeypatch.setattr(calibration, "machine_name", lambda device: "some GPU in some host")
    print_last_verdict(torch.device("cuda"))
    assert capsys.readouterr().out == ""
    save_verdict("some GPU in some host", FAST_CPU, SMALL)
    path = save_verdict("some GPU in some host", H200, SMALL)
    print_last_verdict(torch.device("cuda"))
    assert capsys.readouterr().out.splitlines()[0].endswith(verdict(H200, SMALL))
    kept = json.loads(path.read_text())
    assert set(kept) == {"another GPU in another host", "some GPU in some host"}
    assert kept["some GPU in some host"]["bytes_per_second"]["host"] == H200.host
    assert [file.name for file in path.parent.iterdir()] == ["calibration.json"]


@pytest.mark.usefixtures("_on_some_gpu")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"some GPU in some host": []}', '{"some GPU in some host": {}}'])
def test_a_damaged_file_is_no_verdict(capsys, content):
    path = calibration.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    print_last_verdict(torch.device("cuda"))
    assert capsys.readouterr().out == ""
    save_verdict("some GPU in some host", H200, SMALL)
    print_last_verdict(torch.device("cuda"))
    assert "simple_trainer_hybrid_streamed.py" in capsys.readouterr().out


def test_on_the_cpu_there_is_nothing_to_print(capsys):
    assert calibration.machine_name(torch.device("cpu")) is None
    print_last_verdict(torch.device("cpu"))
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to stream")
def test_without_a_gpu_the_host_is_measured_all_the_same(monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "MOST_ROWS", 60_000)
    calibrate.main(calibrate.Options())
    printed = capsys.readouterr().out
    assert "GB/s read and written" in printed
    assert "nothing to stream" in printed
    assert not calibration.cache_file().exists()


def test_what_is_measured_on_a_gpu_is_said_and_kept(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(calibrate, "measure", lambda device, num_rows: H200)
    monkeypatch.setattr(calibrate, "machine_name", lambda device: "some GPU in some host")
    calibrate.main(calibrate.Options(18_000_000, 0.075, device_memory="24GB", host_memory="128GB"))
    *measured, said, kept = capsys.readouterr().out.splitlines()
    assert len(measured) == 4
    assert said == verdict(H200, Scene(18_000_000, 0.075, AERIAL, 24e9, 128e9))
    assert "use simple_trainer.py --adam deferred --state compact (" in said
    assert json.loads(calibration.cache_file().read_text())["some GPU in some host"]["verdict"] == said
    assert kept == f"Kept in {calibration.cache_file()}"


def test_host_speed_is_of_forwarding_and_committing(monkeypatch):
    """The time of one row, from a clock that the kernels advance."""
    rows = calibrate.Rows(40_000, pin=False)
    now = [0.0]

    def taking(seconds_per_row: float):
        def visit(self, rows_on_host, last_step, ids, values) -> None:
            assert (ids.diff() > 0).all()
            assert len(ids) == len(values) == rows.num_visible
            now[0] += seconds_per_row * len(ids)

        return visit

    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(DeferredAdam, "forward", taking(4 * 192 / 2e9))
    monkeypatch.setattr(DeferredAdam, "commit", taking(7 * 192 / 2e9))
    assert calibrate.host_speed(rows) == pytest.approx(2e9)


def test_the_link_is_measured_by_copies_and_by_the_kernels_of_the_trainer(monkeypatch):
    """On the CPU, where the same calls are made and there is no link: only that bytes are counted as they move."""
    cpu, now = torch.device("cpu"), [0.0]
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(calibrate, "finish", lambda device: now.__setitem__(0, now[0] + 1e-3))  # a turn takes 1 ms
    monkeypatch.setattr(calibrate, "COPY_BYTES", 1000)
    assert calibrate.copy_speeds(cpu) == (pytest.approx(1e6), pytest.approx(2e6))

    rows = calibrate.Rows(40_000, pin=False)
    spies = {name: mock.Mock(wraps=getattr(row_kernels, name)) for name in ("fetch_rows", "write_rows")}
    for name, spy in spies.items():
        monkeypatch.setattr(row_kernels, name, spy)
    assert calibrate.row_speed(rows, cpu) == pytest.approx(2 * 576 * rows.num_visible / 1e-3)
    assert all(spy.call_count == 2 + calibrate.REPEATS for spy in spies.values())


def test_compact_rows_are_measured_by_the_kernels_of_the_trainer(monkeypatch):
    cpu, now = torch.device("cpu"), [0.0]
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(calibrate, "finish", lambda device: now.__setitem__(0, now[0] + 1e-3))
    spies = {name: mock.Mock(wraps=getattr(row_kernels, name)) for name in ("read_packed_rows", "write_packed_rows")}
    for name, spy in spies.items():
        monkeypatch.setattr(row_kernels, name, spy)
    views = calibrate.Rows(40_000, pin=False).views
    assert calibrate.packed_speed(40_000, views, cpu) == pytest.approx(2 * 328 * len(views[0]) / 1e-3)
    assert all(spy.call_count == 2 + calibrate.REPEATS for spy in spies.values())


def test_rendering_is_measured_with_few_and_with_many_gaussians(monkeypatch):
    monkeypatch.setattr(calibrate, "RENDERED", (500, 2000))
    monkeypatch.setattr(calibrate, "REPEATS", 1)
    visible = []
    render = calibrate.render

    def counting(rows, camera, *arguments, **options):
        visible.append(len(rows["means"]))
        return render(rows, camera, *arguments, **options)

    monkeypatch.setattr(calibrate, "render", counting)
    seconds = iter([4e-3, 5e-3])
    monkeypatch.setattr(calibrate, "median_seconds", lambda work, device: work(0) or next(seconds))
    launching, each = calibrate.rendering_seconds(torch.device("cpu"))
    few, many = visible
    assert 0 < few < many
    assert [launching + each * few, launching + each * many] == pytest.approx([4e-3, 5e-3])


def test_the_scene_is_that_of_the_options(monkeypatch):
    monkeypatch.setattr(calibrate, "available_bytes", lambda device: 7)
    scene = calibrate.scene_of(calibrate.Options(1000, 0.5, 20, 10, device_memory="24GB"), torch.device("cpu"))
    assert scene == Scene(1000, 0.5, 200, 24e9, 7)


def test_views_are_those_of_a_scene():
    rows = calibrate.Rows(100_000, pin=False)
    for ids in rows.views:
        assert 0 <= ids[0] < ids[-1] < 100_000
        assert len(ids) / 100_000 == pytest.approx(0.08, rel=0.1)
    assert len(torch.cat(rows.views).unique()) == 4 * rows.num_visible


@pytest.mark.parametrize("options", [{"num_gaussians": 0}, {"visible": 0.0}, {"visible": 1.5}], ids=str)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match="--visible"):
        calibrate.main(calibrate.Options(**options))


@pytest.mark.slow
@pytest.mark.usefixtures("_on_some_gpu")
def test_every_trainer_prints_it(monkeypatch, tmp_path, capsys):
    save_verdict("some GPU in some host", H200, SMALL)
    write_city_block(tmp_path / "data", num_views=4, width=32, height=24, num_points=50)
    for script in {trainer.load() for trainer in TRAINERS.values()}:
        places = ("--data_dir", tmp_path / "data", "--result_dir", tmp_path / script.__name__)
        arguments = ["default", *map(str, places), "--device", "cpu", "--max_steps", "1"]
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        command_line.main(script.CONFIGS, script.train, "test")
        printed = capsys.readouterr().out
        assert printed.count(verdict(H200, SMALL)) == 1, script.__name__


@pytest.mark.cuda
def test_speeds_of_this_machine():
    """In any order of magnitude but an absurd one."""
    speeds = calibrate.measure(torch.device("cuda"), 1_000_000)
    assert 1e9 < speeds.host < 2e12
    assert 1e8 < speeds.host_packed < 2e12
    assert 1e9 < speeds.copies <= 1.05 * speeds.copies_both_ways < 2e12
    assert 0.5e9 < speeds.rows_both_ways < 1.2 * speeds.copies_both_ways
    assert 0.5e9 < speeds.packed_both_ways < 1.2 * speeds.copies_both_ways
    assert 1e10 < speeds.device < 2e13
    assert 0 < speeds.launching < 0.1
    assert 0 <= speeds.rendering < 1e-6  # none where launching takes all the time, as beside other work


@pytest.mark.cuda
def test_a_verdict_is_kept_and_printed(monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "MOST_ROWS", 1_000_000)
    calibrate.main(calibrate.Options())
    kept = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("Kept in "))
    assert kept == calibration.cache_file()
    print_last_verdict(torch.device("cuda"))
    assert "Calibrated on" in capsys.readouterr().out
