"""The memory that training will take is known before, and what cannot fit is refused in one sentence."""

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import simple_trainer
import simple_trainer_hybrid_baseline
import simple_trainer_hybrid_optimized
import simple_trainer_hybrid_streamed
from benchmarks.aerial_scene import aerial_scene
from datasets.scene import load_scene
from errors import NotEnoughMemory
from offload.models import device_room
from tests.aerial_training import gaussians_of
from tests.measured_memory import HEIGHT, WIDTH, train_some_steps
from trainers import TRAINERS, remedy, smaller_trainer
from training import command_line, memory_estimate
from training.commands import smaller_command
from training.memory import allocated_bytes
from training.memory_estimate import Need, check_memory, needs, share_in_largest_view

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
        cwd=Path(__file__).parents[1],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "OMP_NUM_THREADS": "2"},
    )
    measured = json.loads(finished.stdout)
    found, expected = {}, {}
    for trainer, footprint in FOOTPRINTS.items():
        taken = measured[trainer]
        (need,) = needs(footprint, taken["share_in_view"], WIDTH * HEIGHT, torch.device("cpu"))
        found[trainer, "start"], found[trainer, "all"] = taken["bytes_at_start"], taken["bytes"]
        expected[trainer, "start"] = taken["num_gaussians_at_start"] * need.starting_bytes_per_gaussian
        expected[trainer, "all"] = need.bytes(taken["num_gaussians"])
    assert found == pytest.approx(expected, rel=0.2)


@pytest.mark.cuda
@pytest.mark.parametrize("trainer", FOOTPRINTS)
def test_estimate_is_what_the_device_allocates(trainer):
    device, num_gaussians = torch.device("cuda"), 2_000_000
    parameters, cameras = aerial_scene(num_gaussians, seed=0)
    gc.collect()  # of other tests' Gaussians, which would be freed in the midst of this
    before = allocated_bytes(device)
    torch.cuda.reset_peak_memory_stats()
    share = train_some_steps(trainer, gaussians_of(trainer, parameters, device), cameras, device)
    taken = torch.cuda.max_memory_allocated() - before
    footprint = replace(FOOTPRINTS[trainer], device_while_changed=0)  # no Gaussians are added or removed here
    need = needs(footprint, share, WIDTH * HEIGHT, device)[1]
    assert taken == pytest.approx(need.bytes(num_gaussians), rel=0.2)


def test_bytes_per_gaussian():
    """README.md and the store's docstring name the sizes of stores, which may take a tenth more while they change."""
    assert FOOTPRINTS["gpu_only"].device == 4 * 236 + 32
    assert FOOTPRINTS["gpu_only, deferred"].device == FOOTPRINTS["gpu_only, deferred"].device_at_start == 716
    assert FOOTPRINTS["baseline"].host_at_start == 728 + 236
    assert FOOTPRINTS["baseline"].host == 800 + 240  # gradients
    assert FOOTPRINTS["geometry on device"].host_at_start == 580 + 236
    assert FOOTPRINTS["geometry on device"].host == 638
    assert FOOTPRINTS["geometry on host"].host == 800
    assert FOOTPRINTS["geometry on device, compact"].device == 128 + 4
    assert FOOTPRINTS["geometry on device, compact"].host_at_start == 192 + 4 + 236
    assert FOOTPRINTS["streamed, bfloat16"].host == 426
    assert memory_estimate.gpu_only(0, "dense").host_at_start == 14 * 4
    one_view, two_views = (memory_estimate.optimized(3, "device", batch_size=views) for views in (1, 2))
    assert two_views == memory_estimate.split(3, "device", 1.0)
    assert two_views.device_in_view - one_view.device_in_view == 192 - 24 - 2 * 12  # gradients; what they are made of
    assert two_views.host_in_view - one_view.host_in_view == 3 * (192 - 24)
    assert memory_estimate.optimized(3, "host", "compact").device_in_view == 2 * 196 + 24 + 12 + 3 * 64 + 200
    compact = memory_estimate.streamed(3, "device", "float32", "compact")
    assert memory_estimate.with_residents(compact, 3, 0.0) == compact
    assert memory_estimate.with_residents(compact, 3, 0.25).device == compact.device + 328 / 4 + 5
    assert memory_estimate.with_residents(compact, 3, 1.0) == compact  # all stay only while there is room
    assert compact.device_in_view == 2 * 328 + 64 + 64 + 240  # values and gradients of geometry; numbers and rendering
    of_two_views = memory_estimate.streamed(3, "device", "float32", "compact", batch_size=2)
    assert of_two_views.device_in_view == compact.device_in_view + 192 + 192


def test_gpu_only_training_is_not_bound_by_host_memory(monkeypatch):
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: GIB)
    host, device = needs(FOOTPRINTS["gpu_only"], 0.1, 10**6, torch.device("cuda"))
    assert host.most_gaussians() > 10**12 > device.most_gaussians()


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


def needs_of(host_free: float, device_free: float) -> list[Need]:
    return [
        Need("host memory", 1200, 1000, 0, int(host_free), "free memory"),
        Need("GPU memory", 50, 100, 5000, int(device_free), "give --geometry host"),
    ]


