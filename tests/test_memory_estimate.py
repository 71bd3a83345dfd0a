"""The memory that training will take is known before, and what cannot fit is refused in one sentence."""

import gc
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simple_trainer
import simple_trainer_hybrid_baseline
import simple_trainer_hybrid_optimized
import simple_trainer_hybrid_streamed
from benchmarks.aerial_scene import aerial_scene
from configs import Config
from datasets.scene import load_scene
from errors import NotEnoughMemory
from offload import device_memory
from offload.models import device_room
from offload.store.layout import compact_bytes
from tests.aerial_training import gaussians_of
from tests.measured_memory import HEIGHT, WIDTH, train_some_steps
from trainers import TRAINERS, Lack, footprint_of, remedy, smaller_trainer
from training import command_line, memory_estimate
from training.commands import smaller_command
from training.memory import allocated_bytes
from training.memory_estimate import Need, Needs, check_memory, needs, share_in_largest_view
from training.options import check_options

ROOT = Path(__file__).parents[1]
GIB = 2**30
FOOTPRINTS = {
    "gpu_only": memory_estimate.gpu_only(3, "dense"),
    "gpu_only, deferred": memory_estimate.gpu_only(3, "deferred"),
    "baseline": memory_estimate.baseline(3),
    "geometry on device": memory_estimate.optimized(3, "device"),
    "geometry on host": memory_estimate.optimized(3, "host"),
    "geometry on device, compact": memory_estimate.optimized(3, "device", "compact"),
    "streamed": memory_estimate.streamed(3, "device", "float32"),
    "streamed, bfloat16": memory_estimate.streamed(3, "device", "bfloat16"),
    "streamed, geometry on host": memory_estimate.streamed(3, "host", "float32"),
}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_estimate_is_what_training_and_saving_take():
    """What each trainer takes of main memory, all in one process of their own.

    Each larger block goes back to the system as soon as it is freed there. Otherwise glibc keeps some for later, how
    much depends on which thread has freed what first and on what ran before: the same training then took a third more
    in one run than in another. And what each thread works in is no part of an estimate for large scenes.
    """
    finished = subprocess.run(
        [sys.executable, "-m", "tests.measured_memory"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "OMP_NUM_THREADS": "2"},
    )
    measured = json.loads(finished.stdout)
    found, expected = {}, {}
    for trainer, footprint in FOOTPRINTS.items():
        taken = measured[trainer]
        need = needs(footprint, taken["share_in_view"], WIDTH * HEIGHT, torch.device("cpu")).host
        found[trainer, "start"], found[trainer, "all"] = taken["bytes_at_start"], taken["bytes"]
        expected[trainer, "start"] = taken["num_gaussians_at_start"] * need.starting_bytes_per_gaussian
        expected[trainer, "all"] = need.bytes(taken["num_gaussians"])
    assert found == pytest.approx(expected, rel=0.2)


@pytest.mark.cuda
@pytest.mark.parametrize("trainer", FOOTPRINTS)
def test_estimate_is_what_the_device_allocates(monkeypatch, trainer):
    device, num_gaussians = torch.device("cuda"), 2_000_000
    parameters, cameras = aerial_scene(num_gaussians, seed=0)
    gc.collect()  # of other tests' Gaussians, which would be freed in the midst of this
    before = allocated_bytes(device)
    monkeypatch.setattr(
        device_memory, "_highest", {"allocated": 0, "reserved": 0}
    )  # of stretches, which end with views
    torch.cuda.reset_peak_memory_stats()
    share = train_some_steps(trainer, gaussians_of(trainer, parameters, device), cameras, device)
    taken = device_memory.peak_memory(device)["allocated"] - before
    footprint = replace(FOOTPRINTS[trainer], device_while_changed=0)  # no Gaussians are added or removed here
    need = needs(footprint, share, WIDTH * HEIGHT, device).device
    assert taken == pytest.approx(need.expected_bytes(num_gaussians), rel=0.2)


