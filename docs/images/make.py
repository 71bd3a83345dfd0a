"""Draw the pictures of README.md: from the demo's results, and from figures that were measured.

python simple_trainer.py demo
python docs/images/make.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
DEMO_PAIR = ROOT / "results/demo/renders/val_step2000_0003.png"  # a held-out photo and its rendering, side by side
MEASURED = ROOT / "benchmarks/results/train_step_h200.json"
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
    for axis, (title, values), color in zip(axes, columns.items(), ("#4477aa", "#cc7744"), strict=True):
        bars = axis.barh(list(LABELS.values()), values, color=color)
        axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.margins(x=0.14)
        axis.tick_params(left=False, labelsize=9)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(FOLDER / "time_and_memory.png", dpi=110)


if __name__ == "__main__":
    save_demo()
    draw_time_and_memory()