def test_what_fits_is_told_in_one_or_two_lines():
    told = check_memory(needs_of(4 * GIB, GIB), 2**20, 0)
    assert told == (
        "Memory for 1,048,576 Gaussians: 1.17 GiB of host memory (4.00 GiB free), 100 MiB of GPU memory "
        "(1.00 GiB free).\nAbout 4,294,967 would fit."
    )
    allowed = check_memory(needs_of(4 * GIB, GIB), 2**20, 2**21)
    assert allowed.splitlines()[1].startswith("Memory for 2,097,152, as --max_gaussians allows: 1.95 GiB of host")
    assert len(check_memory(needs_of(4 * GIB, GIB), 2**20, 1000).splitlines()) == 1  # it cannot grow at all


def test_what_fits_is_told_of_the_gaussians_of_all_ranks():
    """Of which each takes memory for its own."""
    half = check_memory(needs_of(4 * GIB, GIB), 2**21, 0, share=0.5)
    assert half == (
        "Memory for 2,097,152 Gaussians for its share: 1.17 GiB of host memory (4.00 GiB free), 100 MiB of GPU memory "
        "(1.00 GiB free).\nAbout 8,589,934 would fit."
    )
    with pytest.raises(NotEnoughMemory, match=r"^Training 9,000,000 Gaussians takes about .* for its share, and"):
        check_memory(needs_of(4 * GIB, GIB), 9_000_000, 0, share=0.5)
    with pytest.raises(NotEnoughMemory, match=r"--max_gaussians 9,000,000 .*for its share.* at most 8,589,934"):
        check_memory(needs_of(4 * GIB, GIB), 2**21, 9_000_000, share=0.5)


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


@pytest.mark.slow
def test_device_memory_names_what_takes_less_of_it(monkeypatch):
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: GIB if device.type == "cuda" else 999 * GIB)
    split = "use simple_trainer_hybrid_optimized_split.py --geometry host, which needs less of it, raise --data_factor"
    remedies = {
        "gpu_only": "give --adam deferred",
        "gpu_only_deferred": "use simple_trainer_hybrid_optimized.py, which needs less of it or lower --sh_degree",
        "gpu_only_compact": "use simple_trainer_hybrid_streamed.py --state compact, which needs less of it or lower",
        "baseline": split,
        "optimized": "give --geometry host",
        "optimized_geometry_on_host": split,
        "optimized_compact": "give --geometry host",
        "optimized_compact_geometry_on_host": split.replace("host", "host --state compact"),
        "split": "give --geometry host",
        "split_geometry_on_host": "raise --data_factor or lower --batch_size",
        "split_compact": "give --geometry host",
        "split_compact_geometry_on_host": "raise --data_factor or lower --batch_size",
        "streamed": "give --geometry host",
        "streamed_bfloat16": "give --geometry host",
        "streamed_geometry_on_host": split,
        "streamed_compact": "give --geometry host",
        "streamed_compact_geometry_on_host": split,
    }
    assert remedies.keys() == TRAINERS.keys()
    for name, words in remedies.items():
        trainer = TRAINERS[name]
        _, cfg = command_line.parse(trainer.load().CONFIGS, ["default", *trainer.arguments], "")
        told = remedy(trainer, cfg, "device")
        all_needs = needs(trainer.footprint(cfg), 0.1, 10**6, torch.device("cuda"), device_remedy=told)
        with pytest.raises(NotEnoughMemory, match=f"of GPU memory, and 1.00 GiB are free: {words}"):
            check_memory(all_needs, 10**8, 0)


def test_residents_are_what_is_given_up_first(monkeypatch):
    """Where they do not fit, and where training has run out of memory."""
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: GIB if device.type == "cuda" else 999 * GIB)
    trainer = TRAINERS["streamed_compact"]
    words = ["default", *trainer.arguments]
    told = []
    for share in ("0", "0.5"):
        _, cfg = command_line.parse(trainer.load().CONFIGS, [*words, "--resident_share", share], "")
        all_needs = needs(
            trainer.footprint(cfg), 0.01, 10**6, torch.device("cuda"), device_remedy=remedy(trainer, cfg, "device")
        )
        told.append(all_needs[1].most_gaussians())
    assert told[0] > 5 * told[1]
    with pytest.raises(NotEnoughMemory, match="GiB are free: give --resident_share 0"):
        check_memory(all_needs, told[0], 0)
    command = smaller_command(smaller_trainer(trainer, cfg, "device"), "default", cfg)
    assert "--state compact --resident_share 0 " in command
    _, cfg = command_line.parse(trainer.load().CONFIGS, [*words, "--resident_share", "1"], "")
    assert trainer.footprint(cfg).device == 20  # what culling reads, so that fewer residents are no remedy
    assert remedy(trainer, cfg, "device") == "give --geometry host"


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
        ("--state compact --resident_share 1", "cuda", "While the GPU has room for all Gaussians they stay there (328"),
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