def test_bytes_per_gaussian():
    """README.md and the store's docstring name the sizes of stores, which may take a tenth more while they change."""
    assert FOOTPRINTS["gpu_only"].device == 4 * 236 + 32
    assert FOOTPRINTS["gpu_only, deferred"].device == FOOTPRINTS["gpu_only, deferred"].device_at_start == 716
    assert FOOTPRINTS["baseline"].host_at_start == 728 + 236
    assert FOOTPRINTS["baseline"].host == 800 + 240  # gradients
    assert FOOTPRINTS["geometry on device"].host_at_start == 580 + 236
    assert FOOTPRINTS["geometry on device"].host == 638
    assert FOOTPRINTS["geometry on host"].host == 800
    assert FOOTPRINTS["geometry on device, compact"].device == 112 + 4
    assert FOOTPRINTS["geometry on device, compact"].host_at_start == 192 + 4 + 236
    assert FOOTPRINTS["streamed, bfloat16"].host == 426
    assert memory_estimate.gpu_only(0, "dense").host_at_start == 14 * 4
    one_view, two_views = (memory_estimate.optimized(3, "device", batch_size=views) for views in (1, 2))
    assert two_views == memory_estimate.split(3, "device", 1.0)
    assert two_views.device_in_view - one_view.device_in_view == 192 - 24 - 2 * 12 - 36  # gradients, or what makes them
    assert two_views.host_in_view - one_view.host_in_view == 3 * (192 - 24)
    assert memory_estimate.optimized(3, "host", "compact").device_in_view == 2 * 196 + 36 + 24 + 12 + 3 * 64 + 40 + 200
    assert memory_estimate.gpu_only(3, "deferred", "compact").device_in_view == 40 + 2 * 64 + 36 + 2 * 8 + 200
    assert memory_estimate.gpu_only(3, "deferred", "compact").device == 112 + 4 + 192 + 4 + 20
    compact = memory_estimate.streamed(3, "device", "float32", "compact")
    assert memory_estimate.with_residents(compact, 3, 0.0) == compact
    assert memory_estimate.with_residents(compact, 3, 0.25).device == compact.device + 328 / 4 + 5
    assert memory_estimate.with_residents(compact, 3, 1.0) == compact  # all stay only while there is room
    assert compact.device_in_view == 2 * 328 + 40 + 64 + 36 + 240  # values and gradients of geometry; slopes; others
    of_two_views = memory_estimate.streamed(3, "device", "float32", "compact", batch_size=2)
    assert of_two_views.device_in_view == compact.device_in_view - 36 + 192 + 192


def test_the_documents_name_the_bytes_of_a_compact_state():
    """Beside those of the float32 rows that take least: both with the step of their last update."""
    compact, float32 = compact_bytes(3), FOOTPRINTS["gpu_only, deferred"].device
    for page, sentence in {
        "configs.py": f"compact: {compact} bytes a Gaussian, rounded at random, in place of {float32} or more",
        "docs/trainers.md": f"| `--state compact` | {compact} bytes a Gaussian, 8 of them",
        "docs/streaming.md": f"a Gaussian in {compact} bytes, 8 of them for its last step, in place of {float32}",
    }.items():
        assert sentence in (ROOT / page).read_text()


def test_gpu_only_training_is_not_bound_by_host_memory(monkeypatch):
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: GIB)
    found = needs(FOOTPRINTS["gpu_only"], 0.1, 10**6, torch.device("cuda"))
    assert found.host.most_gaussians() > 10**12 > found.device.most_gaussians() == found.most_gaussians()


def test_share_in_the_largest_view_is_that_of_the_best_placed_camera(city_block):
    scene = load_scene(city_block)
    shares = []
    for index in scene.train_ids:
        camera = scene.cameras[scene.camera_indices[index]]
        num_inside = 0
        for point in scene.points.astype(np.float64):
            x, y, z = (np.linalg.inv(scene.camtoworlds[index]) @ [*point, 1.0])[:3]
            u, v = camera.K[0, 0] * x / z + camera.K[0, 2], camera.K[1, 1] * y / z + camera.K[1, 2]
            num_inside += z > 0 and 0 <= u <= camera.width and 0 <= v <= camera.height
        shares.append(num_inside / len(scene.points))
    assert 0.1 < max(shares) <= 1
    assert share_in_largest_view(scene, batch_size=1) == pytest.approx(max(shares))
    assert share_in_largest_view(scene, batch_size=1000) == 1.0


