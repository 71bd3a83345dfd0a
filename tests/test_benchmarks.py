"""Benchmarks run at a small size and write what they measured; none of their times is asserted."""

import functools
import json
import runpy
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import trainers
from benchmarks import (
    bigcity,
    culling,
    dataset_loading,
    densify,
    gsplat_agreement,
    host_adam,
    losses,
    modules,
    quality,
    ranks,
    rasterizer_cpu,
    scaling,
    split,
    timing,
    train_step,
    transfer,
    viewer,
    yardstick,
)
from benchmarks.__main__ import benchmarks
from benchmarks.aerial_scene import VisibleCounts, aerial_scene, geometry_rows, one_by_one
from benchmarks.city_scene import City, shares_around, windows
from benchmarks.rank_processes import RankFailed, in_ranks
from benchmarks.report import Report, short_name, spread
from benchmarks.timing import Case, Spread, time_in_turns
from benchmarks.visible_rows import KINDS
from comparing.launch import Interruption
from comparing.runs import Launch
from datasets.synthetic import write_city_block
from distributed.dealing import dealt_rows
from distributed.mesh import Ranks
from errors import InputError
from offload.culling.native import BlockBounds, visible_ids
from offload.store.layout import num_columns, row_bytes
from offload.store.morton import morton_order
from reporting import machine
from reporting.machine import describe_machine
from reporting.numbers import number
from tests.waiting import HANGS_AFTER
from training import memory_estimate
from training.ending import FINISHED, INTERRUPTED


def written(out: Path) -> dict:
    """The JSON of a benchmark, whose Markdown must show every row."""
    content = json.loads(out.with_name(out.name + ".json").read_text())
    markdown = out.with_name(out.name + ".md").read_text()
    rows = sum(len(table["rows"]) + 2 for table in content["tables"])
    assert sum(line.startswith("|") for line in markdown.splitlines()) == rows
    assert content["machine"]["torch"] in markdown
    return content


@pytest.mark.slow
def test_modules_are_compared_in_one_process(monkeypatch, tmp_path, capsys):
    light = next(trouble for trouble in modules.TROUBLES if "lights" in trouble.city)
    runs = {"--exposure affine": light.runs["--exposure affine"]}
    monkeypatch.setattr(modules, "TROUBLES", [replace(light, runs=runs)])
    modules.main(modules.Options(steps=8, size=(32, 24), device="cpu", out=tmp_path / "table"))
    rows = written(tmp_path / "table")["tables"][0]["rows"]
    assert [row["options"] for row in rows] == ["no trouble", "--exposure affine"]
    assert all(5 < row[title] < 30 for row in rows for title in ("PSNR, dB", "PSNR, colours corrected"))
    assert "Gaussians" not in capsys.readouterr().out  # what a run says of itself
    with pytest.raises(InputError, match="nowhere"):
        modules.run_script("simple_trainer", ["default", "--data_dir", str(tmp_path / "nowhere")])


