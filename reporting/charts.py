"""Charts as SVG text that takes its text colour from the page, so that one page serves light and dark mode.

Drawn by matplotlib: an SVG has 10 to 40 kB, where an interactive library would bring megabytes of JavaScript into
every page. Charts are 4.2 inches wide (400 px), so that their text is readable where a phone shows one per row.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from reporting.numbers import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that stand out from white and from near-black; runs and stages take them in this order.
COLORS = ("#2f81f7", "#e8710a", "#1f9d55", "#c2478f", "#8a63d2", "#0e9aa7", "#b5891b", "#d64545", "#6b7f94")
_INK = "#012345"  # stands for the page's text colour until the SVG is written
_SIZE = (4.2, 2.7)  # inches
LEAST_SPAN = 0.05  # of a vertical axis, relative to its values: a difference of rounding should not fill the chart


@dataclass(frozen=True)
class Curve:
    """Hold a value over the steps, and over the seconds that training has taken."""

    steps: list[int]
    seconds: list[float]
    values: list[float]


def color(index: int) -> str:
    """Return the colour of a run or stage by its place."""
    return COLORS[index % len(COLORS)]


def line_chart(curves: Sequence[Curve | None], label: str, *, over: Literal["steps", "seconds"]) -> str | None:
    """Draw one line per curve, thinner from run to run, so that equal ones are seen behind each other.

    Args:
        curves: Of each run, in the order that gives the colours; None of one that has none.
        label: Of the vertical axis.
        over: What the horizontal axis counts.

    Returns:
        SVG text; None where no run has the curve.
    """
    figure, axes = _figure(label)
    drawn = 0
    for index, values in enumerate(curves):
        if values is None:
            continue
        width = 6.0 - 4.8 * index / max(len(curves) - 1, 1) if len(curves) > 1 else 1.6  # points
        marker = "o" if len(values.values) < 12 else None
        axes.plot(
            getattr(values, over),
            values.values,
            color=color(index),
            linewidth=width,
            marker=marker,
            markersize=width + 2,
        )
        drawn += 1
    if not drawn:
        return None
    low, high = axes.get_ylim()
    missing = LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("training steps" if over == "steps" else "seconds since the start")
    return _svg(figure, f"{label} over {over}")


def stage_bars(stages_ms: Mapping[str, Mapping[str, float]], colors: Mapping[str, str]) -> str | None:
    """Draw one bar per run, made of the mean milliseconds of the stages of its steps.

    Args:
        stages_ms: Of each run, by its name; those without stages are left out.
        colors: Of each stage.
    """
    runs = {name: stages for name, stages in stages_ms.items() if stages}
    if not runs:
        return None
    figure, axes = _figure("", height=0.9 + 0.55 * len(runs))
    for row, stages in enumerate(runs.values()):
        left = 0.0
        for stage, milliseconds in stages.items():
            axes.barh(row, milliseconds, left=left, color=colors[stage], height=0.62)
            left += milliseconds
        axes.annotate(f" {number(left)}", (left, row), va="center", color=_INK)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(runs)), [_short(name) for name in runs])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("milliseconds per step")
    return _svg(figure, "Stages of a step")


def _short(name: str, most: int = 28) -> str:
    """Return a name that leaves room for a bar beside it."""
    name = name.replace("_", " ")
    return name if len(name) <= most else "... " + name[-most + 4 :]


def stage_colors(stages_ms: Iterable[Mapping[str, float]]) -> dict[str, str]:
    """Return a colour for every stage that any run has, in the order in which they come in a step."""
    stages = dict.fromkeys(stage for each in stages_ms for stage in each)
    return {stage: color(index) for index, stage in enumerate(stages)}


def _figure(label: str, height: float = _SIZE[1]):
    import matplotlib  # here and below, since it takes half a second: most that could draw a chart end without one
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": "comparison",  # the same chart gives the same file
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **{f"{part}.color": _INK for part in ("xtick", "ytick", "text")},
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "axes.grid": True,
        "grid.color": _INK,
        "grid.alpha": 0.15,
    }
    with matplotlib.rc_context(cast(Any, settings)):
        figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_ylabel(label)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """Return the figure to stand inside a page: as wide as its place, in the page's text colour and font."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", svg)
    referenced = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in referenced else "", svg)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{title}"', svg, count=1)
