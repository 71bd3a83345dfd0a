"""Draw the pictures of README.md: from the demo's results, and from figures that were measured.

    python simple_trainer.py demo
    python docs/images/make.py [demo] [time_and_memory] [quality]

Without a name it draws all. The last is of runs of `benchmarks.quality` with as many Gaussians as each variant says
(benchmarks/README.md); their means are printed as a table, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
DEMO_PAIR = ROOT / "results/demo/renders/val_step2000_0003.png"  # a held-out photo and its rendering, side by side
MEASURED = ROOT / "benchmarks/results/train_step_h200.json"
QUALITY = {scene: ROOT / f"benchmarks/results/quality_{scene}_h200.json" for scene in ("bonsai", "seneca")}
NUM_GAUSSIANS = 18_000_000
LABELS = {  # of the bars, by the trainer's name in trainers.py
    "gpu_only": "simple_trainer.py",
    "streamed_bfloat16": "..._hybrid_streamed.py --moments bfloat16",
    "streamed": "..._hybrid_streamed.py",
    "optimized": "..._hybrid_optimized.py",
    "streamed_geometry_on_host": "..._hybrid_streamed.py --geometry host",
    "optimized_geometry_on_host": "..._hybrid_optimized.py --geometry host",
    "baseline": "..._hybrid_baseline.py",
}
COLORS = ("#4477aa", "#cc7744")
LINES = {  # of trainers, by their names; those that have run are drawn
    "gpu_only": ("simple_trainer.py", COLORS[0], "o-"),
    "gpu_only_deferred": ("simple_trainer.py --adam deferred", COLORS[0], "^:"),
    "streamed_compact": ("..._hybrid_streamed.py --state compact", COLORS[1], "s--"),
}
FIGURES = ("PSNR, dB", "SSIM", "LPIPS", "device GB")  # columns of the results


def save_demo() -> None:
    """Save the demo's pair of pictures with a palette, which takes a third of the space."""
    Image.open(DEMO_PAIR).convert("RGB").quantize(256).save(FOLDER / "demo.png", optimize=True)


def draw_time_and_memory() -> None:
    """Draw a bar of time and one of GPU memory for each trainer, from the lines of one run of benchmarks.train_step."""
    (table,) = json.loads(MEASURED.read_text())["tables"]
    rows = {row["trainer"]: row for row in table["rows"] if row["Gaussians"] == NUM_GAUSSIANS}
    columns = {
        "GPU memory, GB": [rows[name]["peak device GB"] / 1e9 for name in LABELS],
        "milliseconds per step": [rows[name]["ms per step: median (10 %, 90 %)"]["median"] for name in LABELS],
    }
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 2.9), sharey=True, constrained_layout=True)
    for axis, (title, values), color in zip(axes, columns.items(), COLORS, strict=True):
        bars = axis.barh(list(LABELS.values()), values, color=color)
        axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.margins(x=0.14)
        axis.tick_params(left=False, labelsize=9)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(FOLDER / "time_and_memory.png", dpi=110)


def draw_quality() -> None:
    """Draw PSNR, SSIM, LPIPS and GPU memory against the number of Gaussians, a row for each scene."""
    figure, axes = plt.subplots(len(QUALITY), 4, figsize=(9.6, 4.6), squeeze=False, layout="constrained")
    print(f"| scene | trainer | Gaussians | {' | '.join(FIGURES)} |\n{'|---' * 7}|")
    for of_scene, (scene, path) in zip(axes, QUALITY.items(), strict=True):
        points = quality_by_number(json.loads(path.read_text())["tables"][0]["rows"])
        for name, of_trainer in points.items():
            label, color, style = LINES[name]
            numbers = [point["Gaussians"] / 1e6 for point in of_trainer]
            for axis, key in zip(of_scene, FIGURES, strict=True):
                scale = 1e9 if key == "device GB" else 1
                values = [point[key] / scale for point in of_trainer]
                axis.plot(numbers, values, style, color=color, markersize=4, label=label)
            for point in of_trainer:
                shown = f"{point['PSNR, dB']:.2f} | {point['SSIM']:.4f} | {point['LPIPS']:.4f}"
                print(f"| {scene} | {name} | {point['Gaussians']:,.0f} | {shown} | {point['device GB'] / 1e9:.2f} |")
        of_scene[0].set_ylabel(scene)
    for axis, title in zip(axes[0], ("PSNR, dB", "SSIM", "LPIPS (less is better)", "GPU memory, GB"), strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 3]:
        axis.set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("million Gaussians", fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False
    )
    figure.savefig(FOLDER / "quality.png", dpi=110)


def quality_by_number(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Return by trainer the means over seeds of each variant after its last step, fewest Gaussians first.

    Args:
        rows: Of the first table of `benchmarks.quality`. Those of runs that have not finished are left out.
    """
    finished = [row for row in rows if row["run"] == "finished"]
    points: dict[str, list[dict[str, float]]] = {}
    for case in dict.fromkeys(row["trainer"] for row in finished):
        of_case = [row for row in finished if row["trainer"] == case]
        last = [row for row in of_case if row["steps"] == max(row["steps"] for row in of_case)]
        figures = {key: [row[key] for row in last] for key in ("Gaussians", *FIGURES)}
        means = {key: nan if None in values else fmean(values) for key, values in figures.items()}
        points.setdefault(case.partition(", ")[0], []).append(means)
    return {name: sorted(of_trainer, key=lambda point: point["Gaussians"]) for name, of_trainer in points.items()}


PICTURES = {"demo": save_demo, "time_and_memory": draw_time_and_memory, "quality": draw_quality}

if __name__ == "__main__":
    for picture in sys.argv[1:] or PICTURES:
        PICTURES[picture]()
