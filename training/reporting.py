"""Who watches a run: observers that are told of every step, and show or write something of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from configs import Config
from datasets.free_memory import spared_bytes
from datasets.loader import Batch, evaluation_loader
from distributed.together import taken_in_turn
from errors import counted, format_bytes
from training.evaluation import evaluate, load_lpips, synchronize
from training.measured import OF_VIEWS
from training.memory import allocated_bytes, peak_bytes
from training.per_step import PerStep
from training.pose_files import pose_figures
from training.report import write_report
from training.schedules import is_due
from training.video import VideoLeft, record_video, video_file
from training.views import View

if TYPE_CHECKING:
    from training.run import TrainingRun

LOOKED_AT = 10  # steps; reading the loss waits for the device, so not at every step


def is_looked_at(steps_done: int, max_steps: int) -> bool:
    """Tell whether the loss of a step is read: of one in `LOOKED_AT`, and of the last.

    Args:
        steps_done: Steps that are done with it, from 1.
        max_steps: Steps of the run.
    """
    return (steps_done - 1) % LOOKED_AT == 0 or steps_done == max_steps


class Observer(Protocol):
    """Watch a run; a viewer would be one more."""

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Show or write what is due after a step.

        Args:
            run: The run, whose model has taken the step.
            steps_done: Steps so far, this one included.
            loss: Scalar on the device, detached.
        """


class Result(Observer, Protocol):
    """Write something that belongs to certain steps, and to the end of every run."""

    def make_missing(self, run: TrainingRun, steps: int) -> None:
        """Write what is due after the newest step and is not there, since the run was killed before it came to that.

        Args:
            run: The run, resumed after that step, and before another one.
            steps: How many it has done.
        """


class ProgressBar:
    """Show how far training is."""

    def __init__(self, bar: tqdm) -> None:
        """
        Args:
            bar: Counts steps.
        """
        self._bar = bar

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Count the step; now and then show the loss, the size of the model and the peak of the device's memory."""
        self._bar.update()
        if is_looked_at(steps_done, run.cfg.max_steps):
            device = "device_allocated" if run.device.type == "cuda" else "host"
            self._bar.set_postfix(
                loss=f"{loss.item():.4f}",
                GS=f"{run.num_gaussians:,}" + _towards(run, steps_done),
                sh=run.sh_degree,
                mem=format_bytes(peak_bytes(run.device)[device]),
            )


def _towards(run: TrainingRun, steps_done: int) -> str:
    """Return how many Gaussians growth is heading for, as the bar shows it; nothing where nothing says."""
    heading = run.strategy and run.strategy.heading(steps_done - 1, run.num_gaussians)
    return f" to {heading:,}" if heading else ""


class Counted:
    """Read the counters of a model, as means per step since this reader asked last."""

    def __init__(self) -> None:
        self._milliseconds = PerStep()
        self._traffic = PerStep()

    def since_last(self, run: TrainingRun) -> dict[str, Any]:
        """Return what the model counts; what it does not is missing.

        Returns:
            `staging_allocations` so far, constant in the steady state; `offload_ms`, what a step does beside its
            stages, which overlaps with them and with itself; and `per_step`, the rows and bytes that a step moves.
        """
        counters, steps = run.model.counters(), run.steps_of_this_run
        counted: dict[str, Any] = {}
        if counters.staging_allocations is not None:
            counted["staging_allocations"] = counters.staging_allocations
        # Readers are told of steps without figures too: those of rows that move to the host count from there on.
        milliseconds = self._milliseconds.means("", steps, counters.milliseconds or {})
        per_step = self._traffic.means("", steps, counters.traffic or {})
        if counters.milliseconds is not None:
            counted["offload_ms"] = milliseconds
        if counters.traffic is not None:
            counted["per_step"] = per_step
        return counted


