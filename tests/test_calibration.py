"""What calibration predicts, against steps measured on the same machine, and where its verdict is kept and shown."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import simple_trainer
import simple_trainer_hybrid_optimized
import simple_trainer_hybrid_streamed
from benchmarks import calibrate
from datasets.synthetic import write_city_block
from errors import InputError
from offload.adam import rows as row_kernels
from offload.adam.host import DeferredAdam
from training import calibration, command_line
from training.calibration import DECISIVE, Speeds, predict, print_last_verdict, save_verdict, verdict

# NVIDIA H200, 2026-11-21. Speeds: benchmarks/results/streamed_rows_h200.md (64 blocks of 8 warps, 1024 vectors, as the
# trainer had it), and for the host the large copies of benchmarks.train_step on that day, 86 GB/s.
H200 = Speeds(host=86e9, copies=55.5e9, copies_both_ways=101e9, rows_both_ways=64.8e9)
# benchmarks.train_step on the same day: Gaussians, visible share, and ms per step of both trainers.
MEASURED = [(4_000_000, 0.0759, 9.28, 8.55), (18_000_000, 0.0750, 30.4, 30.7)]
FAST_CPU = Speeds(host=500e9, copies=12e9, copies_both_ways=20e9, rows_both_ways=15e9)
SLOW_CPU = Speeds(host=20e9, copies=55e9, copies_both_ways=101e9, rows_both_ways=65e9)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def _on_some_gpu(monkeypatch):
    monkeypatch.setattr(calibration, "machine_name", lambda device: "some GPU in some host")


def test_predictions_are_near_measured_steps():
    """At 18 million Gaussians, where transfers are most of a step; at 4 million the rest weighs more."""
    (_, _, *small), (num_gaussians, visible, streamed, optimized) = MEASURED
    found = predict(H200, visible * num_gaussians)
    assert 0.75 * streamed < found.streamed <= streamed
    assert found.optimized == pytest.approx(optimized, rel=0.15)
    found = predict(H200, MEASURED[0][0] * MEASURED[0][1])
    assert 0.5 * small[0] < found.streamed <= small[0]
    assert 0.75 * small[1] < found.optimized <= small[1]


@pytest.mark.parametrize(("num_gaussians", "visible", "streamed", "optimized"), MEASURED)
def test_no_winner_is_named_that_was_not_measured(num_gaussians, visible, streamed, optimized):
    found = predict(H200, visible * num_gaussians)
    error = (found.optimized / found.streamed) / (optimized / streamed)
    assert 1 / DECISIVE < error < DECISIVE
    assert "too near" in verdict(H200, num_gaussians, visible)


def test_verdicts_say_by_how_much_and_why():
    text = verdict(FAST_CPU, 10_000_000, 0.1)
    assert "The optimized trainer will be faster, by up to 57.6 ms a step" in text  # 1152 MB / 15 - 384 MB / 20
    assert "0.38 GB over the link at 20 GB/s" in text
    text = verdict(SLOW_CPU, 10_000_000, 0.1)
    assert "The streamed trainer will be faster, by up to 87.9 ms a step" in text  # 2112 MB / 20 - 1152 MB / 65
    assert "2.11 GB through the host's memory at 20 GB/s" in text
    assert text.count("\n") == 0


def test_bytes_are_those_of_the_trainers():
    """Of 48 float32: forward reads 3 values and writes one, commit reads 4 and writes 3; streamed are 3 both ways."""
    assert (calibration.OPTIMIZED_HOST_BYTES, calibration.STREAMED_LINK_BYTES) == (11 * 48 * 4, 6 * 48 * 4)
    assert calibration.OPTIMIZED_LINK_BYTES == 2 * 48 * 4


def test_verdicts_of_several_machines_are_kept(monkeypatch, capsys):
    save_verdict("another GPU in another host", FAST_CPU, 1_000_000, 0.08)
    monkeypatch.setattr(calibration, "machine_name", lambda device: "some GPU in some host")
    print_last_verdict(torch.device("cuda"))
    assert capsys.readouterr().out == ""
    save_verdict("some GPU in some host", FAST_CPU, 1_000_000, 0.08)
    path = save_verdict("some GPU in some host", SLOW_CPU, 1_000_000, 0.08)
    print_last_verdict(torch.device("cuda"))
    assert capsys.readouterr().out.splitlines()[0].endswith(verdict(SLOW_CPU, 1_000_000, 0.08))
    kept = json.loads(path.read_text())
    assert set(kept) == {"another GPU in another host", "some GPU in some host"}
    assert kept["some GPU in some host"]["bytes_per_second"]["host"] == SLOW_CPU.host
    assert [file.name for file in path.parent.iterdir()] == ["calibration.json"]


@pytest.mark.usefixtures("_on_some_gpu")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"some GPU in some host": []}', '{"some GPU in some host": {}}'])
def test_a_damaged_file_is_no_verdict(capsys, content):
    path = calibration.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    print_last_verdict(torch.device("cuda"))
    assert capsys.readouterr().out == ""
    save_verdict("some GPU in some host", SLOW_CPU, 1_000_000, 0.08)
    print_last_verdict(torch.device("cuda"))
    assert "streamed trainer" in capsys.readouterr().out


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


@pytest.mark.usefixtures("_on_some_gpu")
def test_the_trainers_it_is_about_print_it(monkeypatch, tmp_path, capsys):
    save_verdict("some GPU in some host", SLOW_CPU, 1_000_000, 0.08)
    write_city_block(tmp_path / "data", num_views=4, width=32, height=24, num_points=50)
    for script in (simple_trainer, simple_trainer_hybrid_optimized, simple_trainer_hybrid_streamed):
        places = ("--data_dir", tmp_path / "data", "--result_dir", tmp_path / script.__name__)
        arguments = ["default", *map(str, places), "--device", "cpu", "--max_steps", "1"]
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        command_line.main(script.CONFIGS, script.train, "test")
        printed = capsys.readouterr().out
        assert printed.count(verdict(SLOW_CPU, 1_000_000, 0.08)) == (script is not simple_trainer)


@pytest.mark.cuda
def test_speeds_of_this_machine():
    """In any order of magnitude but an absurd one."""
    speeds = calibrate.measure(torch.device("cuda"), 1_000_000)
    assert 1e9 < speeds.host < 2e12
    assert 1e9 < speeds.copies <= 1.05 * speeds.copies_both_ways < 2e12
    assert 0.5e9 < speeds.rows_both_ways < 1.2 * speeds.copies_both_ways


@pytest.mark.cuda
def test_a_verdict_is_kept_and_printed(monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "MOST_ROWS", 1_000_000)
    calibrate.main(calibrate.Options())
    kept = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("Kept in "))
    assert kept == calibration.cache_file()
    print_last_verdict(torch.device("cuda"))
    assert "Calibrated on" in capsys.readouterr().out
