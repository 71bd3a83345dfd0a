"""What is measured of a run, as people read it: figures in tables, and curves in charts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from reporting import charts
from reporting.numbers import number


@dataclass(frozen=True)
class Figure:
    """Hold one column of a table."""

    key: str  # of `Measured.figures`
    title: str
    show: Callable[[float], str]
    digits: int | None = None  # of the difference to the first run, for figures compared by that and not by ratio
    is_common: bool = True  # to all runs; others are shown where a run has them


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _degrees(angle: float) -> str:
    return f"{angle:.3f} degrees"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


FIGURES = (
    Figure("psnr", "PSNR", lambda value: f"{value:.2f} dB", digits=2),
    Figure("ssim", "SSIM", lambda value: f"{value:.4f}", digits=4),
    Figure("lpips", "LPIPS", lambda value: f"{value:.4f}", digits=4),
    Figure("cc_psnr", "PSNR, corrected colours", lambda value: f"{value:.2f} dB", digits=2, is_common=False),
    Figure("cc_ssim", "SSIM, corrected colours", lambda value: f"{value:.4f}", digits=4, is_common=False),
    Figure("cc_lpips", "LPIPS, corrected colours", lambda value: f"{value:.4f}", digits=4, is_common=False),
    Figure("aligned_psnr", "PSNR, aligned poses", lambda value: f"{value:.2f} dB", digits=2, is_common=False),
    Figure("aligned_ssim", "SSIM, aligned poses", lambda value: f"{value:.4f}", digits=4, is_common=False),
    Figure("aligned_lpips", "LPIPS, aligned poses", lambda value: f"{value:.4f}", digits=4, is_common=False),
    Figure("num_GS", "Gaussians", lambda value: f"{value:,}"),
    Figure("elapsed_seconds", "wall time", _duration),
    Figure("ms_per_step", "time per step", lambda value: f"{number(value)} ms"),
    Figure("peak_device_bytes_allocated", "device memory allocated", _gigabytes),
    Figure("peak_device_bytes_reserved", "device memory reserved", _gigabytes),
    Figure("peak_host_bytes", "host memory", _gigabytes),
    Figure("spared_host_bytes", "host memory that decoded photos take", _gigabytes, is_common=False),
    Figure("pose_turn_median", "poses turned, median", _degrees, is_common=False),
    Figure("pose_turn_largest", "poses turned, largest", _degrees, is_common=False),
    Figure("pose_shift_median", "poses shifted, median, dataset's units", number, is_common=False),
    Figure("pose_shift_largest", "poses shifted, largest, dataset's units", number, is_common=False),
)


@dataclass(frozen=True)
class Chart:
    """Hold how a curve is drawn."""

    key: str  # of `Measured.curves`
    label: str  # of the vertical axis
    over: Literal["steps", "seconds"]
    only_compared: bool = False  # it is left out of the page of one run


CHARTS = (
    Chart("loss", "training loss", "steps"),
    Chart("loss", "training loss", "seconds", only_compared=True),
    Chart("psnr", "PSNR of held-out views, dB", "steps"),
    Chart("psnr", "PSNR of held-out views, dB", "seconds", only_compared=True),
    Chart("num_GS", "Gaussians", "steps"),
    Chart("device_allocated_GiB", "device memory, GiB, peak so far", "seconds"),
    Chart("device_reserved_GiB", "device memory reserved, GiB", "seconds", only_compared=True),
    Chart("host_GiB", "host memory, GiB, peak so far", "seconds"),
)


def line_charts(runs: Sequence[Mapping[str, charts.Curve]], *, compared: bool) -> list[str]:
    """Return the charts, as SVG, of all curves that some run has, and that are not zero throughout.

    Args:
        runs: Of each run its curves, by their keys.
        compared: Whether it is a comparison, and not the page of one run.
    """
    drawn = []
    for chart in CHARTS:
        curves = [run.get(chart.key) for run in runs]
        if (chart.only_compared and not compared) or not any(any(curve.values) for curve in curves if curve):
            continue
        drawn.append(charts.line_chart(curves, chart.label, over=chart.over))
    return [svg for svg in drawn if svg]


def shown_figures(found: Iterable[Mapping[str, float | int | None]]) -> list[Figure]:
    """Return the figures that a table of some runs shows.

    Args:
        found: Of each run its figures, by their keys.
    """
    all_found = list(found)
    return [
        figure
        for figure in FIGURES
        if figure.is_common or any(figures.get(figure.key) is not None for figures in all_found)
    ]
