"""report.html and the last lines of a run: what was trained, how well, how it ended, and where everything is."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import simple_trainer
from training import command_line, reporting
from training.report import MOST_VIEWS, findings
from training.reporting import TensorBoardLog
from training.results import MOST_LOGGED, remove_run

pytestmark = [pytest.mark.charts, pytest.mark.slow]  # charts take longer to draw than a small run


def train(monkeypatch, data_dir: Path, result_dir: Path, *options: object) -> None:
    arguments = ("--data_dir", data_dir, "--result_dir", result_dir, "--device", "cpu", *options)
    monkeypatch.setattr(sys, "argv", ["simple_trainer.py", "default", *map(str, arguments)])
    command_line.main(simple_trainer.CONFIGS, simple_trainer.train, "test")


def at_step(monkeypatch, step: int, do) -> None:
    """Have something done after a step."""
    after_step = TensorBoardLog.after_step

    def watched(self, run, steps_done, loss):
        after_step(self, run, steps_done, loss)
        if steps_done == step:
            do(run)

    monkeypatch.setattr(TensorBoardLog, "after_step", watched)


def text_of(page: str) -> str:
    """What a browser shows of a page, on one line."""
    return " ".join(
        html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL))).split()
    )


@pytest.fixture(scope="module")
def finished(city_block, tmp_path_factory):
    """The folder of a run with a name that is none for HTML, and what it printed."""
    folder = tmp_path_factory.mktemp("results") / "<i>run & co"
    with pytest.MonkeyPatch.context() as monkeypatch:
        pages = []
        at_step(monkeypatch, 8, lambda run: pages.append((run.results.path / "report.html").read_text()))
        options = ("--max_steps", 9, "--eval_steps", 4, "--log_every", 2, "--init_scale", 1.5)
        train(monkeypatch, city_block, folder, *options)
    return folder, pages[0]


def test_a_page_needs_nothing_from_outside_and_names_are_escaped(finished):
    page = (finished[0] / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"#]*)', page)
    outside = [source for source in sources if not source.startswith("data:image/webp;base64,")]
    assert all((finished[0] / name).exists() for name in outside if name), outside
    assert "<i>run" not in page
    assert "<script" not in page
    assert "&lt;i&gt;run &amp; co" in page


def test_a_page_tells_of_the_run(finished):
    folder, while_training = finished
    page = (folder / "report.html").read_text()
    shown = text_of(page)
    assert "finished, 9 of 9 steps" in shown
    assert "Figures after 9 steps" in shown
    assert len(re.findall(r'role="img"', page)) == 5  # loss, PSNR, Gaussians, host memory; the stages of a step
    pictures = len(list((folder / "renders").glob("val_step9_*.png")))
    assert page.count("<img ") == 2 * min(pictures, MOST_VIEWS)
    assert "16 photos" in shown, "what was used of the input"
    assert re.search(r"init_scale 1\.5 1\.0", shown)
    assert "sh_degree_interval" not in shown  # as its default
    assert f"python simple_trainer.py default --data_dir {folder}"[:40] in shown
    assert "--resume" in shown
    assert "--ckpt" in shown
    assert f"cd {Path.cwd()} # train it anew" in shown
    assert re.search(r"python view\.py \S.*ckpt_9\.pt", shown)
    assert re.search(r"python export\.py .*ckpt_9\.pt'? --to .*model\.sog", shown)
    assert "in training, 4 of 9 steps" in text_of(while_training)
    assert "Figures after 4 steps" in text_of(while_training)


def test_tensorboard_shows_pictures(finished):
    log = EventAccumulator(str(finished[0] / "tb"), size_guidance={"images": 0}).Reload()
    tags = log.Tags()["images"]
    assert 1 <= len(tags) <= MOST_LOGGED
    assert [event.step for event in log.Images(tags[0])] == [4, 9]


def test_the_last_lines_say_where_everything_is(monkeypatch, city_block, tmp_path, capsys):
    postfixes = []
    set_postfix = reporting.tqdm.set_postfix
    monkeypatch.setattr(
        reporting.tqdm, "set_postfix", lambda bar, **values: (postfixes.append(values), set_postfix(bar, **values))
    )
    train(monkeypatch, city_block, tmp_path, "--max_steps", 2, "--video", "--video_seconds", 0.1, "--timelapse", 1)
    last = capsys.readouterr().out.strip().splitlines()[-5:]
    assert [line.split(":")[0] for line in last] == ["Model", "Pictures", "Video", "Timelapse", "Report"]
    for line in last:
        assert Path(line.split(":", 1)[1].split("  (")[0].strip()).exists(), line
    assert all(re.fullmatch(r"[\d.]+ [MG]iB", values["mem"]) for values in postfixes), "host memory, and not 0 B"
    assert "of step" not in "".join(last)
    assert "up to step" not in "".join(last)

    train(monkeypatch, city_block, tmp_path, "--max_steps", 3, "--resume")
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"Video: {tmp_path}/videos/flight_2.mp4 (of step 2)" in said
    assert f"Timelapse: {tmp_path}/videos/timelapse.mp4 (of the training, up to step 2)" in said
    assert any(line.startswith("Model:") and "point_cloud_3" in line and "step" not in line for line in said)


def test_a_timelapse_is_of_the_frames_that_were_there_when_it_was_made(tmp_path):
    (tmp_path / "videos/timelapse").mkdir(parents=True)
    files = ("timelapse/step_000000001.jpg", "timelapse/step_000000004.jpg", "timelapse.mp4")
    for name, seconds in zip(files, (1, 3, 2), strict=True):
        (tmp_path / "videos" / name).touch()
        os.utime(tmp_path / "videos" / name, (seconds, seconds))
    assert findings(tmp_path, 4, "black") == [
        ("Timelapse", tmp_path / "videos/timelapse.mp4", "of the training, up to step 1")
    ]


def test_a_run_that_was_stopped_has_a_page_too(monkeypatch, city_block, tmp_path, capsys):
    at_step(monkeypatch, 3, lambda run: os.kill(os.getpid(), signal.SIGINT))
    train(monkeypatch, city_block, tmp_path, "--max_steps", 9, "--log_every", 1)
    page = (tmp_path / "report.html").read_text()
    assert "interrupted, 3 of 9 steps" in text_of(page)
    assert "Interrupted after 3 steps; saved" in text_of(page)
    assert "Report:" in capsys.readouterr().out


def test_a_run_that_failed_says_why(monkeypatch, city_block, tmp_path):
    def fail(run):
        raise ValueError("no <more>")

    at_step(monkeypatch, 3, fail)
    with pytest.raises(SystemExit, match="1"):
        train(monkeypatch, city_block, tmp_path, "--max_steps", 9)
    page = (tmp_path / "report.html").read_text()
    assert "failed, 3 of 9 steps" in text_of(page)
    assert 'class="problem"' in page


def test_an_evaluated_checkpoint_has_a_page(monkeypatch, finished, city_block, tmp_path):
    train(monkeypatch, city_block, tmp_path, "--ckpt", finished[0] / "ckpts/ckpt_9.pt")
    shown = text_of((tmp_path / "report.html").read_text())
    assert "evaluated" in shown
    assert "PSNR" in shown


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_colours_are_corrected_where_that_is_asked_for(monkeypatch, city_block, tmp_path):
    train(monkeypatch, city_block, tmp_path, "--max_steps", 1)
    train(monkeypatch, city_block, tmp_path, "--ckpt", tmp_path / "ckpts/ckpt_1.pt", "--color_correct")
    plain, corrected = (
        json.loads((folder / "stats/val_step1.json").read_text()) for folder in (tmp_path, tmp_path / "evaluated")
    )
    assert "cc_psnr" not in plain
    assert corrected["psnr"] == pytest.approx(plain["psnr"], rel=1e-6)
    assert corrected["cc_psnr"] > plain["psnr"]  # of a model that has seen one picture


def test_an_evaluation_leaves_what_the_training_has_written(monkeypatch, city_block, tmp_path, capsys):
    """Also what it says of colours and poses, which the command of the evaluation does not name."""
    corrected = ("--exposure", "affine", "--pose_opt")
    train(monkeypatch, city_block, tmp_path, "--max_steps", 4, "--save_steps", 2, *corrected)
    page = text_of((tmp_path / "report.html").read_text())
    for words in ("PSNR, corrected colours", "poses turned, largest", "Poses poses cameras of step 4, corrected"):
        assert words in page
    before = contents(tmp_path)
    for steps in (4, 2):
        capsys.readouterr()
        train(monkeypatch, city_block, tmp_path, "--ckpt", tmp_path / f"ckpts/ckpt_{steps}.pt")
        assert f"{tmp_path}/evaluated/report.html" in capsys.readouterr().out
        shown = text_of((tmp_path / "evaluated/report.html").read_text())
        assert f"Figures after {steps} steps" in shown
        assert "PSNR, corrected colours" in shown
    of_training, again = (
        json.loads((folder / "stats/val_step4.json").read_text()) for folder in (tmp_path, tmp_path / "evaluated")
    )
    assert again["cc_psnr"] == pytest.approx(of_training["cc_psnr"], rel=1e-6)
    after = contents(tmp_path)
    assert all(after[path] == content for path, content in before.items())
    assert all("evaluated" in path.parts for path in after.keys() - before.keys())

    train(monkeypatch, city_block, tmp_path, "--max_steps", 5, "--resume", "--exposure", "affine")
    said = capsys.readouterr().out
    assert f"Warning: {tmp_path}/poses holds the cameras of step 4, which --pose_opt corrected: it stays" in said
    assert "cameras of step 4" in said.splitlines()[-2]
    assert "poses turned" not in text_of((tmp_path / "report.html").read_text())
    remove_run(tmp_path)  # as --force does
    assert {path.name for path in (tmp_path / "evaluated").rglob("*") if path.is_file()} <= {".lock"}
    assert not list((tmp_path / "poses").iterdir())


@pytest.mark.slow
def test_damaged_statistics_and_pictures_cost_their_part_of_the_page_alone(
    monkeypatch, finished, city_block, tmp_path, capsys
):
    train(monkeypatch, city_block, tmp_path, "--max_steps", 2)
    picture = tmp_path / "renders/val_step2_0000.png"
    picture.write_bytes(picture.read_bytes()[:100])
    (tmp_path / "stats/train_step2.json").write_text("{")
    train(monkeypatch, city_block, tmp_path, "--max_steps", 2, "--resume")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img ") == 2  # one of two views