@pytest.fixture
def _in_this_process(monkeypatch):
    for module in (train_step, scaling, split, bigcity, ranks):
        monkeypatch.setattr(module, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(train_step, "copy_bandwidth", lambda device: 1e10)


@pytest.mark.slow
@pytest.mark.usefixtures("_in_this_process")
def test_train_step_runs_every_trainer_as_the_scripts_do(tmp_path):
    options = train_step.Options(num_gaussians=(3000,), steps=3, picture_scale=0.1, out=tmp_path / "table")
    train_step.main(options)
    (table,) = written(tmp_path / "table")["tables"]
    assert [row["trainer"] for row in table["rows"]] == list(trainers.TRAINERS)
    assert not any(row["remark"] for row in table["rows"])
    times = [row["ms per step: median (10 %, 90 %)"] for row in table["rows"]]
    assert all(time["low"] <= time["median"] <= time["high"] and time["count"] == 3 for time in times)
    assert all("render" in row["stages, mean ms"] for row in table["rows"])
    beside = {row["trainer"]: row["beside the stages, mean ms"] for row in table["rows"]}
    assert all(beside[name]["worker_commit"] > 0 for name in ("optimized", "optimized_geometry_on_host", "split"))
    assert beside["gpu_only"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("_in_this_process")
def test_split_trains_whole_in_tiles_and_in_a_budget(tmp_path, monkeypatch):
    options = split.Options(
        num_gaussians=3000, steps=16, budget_steps=16, budget="6MB", picture_scale=0.2, out=tmp_path / "table"
    )
    monkeypatch.setattr(split, "variants", lambda options, every=split.variants: every(options)[1:])
    split.main(options)
    (table,) = written(tmp_path / "table")["tables"]
    assert [row["tiles of a wide view"] > 1 for row in table["rows"]] == [False, True, True, True]
    assert table["rows"][-1]["budget"] == "kept in every step of 16"
    assert not any(row["remark"] for row in table["rows"])


@pytest.mark.slow
def test_trainers_of_the_benchmark_have_the_same_loss():
    losses = [
        train_step.run_trainer(train_step.Job(name, 3000, 1000.0, 0.1, steps=3)).loss
        for name in trainers.TRAINERS
        if "bfloat16" not in name
    ]
    assert max(losses) - min(losses) < 1e-5 * losses[0]


@pytest.mark.usefixtures("_in_this_process")
def test_a_trainer_without_memory_is_reported_and_the_rest_go_on(tmp_path, monkeypatch):
    def train(run):
        raise train_step.torch.OutOfMemoryError("as a GPU would")

    monkeypatch.setattr(trainers.TRAINERS["gpu_only"].load(), "train", train)
    names = ("gpu_only", "optimized")
    options = train_step.Options(
        num_gaussians=(3000,), steps=3, picture_scale=0.1, trainers=names, out=tmp_path / "table"
    )
    train_step.main(options)
    failed, finished = written(tmp_path / "table")["tables"][0]["rows"]
    assert failed["remark"] == "out of device memory"
    assert failed["peak device GB"] is None
    assert finished["remark"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("_in_this_process")
def test_scaling_varies_one_number_at_a_time(tmp_path):
    options = scaling.Options(
        num_gaussians=(2000, 8000), visible=(200, 800), fixed_num_gaussians=4000, steps=3, picture_scale=0.1
    )
    options.out = tmp_path / "table"
    scaling.main(options)
    by_n, by_v = (table["rows"] for table in written(options.out)["tables"])
    assert [row["Gaussians"] for row in by_n] == [2000, 8000]
    assert all(row["visible per view"] == pytest.approx(200, rel=0.1) for row in by_n)
    assert [row["visible per view"] for row in by_v] == pytest.approx([200, 800], rel=0.1)
    assert by_n[1]["focal length, px"] > 1.5 * by_n[0]["focal length, px"]


def test_every_trainer_has_a_floor():
    bandwidth = train_step.Traffic(device=0.0, link=0.0, host=1e9)
    floors = {name: train_step.floor_milliseconds(name, 1000, 100, bandwidth) for name in trainers.TRAINERS}
    assert all(floor > 0 for floor in floors.values())
    assert floors["optimized"] < floors["gpu_only_deferred"] < min(floors["gpu_only"], floors["baseline"])


def test_compact_rows_have_the_bytes_of_their_stores():
    groups = ("geometry", "appearance")
    assert sum(row_bytes(group, 3, state="compact") for group in groups) == trainers.COMPACT_ROW
    assert sum(row_bytes(group, 3, state="compact", tight=True) for group in groups) == 312
    assert sum(4 * num_columns(group, 3, "compact") for group in groups) == trainers.COMPACT_VALUES
    for name in ("streamed_compact", "streamed_compact_geometry_on_host"):
        assert trainers.TRAINERS[name].traffic(1e6, 1e5).link == 328 * 1e5
    on_host, balls = (trainers.TRAINERS[name].traffic(1e6, 1e5) for name in ("gpu_only_compact", "streamed_compact"))
    # Rows come and go, and are not tight: two more columns of each are read, with their moments once more, and written.
    assert balls.device - on_host.device == (2 * 328 + 16 + 8 + 16) * 1e5


@pytest.mark.parametrize(
    "options",
    [
        train_step.Options(trainers=("none",)),
        train_step.Options(steps=0),
        train_step.Options(device_memory_cap="24GB"),
        train_step.Options(picture_scale=0.0),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options, monkeypatch):
    monkeypatch.setattr(train_step.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--"):
        train_step.check(options)


def test_visible_counts_are_those_of_the_scene():
    _, cameras = aerial_scene(5000, seed=0)
    counts = VisibleCounts(5000, seed=0)
    assert len(cameras.viewmats) == 64
    assert 0.04 < counts.mean(1000.0) / 5000 < 0.15
    assert counts.mean(500.0) > 2 * counts.mean(1000.0)


@pytest.mark.slow
@pytest.mark.usefixtures("_in_this_process")
def test_ranks_are_held_against_one_process(tmp_path):
    ranks.main(ranks.Options(quick=True, out=tmp_path / "table"))
    (table,) = written(tmp_path / "table")["tables"]
    one, two = table["rows"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["remark"] is two["remark"] is None
    assert one["of one rank"] == 1
    assert two["views per second"] == pytest.approx(2e3 / two["ms per step: median (10 %, 90 %)"]["median"])
    assert one["pairs sent per rank and step"] is None
    pairs = two["pairs sent per rank and step"]
    assert 0.03 < pairs / two["Gaussians"] < 0.12  # half of what a view sees
    # 48 bytes of each and 36 of its gradient; 8 of a count for each other rank; pairs are rounded in the table
    assert two["MB sent per rank and step"] == pytest.approx(84 * pairs + 8, abs=84)
    assert min(two["ms in exchange, of the ranks"]) > 0


def fails_at_rank_1(group: Ranks | None) -> None:
    if group.rank == 1:
        raise InputError("no room")
    group.barrier()


@pytest.mark.slow
def test_a_rank_that_cannot_go_on_ends_all():
    with pytest.raises(RankFailed, match="rank 1: no room"):
        in_ranks(2, "cpu", fails_at_rank_1)


def test_ranks_have_the_gaussians_of_the_scene_between_them(monkeypatch):
    monkeypatch.setattr("benchmarks.aerial_scene.REPEATED_ROWS", 700)
    own = [dealt_rows(2001, rank, (1, 1)) for rank in range(2)]
    whole = aerial_scene(2001, seed=0)[0], City(2001, seed=0).parameters()
    for rows in own:
        of_rank = aerial_scene(2001, seed=0, rows=rows)[0], City(2001, seed=0).parameters(rows)
        assert all(torch.equal(of_rank[0][name], value[rows]) for name, value in whole[0].items())
        assert all(torch.equal(of_rank[1][name], whole[1][name][rows]) for name in ("means", "scales", "opacities"))
        assert all(of_rank[1][name].shape == value[rows].shape for name, value in whole[1].items())


@pytest.mark.parametrize(
    "options",
    [
        {"trainers": ("baseline",)},
        {"nproc": (0,)},
        {"visible": (0.01,)},
        {"scene": "city", "visible": (0.5,)},
        {"picture_scale": 0.0},
    ],
    ids=str,
)
def test_what_cannot_be_measured_with_ranks_is_refused(options):
    with pytest.raises(InputError, match=f"--{[*options][-1]}"):
        ranks.main(ranks.Options(**options))


@pytest.mark.slow
@pytest.mark.usefixtures("_in_this_process")
def test_views_of_the_city_see_what_those_of_clm_see(tmp_path):
    names = ("streamed_compact_geometry_on_host", "streamed_bfloat16")
    options = bigcity.Options(
        num_gaussians=(200_000,), steps=3, picture_scale=0.1, trainers=names, out=tmp_path / "table"
    )
    bigcity.main(options)
    (table,) = written(tmp_path / "table")["tables"]
    assert [row["trainer"] for row in table["rows"]] == list(names)
    for row in table["rows"]:
        assert row["remark"] is None
        assert row["visible"] == pytest.approx(0.0039, rel=0.02)
        assert row["at most"] == pytest.approx(0.0106, rel=0.02)
        assert row["mean ms per step"] > 0


def test_a_trainer_that_the_city_leaves_no_memory_is_not_started(monkeypatch):
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: 10_000_000)
    monkeypatch.setattr(bigcity, "City", None)
    run_type = functools.partial(bigcity.CityRun, largest_share=0.01)
    job = train_step.Job("streamed_compact", 1_000_000, (1000.0,) * 64, 0.1, steps=3)
    found = train_step.run_trainer(job, run_type)
    assert found.milliseconds is None
    assert "1,000,000 Gaussians" in found.problem


def test_a_city_is_counted_tile_by_tile_as_if_it_were_whole():
    city = City(30_001, seed=0)
    parameters, cameras = city.parameters(), city.cameras(4000.0)
    rows = geometry_rows(parameters)
    bounds = BlockBounds(rows)
    whole = [len(visible_ids(rows, bounds, camera)) / 30_001 for camera in one_by_one(cameras)]
    assert city.shares(cameras) == pytest.approx(whole, abs=2 / 30_001)  # where rounding decides
    assert min(whole) > 0


def test_a_city_takes_twenty_bytes_a_gaussian_and_is_in_morton_order():
    parameters = City(30_001, seed=0).parameters()
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in parameters.values()}
    assert sum(storages.values()) < 20 * 30_001 + 10_000
    assert {name: value.shape[1:] for name, value in parameters.items()} == {
        name: value.shape[1:] for name, value in aerial_scene(10, seed=0)[0].items()
    }
    assert all(len(value) == 30_001 for value in parameters.values())
    means = parameters["means"]
    along, sorted_along = (float(steps.diff(dim=0).norm(dim=1).mean()) for steps in (means, means[morton_order(means)]))
    assert along == pytest.approx(sorted_along, rel=0.05)
    assert torch.equal(
        windows(torch.arange(6.0), 3, (2, 2)), torch.tensor([[[0.0, 1], [2, 3]]]) + torch.arange(3.0).view(3, 1, 1)
    )


def test_shares_have_the_wanted_mean_and_ends():
    shares = shares_around(0.0039, 0.001, 0.0106, 64)
    assert [shares.mean(), shares.min(), shares.max()] == pytest.approx([0.0039, 0.001, 0.0106], rel=1e-6)


@pytest.mark.slow
def test_quality_goes_on_from_one_checkpoint_and_then_from_where_it_stopped(tmp_path, monkeypatch):
    write_city_block(tmp_path / "data", num_views=10, width=32, height=24, num_points=50)
    options = quality.Options(data_dir=tmp_path / "data", max_steps=2, seeds=1, out=tmp_path / "table")
    options.trainers, options.result_dir = ("gpu_only_compact",), tmp_path / "first"
    quality.main(options, ["--device", "cpu"])
    (checkpoint,) = tmp_path.glob("first/seed_42/*/ckpts/*.pt")

    options.trainers, options.result_dir = ("gpu_only_deferred", "gpu_only_compact"), tmp_path / "second"
    options.from_checkpoint, options.parallel, options.max_steps = checkpoint, 2, 3
    quality.main(options, ["--device", "cpu"])
    runs, (difference,) = (table["rows"] for table in written(tmp_path / "table")["tables"])
    assert [(row["trainer"], row["seed"], row["steps"], row["run"]) for row in runs] == [
        (name, 42, 5, "finished") for name in options.trainers
    ]
    assert runs[1]["PSNR, dB"] == pytest.approx(runs[0]["PSNR, dB"], abs=0.05)
    assert (difference["trainer"], difference["steps"], difference["pairs"]) == ("gpu_only_compact", 5, 1)

    options.seeds, options.variants = 1, ("plain", "white: --background white --sh_degree 2")
    options.result_dir, options.from_checkpoint, options.trainers = tmp_path / "third", None, ("gpu_only_compact",)
    quality.main(options, ["--device", "cpu"])
    rows = written(tmp_path / "table")["tables"][0]["rows"]
    assert [row["trainer"] for row in rows] == ["gpu_only_compact, plain", "gpu_only_compact, white"]
    assert "background: white" in (tmp_path / "third/seed_42/white/gpu_only_compact/cfg.yml").read_text()

    options.result_dir, options.from_checkpoint = tmp_path / "second", checkpoint
    options.variants, options.trainers = ("",), ("gpu_only_deferred", "gpu_only_compact")
    monkeypatch.setattr(quality, "launch", None)
    quality.main(options, ["--device", "cpu"])
    assert [row["run"] for row in written(tmp_path / "table")["tables"][0]["rows"]] == ["finished"] * 2


def test_quality_shows_what_is_done_when_its_time_is_over(tmp_path, monkeypatch):
    """Runs that are told to end are those that run; none begins after them."""
    write_city_block(tmp_path / "data", num_views=4, width=32, height=24, num_points=50)
    parallel, told = 3, threading.Event()
    begun = threading.Barrier(parallel + 1)

    def wait_for_the_end(wanted, interruption, show):
        begun.wait(HANGS_AFTER)
        assert told.wait(HANGS_AFTER)
        return Launch("", INTERRUPTED, "Interrupted after 1 steps.", 0, "", {})

    def request(interruption, number):
        begun.wait(HANGS_AFTER)  # until as many run as may
        interruption.requested = True
        told.set()

    monkeypatch.setattr(quality, "launch", wait_for_the_end)
    monkeypatch.setattr(Interruption, "request", request)
    options = quality.Options(
        data_dir=tmp_path / "data", seeds=2, parallel=parallel, limit_minutes=1e-4, out=tmp_path / "table"
    )
    options.result_dir = tmp_path / "runs"
    quality.main(options)
    rows = written(tmp_path / "table")["tables"][0]["rows"]
    assert [row["run"] for row in rows] == ["interrupted. Interrupted after 1 steps."] * 3 + ["not begun"]
    assert not any(row["steps"] for row in rows)


def test_pairs_have_seen_as_many_pictures(tmp_path, monkeypatch):
    def evaluated(wanted, interruption, show):
        """Write what a model is worth: 20 dB, and one more for each view in a step."""
        cfg = wanted.cfg.with_scaled_steps()
        path = wanted.folder / "stats" / f"val_step{cfg.max_steps}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"num_GS": 7, "images": [{"name": "a", "psnr": 20.0 + cfg.batch_size}]}))
        return Launch("", FINISHED, "", 0, "", {})

    monkeypatch.setattr(quality, "launch", evaluated)
    options = quality.Options(data_dir=tmp_path, max_steps=12, seeds=2, out=tmp_path / "table")
    options.trainers, options.result_dir = ("streamed",), tmp_path / "runs"
    options.variants = ("one", "two: --batch_size 2 --steps_scaler 0.5", "more: --batch_size 2")
    quality.main(options)
    runs, differences = (table["rows"] for table in written(tmp_path / "table")["tables"])
    assert [(row["trainer"], row["steps"], row["PSNR, dB"]) for row in runs] == 2 * [
        ("streamed, one", 12, 21.0), ("streamed, two", 6, 22.0), ("streamed, more", 12, 22.0)
    ]  # fmt: skip
    assert [(row["trainer"], row["steps"], row["pairs"], row["PSNR, dB"]) for row in differences] == [
        ("streamed, two", 6, 2, "+1.000 ± 0.000 ± -")
    ]


@pytest.mark.parametrize("of_all", [False, True])
def test_figures_with_corrected_colours_are_compared_where_runs_have_them(tmp_path, monkeypatch, of_all):
    def evaluated(wanted, interruption, show):
        of_run = {"psnr": 20.0, "ssim": 0.5, "lpips": 0.25}
        if wanted.cfg.exposure != "none" or wanted.cfg.color_correct:
            of_run |= {"cc_psnr": 24.0 + wanted.cfg.seed - 42, "cc_ssim": 0.75, "cc_lpips": 0.125}
        path = wanted.folder / "stats/val_step12.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"num_GS": 7, "images": [{"name": "a", **of_run}]}))
        return Launch("", FINISHED, "", 0, "", {})

    monkeypatch.setattr(quality, "launch", evaluated)
    options = quality.Options(data_dir=tmp_path, max_steps=12, seeds=2, out=tmp_path / "table")
    options.trainers, options.result_dir = ("streamed",), tmp_path / "runs"
    options.variants = ("affine: --exposure affine", "grid: --exposure bilateral_grid", "none")
    quality.main(options, ["--color_correct"] if of_all else [])
    runs, differences = (table["rows"] for table in written(tmp_path / "table")["tables"])
    corrected = "PSNR, dB, corrected colours"
    psnr = [row[corrected] for row in runs]
    assert psnr == [24.0, 24.0, 24.0 if of_all else None, 25.0, 25.0, 25.0 if of_all else None]
    assert {row["LPIPS, corrected colours"] for row in runs} == ({0.125} if of_all else {0.125, None})
    assert [row[corrected] for row in differences] == ["+0.000 ± 0.000 ± -", "+0.000 ± 0.000 ± -" if of_all else None]
    assert [row["PSNR, dB"] for row in differences] == 2 * ["+0.000 ± 0.000 ± -"]


@pytest.mark.slow
def test_the_chart_of_quality_by_number_has_the_means_of_finished_runs(tmp_path, monkeypatch, capsys):
    make = SimpleNamespace(**runpy.run_path(str(Path(trainers.__file__).parent / "docs/images/make.py")))
    head = ("trainer", "seed", "steps", "PSNR, dB", "SSIM", "LPIPS", "Gaussians", "device GB", "run")
    cells = [
        ("gpu_only_deferred, 2M", 42, 9, 21.0, 0.5, 0.25, 2_000_000, 3 * 10**9, "finished"),
        ("gpu_only_deferred, 1M", 42, 4, 10.0, 0.1, 0.75, 500_000, 10**9, "finished"),
        ("gpu_only_deferred, 1M", 42, 9, 20.0, 0.5, 0.25, 1_000_000, 2 * 10**9, "finished"),
        ("gpu_only_deferred, 1M", 43, 9, 20.5, 0.7, 0.35, 1_000_000, 2 * 10**9, "finished"),
        ("streamed_compact, 1M", 42, 9, 20.25, 0.625, None, 1_000_000, 10**9, "finished"),
        ("streamed_compact, 2M", 42, 9, 99.0, 1.0, 0.0, 2_000_000, None, "interrupted"),
    ]
    rows = [dict(zip(head, row, strict=True)) for row in cells]
    (tmp_path / "a.json").write_text(json.dumps({"tables": [{"rows": rows}]}))
    of_module = make.draw_quality.__globals__
    monkeypatch.setitem(of_module, "QUALITY", dict.fromkeys(("bonsai", "seneca"), tmp_path / "a.json"))
    monkeypatch.setitem(of_module, "FOLDER", tmp_path)
    make.draw_quality()
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert capsys.readouterr().out.splitlines()[2:5] == [
        "| bonsai | gpu_only_deferred | 1,000,000 | 20.25 | 0.6000 | 0.3000 | 2.00 |",
        "| bonsai | gpu_only_deferred | 2,000,000 | 21.00 | 0.5000 | 0.2500 | 3.00 |",
        "| bonsai | streamed_compact | 1,000,000 | 20.25 | 0.6250 | nan | 1.00 |",
    ]


def test_differences_are_those_of_pairs():
    def evaluation(*psnr):
        return quality.Evaluation(1, None, {f"{index}.png": {"psnr": value} for index, value in enumerate(psnr)})

    pairs = [(evaluation(20.0, 30.0), evaluation(20.1, 30.3)), (evaluation(21.0, 32.0), evaluation(21.1, 32.1))]
    found = quality.Difference.of(pairs, "psnr")
    assert found.mean == pytest.approx(0.15)
    assert found.over_seeds == pytest.approx(0.05)  # of 0.2 and 0.1
    assert found.over_pictures == pytest.approx(0.05)  # of 0.1 and 0.2
    assert quality.signed(pairs, "psnr") == "+0.150 ± 0.050 ± 0.050"
    assert quality.signed(pairs[:1], "psnr") == "+0.200 ± - ± 0.100"
    assert quality.signed(pairs, "lpips") is None


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": 0},
        {"parallel": 0},
        {"trainers": ("none",)},
        {"limit_minutes": -1.0},
        {"variants": ("a", "a: --sky")},
        {"variants": (": --sky",)},
        {"variants": ("a: --max_steps 9",)},
        {"variants": ("a: --sh_degree 2 --max-steps=9",)},
        {"variants": ("a: --seed 3",)},
    ],
    ids=str,
)
def test_quality_refuses_what_cannot_be(options, tmp_path):
    with pytest.raises(InputError, match="--"):
        quality.main(
            quality.Options(**options, data_dir=tmp_path, result_dir=tmp_path / "runs", out=tmp_path / "table")
        )


def test_every_benchmark_is_listed_with_its_purpose():
    found = benchmarks()
    assert {"train_step", "bigcity", "scaling", "host_adam", "culling", "densify", "rasterizer_cpu", "losses"} <= set(
        found
    )
    assert "report" not in found
    assert all(purpose.endswith(".") for purpose in found.values())


def test_turns_are_timed_after_their_preparation():
    calls = []
    cases = {
        "a": Case(lambda: calls.append("a"), lambda: calls.append("prepare a")),
        "b": Case(lambda: calls.append("b")),
    }
    times = time_in_turns(cases, 2, warmup=1)
    assert calls == ["prepare a", "a", "b"] * 3
    assert times["a"].count == 2
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(2.0, pytest.approx(1.2), pytest.approx(2.8), 3)


def test_cells():
    assert [number(value) for value in (1234.5, 12.34, 1.234, 0.01234, 0)] == ["1234", "12.3", "1.23", "0.012", "0"]
    assert spread(Spread(10.0, 9.0, 12.5, 5)) == "10.0 (9.00, 12.5)"


def test_files_are_named_after_benchmark_and_machine(tmp_path, monkeypatch):
    found = {**describe_machine(), "gpu": None, "processor": "Intel(R) Xeon(R) CPU E5 @ 2.20GHz", "threads": 8}
    assert short_name(found) == "xeon_e5_8_threads"
    assert short_name({**found, "gpu": "NVIDIA H200"}) == "h200"
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path)
    report = Report("train_step", "Purpose", train_step.Options(quick=True), variant="24GB")
    report.machine = {**found, "gpu": "NVIDIA H200", "device_memory_bytes": 150e9}
    report.write()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"train_step_24GB_h200_quick.{suffix}" for suffix in ("md", "json")
    }


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (culling, {"num_gaussians": 20_000, "views": 2, "torch_views": 1}),
        pytest.param(dataset_loading, {"views": 4, "width": 64, "repeats": 1}, marks=pytest.mark.slow),
        (densify, {"gaussians": 5000, "repeats": 1}),
        (gsplat_agreement, {"quick": True}),
        (host_adam, {"num_gaussians": 20_000, "repeats": 2}),
        (host_adam, {"num_gaussians": 20_000, "repeats": 2, "state": "compact"}),
        pytest.param(losses, {"repeats": 1, "quick": True}, marks=pytest.mark.slow),
        (rasterizer_cpu, {"gaussians": 500, "width": 48, "height": 32, "repeats": 1, "torch_repeats": 1}),
        (transfer, {"num_gaussians": 20_000, "repeats": 2}),
        (viewer, {"num_gaussians": (2000,), "frames": 2, "picture_scale": 0.05}),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "__name__") else "",
)
def test_benchmark_writes_its_table(tmp_path, monkeypatch, module, options):
    small = functools.partial(timing.copy_bandwidth, num_bytes=2**20)
    if hasattr(module, "copy_bandwidth"):
        monkeypatch.setattr(module, "copy_bandwidth", lambda device=timing.CPU, num_bytes=0: small(device))
    monkeypatch.setattr(host_adam, "COPIED_ROWS", 2000)
    module.main(module.Options(**options, out=tmp_path / "table"))
    tables = written(tmp_path / "table")["tables"]
    for row in (row for table in tables for row in table["rows"]):
        for name, cell in row.items():
            values = cell.values() if isinstance(cell, dict) else [cell]
            assert all(value >= 0 for value in values if isinstance(value, int | float)), (name, cell)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "default", "pose_opt": True, "depth_loss": True},
        {"strategy": "mcmc", "exposure": "bilateral_grid"},
        {"strategy": "mcmc", "regularized": "drawn"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_yardstick_trains_by_gsplats_parts(tmp_path, city_block, options):
    yardstick.main(
        yardstick.Options(quick=True, data_dir=str(city_block), result_dir=tmp_path, eval_steps=(1,), **options)
    )
    before, after = (json.loads((tmp_path / f"stats/val_step{step}.json").read_text()) for step in (1, 60))
    assert after["psnr"] > before["psnr"] + 1
    assert after["num_GS"] > before["num_GS"]


@pytest.mark.parametrize("options", [{}, {"ckpt": "a.pt"}], ids=str)
def test_agreement_needs_a_trained_model(options):
    with pytest.raises(InputError, match="--ckpt"):
        gsplat_agreement.main(gsplat_agreement.Options(**options))


def test_rows_in_runs_and_at_random():
    for kind, choose in KINDS.items():
        ids = choose(100_000, 0.08, np.random.default_rng(0))
        assert len(ids) == pytest.approx(8000, rel=0.2)
        assert bool((ids.diff() > 0).all())
        assert ids[-1] < 100_000
        runs = int((ids.diff() != 1).sum()) + 1
        assert (len(ids) / runs > 20) == (kind == "Morton runs")


@pytest.mark.cuda
def test_kernels_read_and_write_pinned_rows():
    from benchmarks import row_access

    rows = torch.rand(100, 48).pin_memory()
    before, ids = rows.clone(), torch.randperm(100)[:37]
    out = torch.zeros(37, 48, device="cuda")
    row_access.gather(rows, ids.cuda(), out)
    assert torch.equal(out.cpu(), before[ids])
    row_access.scatter(out + 1, ids.cuda(), rows)
    torch.cuda.synchronize()
    before[ids] += 1
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("NVIDIA H200, 143771, 570.86.15", ("NVIDIA H200", 143771 * 2**20, "570.86.15")),
        ("", ("Some GPU", 5, None)),
        ("NVIDIA H200, [N/A], 570.86.15", ("Some GPU", 5, None)),
    ],
)
def test_the_gpu_is_described_without_a_context_where_that_is_possible(monkeypatch, printed, expected):
    asked = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr(machine, "_output", lambda *command: asked.append(command) or printed)
    properties = SimpleNamespace(name="Some GPU", total_memory=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert tuple(machine.describe_gpu().values()) == expected
    assert asked[0][:3] == ("nvidia-smi", "-i", "3")
