"""What modules and the depth loss are for: a synthetic city with trouble made on purpose, with and without them.

    python -m benchmarks.modules [--steps 2000] [--trainer simple_trainer_hybrid_optimized] [--quick]

Each line is a run of a script of its own, evaluated on views that have the same trouble; in "few photos" on those of
the flight that were not trained on, and in "poses that are off" on photos with true poses. "no trouble" is the same
city without it: no option can be expected to do better. Corrected colours are a rendering's, brought near its photo's
by a matrix.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.report import Report
from benchmarks.troubled_city import camtoworlds_of, pose_errors, write_city
from datasets.synthetic import View
from datasets.trajectory_file import read_key_poses
from errors import InputError, TrainingStopped
from trainers import trainer_of
from training.command_line import parse
from training.ending import FINISHED
from training.pose_files import FOLDER, JSON_FILE
from training.run import TrainingRun
from training.streams import silent_output


@dataclass
class Options(BenchmarkOptions):
    steps: int = 2000
    """Steps of each run."""
    size: tuple[int, int] = (160, 120)
    """Width and height of the photos, in pixels."""
    trainer: str = "simple_trainer"
    """Script that trains."""
    device: str = "auto"
    """Where it renders."""
    pictures: Path | None = None
    """Folder that receives, of each trouble, a photo and its renderings side by side."""


@dataclass(frozen=True)
class Trouble:
    """Say what is wrong with a city, and what helps."""

    name: str
    city: dict[str, object]  # of `write_city`
    runs: dict[str, tuple[str, ...]]  # by the words of the table, options
    common: tuple[str, ...] = field(default=())
    without: dict[str, object] | None = None  # of `write_city`, the same city without the trouble, if there is one


TROUBLES = [
    Trouble(
        "two flights in two lights",
        {"lights": "all"},
        {
            "without": (),
            "--exposure affine": ("--exposure", "affine"),
            "--exposure bilateral_grid": ("--exposure", "bilateral_grid"),
        },
        without={"lights": "held out"},  # on the same held-out photos
    ),
    Trouble(
        "poses that are off",
        {"poses": True},
        {
            "without": (),
            "--pose_opt": ("--pose_opt",),
            "--pose_opt --pose_opt_lr 2e-4": ("--pose_opt", "--pose_opt_lr", "2e-4"),
        },
        without={},
    ),
    Trouble(
        "a white sky",
        {"sky": 1.0},
        {
            "without": (),
            "--background white": ("--background", "white"),
            "--background sky": ("--background", "sky"),
        },
        without={"sky": 0.0},
    ),
    Trouble(
        "few photos",
        {"depths": True, "first": 12},
        {
            "without": (),
            "--depth_loss": ("--depth_loss",),
            "--depth_loss --depth_lambda 3": ("--depth_loss", "--depth_lambda", "3"),
        },
        ("--test_every", "-1", "--test_after", "11"),
    ),
]


def run_script(name: str, arguments: list[str]) -> None:
    """Run a script with these arguments in this process, without a word: 30 of them would each take seconds to start.

    Raises:
        InputError: It could not be run to its end.
        KeyboardInterrupt: It was stopped.
    """
    script = importlib.import_module(name)
    try:
        with silent_output(silent=True):
            scene, cfg = parse(script.CONFIGS, arguments, "")
            with TrainingRun(cfg, scene, trainer_of(name, cfg)) as training:
                script.train(training)
    except TrainingStopped as error:
        raise InputError(f"{name}.py {' '.join(arguments)} ended with: {error}") from error
    if training.ending.status != FINISHED:
        raise KeyboardInterrupt


def train(options: Options, data_dir: Path, result_dir: Path, arguments: tuple[str, ...]) -> dict[str, float]:
    """Train and evaluate; returns the means over the held-out views, with and without corrected colours."""
    command = [
        *("default", "--data_dir", str(data_dir), "--device", options.device),
        *("--max_steps", str(options.steps), "--eval_steps", str(options.steps)),
        *("--sh_degree_interval", str(options.steps // 4), "--refine_start_iter", str(options.steps // 5)),
        *("--refine_stop_iter", str(options.steps * 3 // 4), "--max_gaussians", "20000", "--save_every", "0"),
        *arguments,
    ]
    checkpoint = result_dir / "ckpts" / f"ckpt_{options.steps}.pt"
    # Evaluated once more, since a run without exposures does not correct colours.
    corrected = ("--result_dir", str(result_dir) + "_corrected", "--ckpt", str(checkpoint))
    for more in (("--result_dir", str(result_dir)), (*corrected, "--exposure", "affine")):
        run_script(options.trainer, [*command, *more])
    return json.loads(Path(f"{result_dir}_corrected", "stats", f"val_step{options.steps}.json").read_text())


def runs_of(trouble: Trouble) -> Iterator[tuple[str, dict[str, object], tuple[str, ...]]]:
    """Yield the words of the table, the city and the options of each run; the one without trouble comes first."""
    if trouble.without is not None:
        yield "no trouble", trouble.without, ()
    for words, arguments in trouble.runs.items():
        yield words, trouble.city, arguments


def errors_of_poses(result_dir: Path, views: list[View]) -> tuple[float, float]:
    """Return by how much the training photos' cameras of a run are turned and moved; as `pose_errors`."""
    found = read_key_poses(result_dir / FOLDER / JSON_FILE)
    trained = np.flatnonzero(np.arange(len(views)) % 8)
    return pose_errors(found[trained], camtoworlds_of(views)[trained])


def main(options: Options) -> None:
    if options.quick:
        options.steps, options.size = 40, (48, 36)
    report = Report("modules", "Trouble of real captures, and what helps", options)
    (width, height), points = options.size, 300 if options.quick else 3000
    report.say(f"{options.steps} steps of {options.trainer}.py, photos of {width}x{height}, {points} points.")
    table = report.table(
        "On held-out views:",
        {
            "trouble": str,
            "options": str,
            "PSNR, dB": "{:.2f}".format,
            "PSNR, colours corrected": "{:.2f}".format,
            "SSIM": "{:.3f}".format,
            "cameras turned, degrees": "{:.3f}".format,
            "cameras moved, m": "{:.3f}".format,
        },
    )
    with tempfile.TemporaryDirectory() as workspace:
        for number, trouble in enumerate(TROUBLES):
            strips = []
            for index, (words, city, arguments) in enumerate(runs_of(trouble)):
                data_dir = Path(workspace) / f"{number}_{'no_trouble' if city == trouble.without else 'trouble'}"
                if not data_dir.exists():
                    views = write_city(data_dir, num_views=36, width=width, height=height, num_points=points, **city)
                result_dir = Path(workspace) / f"{number}_{index}"
                found = train(options, data_dir, result_dir, (*trouble.common, *arguments))
                errors = errors_of_poses(result_dir, views) if "--pose_opt" in arguments else (None, None)
                table.add(trouble.name, words, found["psnr"], found["cc_psnr"], found["ssim"], *errors)
                if city == trouble.without:
                    continue
                strips.append(cv2.imread(str(sorted((result_dir / "renders").rglob("*.png"))[2])))
            if options.pictures is not None:
                options.pictures.mkdir(parents=True, exist_ok=True)
                photo = strips[0][:, :width]
                strip = np.hstack([photo, *(strip[:, width:] for strip in strips)])
                cv2.imwrite(str(options.pictures / f"{trouble.name.replace(' ', '_')}.png"), strip)
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