class TensorBoardLog:
    """Write scalars to tb/ every `log_every` steps."""

    def __init__(self) -> None:
        self._counted = Counted()

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Write an entry where it is due."""
        if steps_done % run.cfg.log_every == 0:
            with run.results.missed_if_unwritable("The log", was_asked_for=False):
                for tag, value in self._scalars(run, loss):
                    run.results.log.add_scalar(tag, value, steps_done)

    def _scalars(self, run: TrainingRun, loss: Tensor) -> Iterator[tuple[str, float]]:
        yield "train/loss", loss.item()
        yield "train/num_GS", run.num_gaussians
        yield "train/elapsed_seconds", run.saving.elapsed_seconds
        for kind, num_bytes in peak_bytes(run.device).items():
            yield f"memory/{kind}_GiB", num_bytes / 2**30
        yield "memory/device_allocated_now_GiB", allocated_bytes(run.device) / 2**30
        counted = self._counted.since_last(run)
        if "staging_allocations" in counted:
            yield "memory/staging_allocations", counted.pop("staging_allocations")
        for kind, values in {"stages_ms": run.times.mean_milliseconds("log"), **counted}.items():
            for name, value in values.items():
                yield f"{kind}/{name}", value


class TrainStatistics:
    """Write stats/train_step{N}.json after the steps of `save_steps` and the last."""

    def __init__(self) -> None:
        self._counted = Counted()

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Write the file where it is due."""
        if is_due(run.cfg, steps_done, run.cfg.save_steps):
            statistics = self._statistics(run)
            if run.speaks:
                with run.results.missed_if_unwritable(f"The statistics of step {steps_done}"):
                    run.results.save_statistics("train", steps_done, statistics)

    def make_missing(self, run: TrainingRun, steps: int) -> None:
        """Write what is still known of the training."""
        if not is_due(run.cfg, steps, run.cfg.save_steps):
            return
        if not run.results.has(f"stats/train_step{steps}.json") and run.speaks:
            seconds = run.saving.elapsed_seconds
            known = {
                "num_GS": run.num_gaussians,
                "elapsed_seconds": seconds,
                "steps_per_second": steps / seconds,
                **_of_poses(run),
            }
            with run.results.missed_if_unwritable(f"The statistics of step {steps}"):
                run.results.save_statistics("train", steps, known)

    def _statistics(self, run: TrainingRun) -> dict[str, object]:
        synchronize(run.device)
        seconds, peaks = run.saving.elapsed_seconds, peak_bytes(run.device)
        of_ranks = {}
        if run.ranks is not None:
            of_ranks = {"ranks": run.ranks.gather({"num_GS": run.model.num_gaussians, "peak_bytes": peaks})}
        return {
            "num_GS": run.num_gaussians,
            "elapsed_seconds": seconds,
            "steps_per_second": run.model.steps_done / seconds,
            "peak_device_bytes_allocated": peaks["device_allocated"],
            "peak_device_bytes_reserved": peaks["device_reserved"],
            "peak_host_bytes": peaks["host"],
            "spared_host_bytes": spared_bytes(),
            "device_bytes_allocated": allocated_bytes(run.device),
            "longest_save_seconds": run.saving.longest_stall,
            "stages_ms": run.times.mean_milliseconds("statistics"),
            **self._counted.since_last(run),
            **_of_poses(run),
            **of_ranks,
        }


def _of_poses(run: TrainingRun) -> dict[str, float]:
    return pose_figures(run.scene, run.modules.corrected_poses(run.scene))