def test_processes_of_a_machine_share_its_memory_and_not_their_devices(monkeypatch):
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: GIB)
    one, two = (
        needs(FOOTPRINTS["geometry on device"], 0.1, 10, torch.device("cuda"), modules_bytes=9, num_processes=processes)
        for processes in (1, 2)
    )
    assert (two.host.free_bytes, two.device.free_bytes) == (GIB // 2, GIB)
    assert two.device == one.device
    assert (two.device.other_bytes, two.host.other_bytes) == (10 * 100 + 9, 0)
    both = needs(FOOTPRINTS["geometry on device"], 0.1, 10, torch.device("cpu"), modules_bytes=9, num_processes=2)
    assert (both.device, both.host.free_bytes, both.host.other_bytes) == (None, GIB // 2, 10 * 100 + 9)


def needs_of(host_free: float, device_free: float) -> Needs:
    return Needs(
        Need("host memory", 1200, 1000, 0, int(host_free)), Need("GPU memory", 50, 100, 5000, int(device_free))
    )


def checked(all_needs: Needs, *arguments: Any, **options: Any) -> str:
    return check_memory(all_needs, *arguments, **options, what_helps=lambda memory: f"free {memory} memory")


@pytest.mark.parametrize(("host_free", "device_free", "lacks"), [(GIB, 4 * GIB, "host"), (4 * GIB, 50e6, "device")])
def test_the_memory_that_is_too_small_is_asked_about(host_free, device_free, lacks):
    with pytest.raises(NotEnoughMemory, match=f"are free: free {lacks} memory"):
        checked(needs_of(host_free, device_free), 10**6, 0)


def test_what_fits_is_told_in_one_or_two_lines():
    told = checked(needs_of(4 * GIB, GIB), 2**20, 0)
    assert told == (
        "Memory for 1,048,576 Gaussians: 1.17 GiB of host memory (4.00 GiB free), 100 MiB of GPU memory "
        "(1.00 GiB free).\nAbout 4,294,967 would fit."
    )
    allowed = checked(needs_of(4 * GIB, GIB), 2**20, 2**21)
    assert allowed.splitlines()[1].startswith("Memory for 2,097,152, as --max_gaussians allows: 1.95 GiB of host")
    assert len(checked(needs_of(4 * GIB, GIB), 2**20, 1000).splitlines()) == 1  # it cannot grow at all


def test_too_little_memory_for_fast_steps_is_told():
    """Rows of a large view stay on the host then; what they would take is not counted as lacking."""
    footprint = memory_estimate.streamed(3, "host", "float32", "compact")
    assert footprint.device_spared_in_view == 2 * 328 + 36 + 24  # rows, slopes, and numbers of two views
    assert footprint.while_training(0.5)[1] == footprint.while_training(0.5, sparing=True)[1] + 358
    host = Need("host memory", 0, 0, 0, GIB)
    fast, slow = (
        Needs(host, Need("GPU memory", 0, 100, 5000, free, 300)) for free in (300 * 2**20 + 5000, 200 * 2**20)
    )
    assert checked(fast, 2**20, 0).splitlines()[0].endswith("300 MiB of GPU memory (300 MiB free).")
    assert len(checked(fast, 2**20, 0).splitlines()) == 2
    first, _, told = checked(slow, 2**20, 0).splitlines()
    assert first.endswith("200 MiB of GPU memory (200 MiB free).")
    assert told.startswith("The GPU has no room for the rows of the largest views")
    assert checked(fast, 2**20, 2**21).splitlines()[2] == told  # as many as it may grow to
    with pytest.raises(NotEnoughMemory):
        checked(slow, 2**22, 0)
    full = Needs(host, Need("GPU memory", 0, 100, 5000, 100 * 2**20 + 5000, 100))  # of a trainer that spares nothing
    assert len(checked(full, 2**20, 0).splitlines()) == 2


def test_what_fits_is_told_of_the_gaussians_of_all_ranks():
    """Of which each takes memory for its own."""
    half = checked(needs_of(4 * GIB, GIB), 2**21, 0, share=0.5)
    assert half == (
        "Memory for 2,097,152 Gaussians for its share: 1.17 GiB of host memory (4.00 GiB free), 100 MiB of GPU memory "
        "(1.00 GiB free).\nAbout 8,589,934 would fit."
    )
    with pytest.raises(NotEnoughMemory, match=r"^Training 9,000,000 Gaussians takes about .* for its share, and"):
        checked(needs_of(4 * GIB, GIB), 9_000_000, 0, share=0.5)
    with pytest.raises(NotEnoughMemory, match=r"--max_gaussians 9,000,000 .*for its share.* at most 8,589,934"):
        checked(needs_of(4 * GIB, GIB), 2**21, 9_000_000, share=0.5)


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        (simple_trainer, (), ["--sh_degree"]),
        (simple_trainer_hybrid_baseline, (), ["simple_trainer_hybrid_optimized.py"]),
        (simple_trainer_hybrid_optimized, ("--geometry", "device"), ["--state compact"]),
        (simple_trainer_hybrid_optimized, ("--state", "compact"), ["--sh_degree"]),
        (simple_trainer_hybrid_optimized, ("--geometry", "host"), ["--state compact"]),
    ],
)
def test_a_scene_that_does_not_fit_is_refused(monkeypatch, city_block, tmp_path, capsys, script, options, words):
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: 600 * 1000)
    assert run(monkeypatch, script, city_block, tmp_path, *options) == 2
    assert_one_sentence(capsys.readouterr().err, ["600 Gaussians", "585.9 KiB are free", *words])


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (10**6, "--target_gaussians 1,000,000 would take about "),
        (599, "--target_gaussians 599 is below the 600 Gaussians that training begins with: give more, or"),
        (
            10**9,
            "--target_gaussians 1,000,000,000 cannot be reached from 600 Gaussians: a refinement at most doubles them",
        ),
    ],
)
def test_a_target_that_cannot_be_is_refused(monkeypatch, city_block, tmp_path, capsys, target, sentence):
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: 20 * 1000**2)
    options = ("--target_gaussians", target, "--refine_stop_iter", 2000, "--max_steps", 2000)
    assert run(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 2
    assert_one_sentence(capsys.readouterr().err, [sentence])


def test_a_bound_above_memory_is_refused_and_nothing_else_is_told(monkeypatch, city_block, tmp_path, capsys):
    """Neither how far mcmc would come in so few steps, nor how to come farther."""
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: 20 * 1000**2)
    options = ("--strategy", "mcmc", "--max_gaussians", 10**6, "--max_steps", 600)
    assert run(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 2
    told = capsys.readouterr()
    assert_one_sentence(told.err, ["--max_gaussians 1,000,000 would take about", "set it to at most"])
    assert "growth will end" not in told.out + told.err


def test_max_gaussians_that_do_not_fit_are_refused_with_the_number_that_does(monkeypatch, city_block, tmp_path, capsys):
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: 20 * 1000**2)
    script = simple_trainer_hybrid_optimized
    assert run(monkeypatch, script, city_block, tmp_path, "--max_gaussians", 10**6) == 2
    message = capsys.readouterr().err
    assert_one_sentence(message, ["--max_gaussians 1,000,000 would", "set it to at most "])
    said = message.rstrip(".\n").split()[-1]
    most = int(said.replace(",", ""))
    assert said == f"{most:,}"
    assert run(monkeypatch, script, city_block, tmp_path, "--max_gaussians", most + 1) == 2
    assert run(monkeypatch, script, city_block, tmp_path, "--max_gaussians", most, "--max_steps", 1) == 0
    assert f"Memory for {most:,}, as --max_gaussians allows" in capsys.readouterr().out