class Export:
    """Write ply/point_cloud_{N}.ply after the steps of `ply_steps` and the last."""

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Write the file where it is due."""
        if is_due(run.cfg, steps_done, run.cfg.ply_steps):
            self._write(run, steps_done)

    def make_missing(self, run: TrainingRun, steps: int) -> None:
        """Write the file where it is due and not there."""
        if is_due(run.cfg, steps, run.cfg.ply_steps) and not run.results.has(f"ply/point_cloud_{steps}.ply"):
            self._write(run, steps)

    def _write(self, run: TrainingRun, steps: int) -> None:
        with run.results.missed_if_unwritable(f"The PLY file of step {steps}"):
            run.results.save_ply(steps, run.model.rows, run.model.num_gaussians, run.scene.transform)


class Evaluation:
    """Compare renderings of the held-out views with their photos after the steps of `eval_steps` and the last.

    Attributes:
        standing: How far it is, as a sentence where it ends early.
    """

    def __init__(self, cfg: Config, device: torch.device) -> None:
        """
        Args:
            cfg: Names the network of LPIPS.
            device: Where views are rendered.
        """
        self._lpips = load_lpips(cfg.lpips_net, device)
        self.standing = "the evaluation has not begun"

    def after_step(self, run: TrainingRun, steps_done: int, loss: Tensor) -> None:
        """Evaluate where it is due; after the last step record the video, too, that --video asks for."""
        if is_due(run.cfg, steps_done, run.cfg.eval_steps):
            self.evaluate(run, steps_done)
        if is_due(run.cfg, steps_done, ()):
            self.record_video(run, steps_done)

    def make_missing(self, run: TrainingRun, steps: int) -> None:
        """Evaluate the model, and record the video, where that is due and has not been done."""
        if is_due(run.cfg, steps, run.cfg.eval_steps) and not run.results.has(f"stats/val_step{steps}.json"):
            self.evaluate(run, steps)
        if is_due(run.cfg, steps, ()) and not run.results.has(video_file(run.cfg, steps)):
            self.record_video(run, steps)

    def evaluate(self, run: TrainingRun, steps: int) -> None:
        """Print the means over the views, and write them to stats/ and with pictures to tb/, and the report anew.

        Args:
            run: Whose model is evaluated.
            steps: Training steps that the model has had.
        """
        with run.results.missed_if_unwritable(f"The evaluation of step {steps}"):
            self._evaluate(run, steps)
        self.standing = "the evaluation is complete, but not what was to come after it"
        write_report(run, None)

    def _views(
        self, run: TrainingRun, batches: Iterable[tuple[str | None, Batch]]
    ) -> Iterator[tuple[str | None, View]]:
        """Give views one after the other, and say how many are done, by all ranks."""
        num_views, placed = len(run.scene.test_ids), run.modules.held_out()
        for turn, (name, batch) in enumerate(batches):
            done = min(turn * run.num_ranks, num_views)
            self.standing = f"the evaluation is not complete ({done} of {counted(num_views, 'view')})"
            yield name, placed(View.from_batch(batch, run.cfg, run.device))

    def _evaluate(self, run: TrainingRun, steps: int) -> None:
        scene, results = run.scene, run.results
        own_ids, num_counted = taken_in_turn(scene.test_ids, run.ranks)
        names = [scene.image_names[own_id] if turn < num_counted else None for turn, own_id in enumerate(own_ids)]
        with evaluation_loader(scene, own_ids, num_workers=run.cfg.num_workers or None) as loader:
            found = evaluate(
                self._views(run, zip(names, loader, strict=True)),
                run.drawing.draw,
                self._lpips,
                lambda index, canvas: results.save_rendering(steps, index, canvas),
                run.device,
                color_correct=run.modules.corrects_colors,
                draw_with_depth=partial(run.drawing.draw, depth=True) if run.modules.aligns_poses else None,
                ranks=run.ranks,
            )
        if not run.speaks:
            return
        statistics: dict[str, Any] = {"num_GS": run.num_gaussians, **found}
        results.save_statistics("val", steps, statistics)
        for key in OF_VIEWS:
            if statistics.get(key) is not None:
                results.log.add_scalar(f"val/{key}", statistics[key], steps)
        results.log_renderings(steps, len(statistics["images"]))
        lpips = "missing" if statistics["lpips"] is None else f"{statistics['lpips']:.3f}"
        more = ("with corrected colours", "cc_psnr"), ("from aligned poses", "aligned_psnr")
        others = ", ".join(f"{statistics[key]:.2f} {words}" for words, key in more if key in statistics)
        corrected = f" ({others})" if others else ""
        tqdm.write(
            f"Step {steps}: PSNR {statistics['psnr']:.2f} dB{corrected}, SSIM {statistics['ssim']:.4f}, LPIPS {lpips} "
            f"on {counted(len(statistics['images']), 'held-out view')}, "
            f"{1000 * statistics['seconds_per_image']:.1f} ms per view, {counted(run.num_gaussians, 'Gaussian')}"
        )

    def record_video(self, run: TrainingRun, steps: int) -> None:
        """Write the video where --video asks for it; as `evaluate`. Whoever stops the run leaves it between frames."""
        if not run.cfg.video:
            return
        path = run.results.path / video_file(run.cfg, steps)
        try:
            with run.results.missed_if_unwritable(f"The video of step {steps}"):
                record_video(run.scene, run.cfg, run.drawing.draw, path, run.ranks, lambda: run.is_interrupted)
        except VideoLeft as left:
            tqdm.write(f"The video was left {left}: --resume makes it anew.")
            run.end_as_interrupted()