SHARES = (0.05, 0.3, 1.0)  # of the Gaussians, in the largest view


def options_of(name: str, *words: str) -> Config:
    trainer = TRAINERS[name]
    return command_line.parse(trainer.load().CONFIGS, ["default", *trainer.arguments, *words], "")[1]


@pytest.mark.parametrize("memory", ["device", "host"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_said_to_need_less_memory_does(name, share, memory):
    """Its options can be used too, whether they follow from those of the run or are given as the sentence says."""
    trainer, cfg, place = TRAINERS[name], options_of(name), ("host", "device").index(memory)
    smaller = smaller_trainer(trainer, cfg, Lack(memory, share))
    told = remedy(trainer, cfg, Lack(memory, share))
    if smaller is None:
        assert "which needs less" not in told
        assert not told.startswith("give ")
        return
    options = smaller.cfg(cfg)
    check_options(options)
    before, after = (
        entry.footprint(entry_cfg).while_training(share, sparing=True)[place]
        for entry, entry_cfg in ((trainer, cfg), (smaller.trainer, options))
    )
    assert after < before
    words = shlex.split(told.split(",")[0])
    assert words[0] == ("give" if smaller.trainer.script == trainer.script else "use")
    start = words[1:] if words[0] == "give" else words[2:]
    given = [*(trainer.arguments if words[0] == "give" else ()), *start]
    assert command_line.parse(smaller.trainer.load().CONFIGS, ["default", *given], "")[1] == options


def test_only_what_cannot_be_cut_any_further_has_no_trainer_that_needs_less_device_memory():
    without = {
        name
        for name, trainer in TRAINERS.items()
        if any(smaller_trainer(trainer, options_of(name), Lack("device", share)) is None for share in SHARES)
    }
    assert without == {"split_geometry_on_host", "split_compact_geometry_on_host"}


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_views_are_cut_where_that_alone_takes_less(num_ranks):
    """A view of all ranks together, of which each holds and draws a part."""
    trainer, cfg = TRAINERS["optimized_geometry_on_host"], options_of("optimized_geometry_on_host")
    lack = Lack("device", 0.2, num_ranks=num_ranks)
    smaller = smaller_trainer(trainer, cfg, lack)
    assert smaller.options == {"geometry": "host", "split_threshold": 0.1 / num_ranks}
    most, at_most = (
        footprint_of(entry, entry_cfg, num_ranks).while_training(0.2)[1]
        for entry, entry_cfg in ((trainer, cfg), (smaller.trainer, smaller.cfg(cfg)))
    )
    assert at_most < 0.6 * most
    assert f"--split_threshold {0.1 / num_ranks}" in smaller_command(smaller, "default", cfg)


def test_what_needs_more_of_the_other_memory_than_there_is_is_left_out():
    trainer, cfg = TRAINERS["baseline"], options_of("baseline")
    host, device = TRAINERS["optimized"].footprint(options_of("optimized")).while_training(0.05)
    assert host < trainer.footprint(cfg).host
    assert smaller_trainer(trainer, cfg, Lack("host", 0.05, other_room=device)).trainer == TRAINERS["optimized"]
    assert smaller_trainer(trainer, cfg, Lack("host", 0.05, other_room=device - 1)) is None
    deferred, cfg = TRAINERS["gpu_only_deferred"], options_of("gpu_only_deferred")
    at_start = 580 + 236  # of the host, and 638 later
    assert smaller_trainer(deferred, cfg, Lack("device", 0.05, other_room=at_start)).trainer == TRAINERS["optimized"]
    assert smaller_trainer(deferred, cfg, Lack("device", 0.05, other_room=at_start - 1)) is None


@pytest.mark.parametrize(
    ("name", "words", "lack", "told"),
    [
        (
            "gpu_only_deferred",
            "",
            {},
            "use simple_trainer_hybrid_optimized.py, which needs less of it, or lower --sh_d",
        ),
        ("gpu_only_deferred", "", {"ran_out": True}, "use simple_trainer_hybrid_optimized.py, which needs less of it"),
        ("gpu_only_deferred", "", {"other_room": 0}, "lower --sh_degree, or free some of it"),
        ("gpu_only_deferred", "", {"other_room": 0, "ran_out": True}, "free some of it"),
        ("gpu_only_deferred", "--resume", {"other_room": 0}, "free some of it"),
        ("split_geometry_on_host", "", {}, "lower --split_threshold, or raise --data_factor"),
        ("split_geometry_on_host", "--device_memory_budget 4GiB", {}, "raise --data_factor"),
        ("split_geometry_on_host", "--batch_size 2", {}, "lower --split_threshold, raise --data_factor, or lower --b"),
        ("streamed_bfloat16", "", {"memory": "host"}, "give --state compact --moments float32"),
    ],
)
def test_what_else_helps_is_said(name, words, lack, told):
    """Not what the Gaussians there are have already, nor what the option has no more of."""
    sentence = remedy(
        TRAINERS[name], options_of(name, *words.split()), Lack(**{"memory": "device", "share_in_view": 0.1, **lack})
    )
    assert sentence.startswith(told)
    assert "--sh_degree" not in sentence or not (lack.get("ran_out") or "--resume" in words)
    assert "--batch_size" not in sentence or "--batch_size" in words


def test_residents_are_what_is_given_up_first(monkeypatch):
    """Where they do not fit, and where training has run out of memory."""
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: GIB if device.type == "cuda" else 999 * GIB)
    trainer = TRAINERS["streamed_compact"]
    words = ["default", *trainer.arguments]
    told = []
    for share in ("0", "0.5"):
        _, cfg = command_line.parse(trainer.load().CONFIGS, [*words, "--resident_share", share], "")
        told.append(needs(trainer.footprint(cfg), 0.01, 10**6, torch.device("cuda")).device.most_gaussians())
    assert told[0] > 5 * told[1]
    lack = Lack("device", 0.01)
    assert remedy(trainer, cfg, lack) == "give --resident_share 0"
    command = smaller_command(smaller_trainer(trainer, cfg, lack), "default", cfg)
    assert command.endswith("simple_trainer_hybrid_streamed.py default --state compact --resume")
    _, cfg = command_line.parse(trainer.load().CONFIGS, [*words, "--resident_share", "1"], "")
    assert trainer.footprint(cfg).device == 20  # what culling reads, so that fewer residents are no remedy
    assert remedy(trainer, cfg, lack) == "give --geometry host"
    assert remedy(trainer, cfg, replace(lack, ran_out=True)) == "give --resident_share 0"


def run(monkeypatch, script, data_dir: Path, result_dir: Path, *options: object) -> int:
    """The exit code of a script."""
    common = ("--data_dir", data_dir, "--result_dir", result_dir, "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["script", "default", *map(str, (*common, *options))])
    try:
        command_line.main(script.CONFIGS, script.train, "test")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def assert_one_sentence(message: str, words: list[str]) -> None:
    line = message.splitlines()[-1]
    assert line.startswith("Error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("words", "device", "told"),
    [
        ("--state compact --resident_share 1", "cuda", "While the GPU has room for all Gaussians they stay there (312"),
        ("--state compact --resident_share 0.2", "cuda", "Of all Gaussians up to 20 % stay on the GPU"),
        ("--state compact", "cuda", "has room for all Gaussians that training starts with: with --resident_share 1"),
        ("--state compact --resident_share 1", "cpu", "Without a GPU --resident_share saves nothing"),
        ("--state compact", "cpu", None),
        ("--state float32", "cuda", None),
    ],
)
def test_what_stays_on_the_gpu_is_said(monkeypatch, words, device, told):
    monkeypatch.setattr(device_room, "most_bytes", lambda device: GIB)
    _, cfg = command_line.parse(simple_trainer_hybrid_streamed.CONFIGS, ["default", *words.split()], "")
    sentence = memory_estimate.what_stays(cfg, torch.device(device), 1000, "all")
    assert (sentence is None) if told is None else told in sentence
    if words == "--state compact":  # half of what there is may be of rows
        assert memory_estimate.what_stays(cfg, torch.device(device), GIB // 696, "all") is None
    if words == "--state compact --resident_share 1" and device == "cuda":  # they begin on the host
        sentence = memory_estimate.what_stays(cfg, torch.device(device), GIB // 696, "all")
        assert "Of all Gaussians up to 100 % stay on the GPU" in sentence


def test_trainers_without_residents_say_nothing_of_them():
    _, cfg = command_line.parse(simple_trainer.CONFIGS, ["default", "--state", "compact", "--adam", "deferred"], "")
    assert memory_estimate.what_stays(cfg, torch.device("cuda"), 1000, "all") is None
