"""What densification does to the host store: append, split, remove, re-sort in place.

    python -m benchmarks.densify [--quick] [--gaussians 2000000] [--repeats 5]

The floor of each line is the bytes it must move over the bandwidth of a large copy on the same threads; every byte
read and every byte written counts once. Where other processes are busy too, set OMP_WAIT_POLICY=PASSIVE: threads
that spin at the end of a loop are then waiting for the cores they take.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import gigabytes, percent
from benchmarks.report import Report, spread
from benchmarks.timing import CPU, Spread, copy_bandwidth
from configs import DensificationRules
from offload.adam.options import AdamOptions
from offload.backends import num_threads
from offload.models.baseline import BaselineGaussians
from offload.store.layout import GROUP_NAMES, row_bytes
from offload.store.morton import morton_order
from reporting.numbers import number
from strategies.default import DefaultStrategy, Statistics

ROW_BYTES = sum(row_bytes(group, sh_degree=3) for group in GROUP_NAMES)  # of a Gaussian
SHARE = 0.05  # of the rows that one refinement duplicates, splits or removes


@dataclass
class Options(BenchmarkOptions):
    gaussians: int = 2_000_000
    """Rows of the store."""
    repeats: int = 5
    """Timed runs of each operation."""


def random_parameters(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator)

    parameters = {"means": normal(3), "scales": normal(3) + math.log(0.01), "quats": normal(4), "opacities": normal()}
    return {**parameters, "sh0": normal(1, 3), "shN": normal(15, 3)}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def every(share: float, n: int) -> Tensor:
    """Spread row numbers evenly: this share of n."""
    return torch.arange(0, n, round(1 / share))


def bytes_moved(n: int) -> dict[str, float | None]:
    """Count the bytes that each operation must read and write; a whole refinement has no such count."""
    row, parameters = ROW_BYTES, (12 + 48) * 4  # bytes of a Gaussian with moments and last steps, and without
    changed = SHARE * n
    return {
        "fill from six tensors": n * (59 * 4 + row),  # moments are written once, as zeros
        "Morton order of the means": n * (12 + 8),
        "re-sort, from random order": 2 * n * row,
        "re-sort, nearly sorted": 2 * n * row,
        f"append copies of {SHARE:.0%}": changed * (parameters + row),
        f"overwrite means and scales of {SHARE:.0%}": changed * (2 * 24 + 2 * parameters + 4),
        f"relocate onto {SHARE:.0%}": changed * (4 * parameters + 4),
        "clamp opacities": n * 4 * 4,  # one value read and three written
        f"remove {SHARE:.0%}": 2 * n * row,
        "refinement: duplicate, split and remove": None,
    }


def one_round(parameters: dict[str, Tensor]) -> list[float]:
    """Time each operation of `bytes_moved` in seconds, one after the other on the stores of geometry and appearance."""
    n = len(parameters["means"])
    start = time.perf_counter()
    adam = AdamOptions(dict.fromkeys(parameters, 1e-3), lambda step: 1e-3, (0.9, 0.999))
    gaussians = BaselineGaussians(parameters, adam, device=CPU)
    stores = gaussians.stores.values()
    filled = time.perf_counter() - start

    times = [filled, seconds(lambda: morton_order(gaussians.read("means")))]
    ids, others = every(SHARE, n), every(SHARE, n) + 1
    order = morton_order(gaussians.read("means"))
    times.append(seconds(lambda: [store.keep(order) for store in stores]))
    gaussians.overwrite(ids, {"means": gaussians.read("means")[ids].roll(1, 0)})
    nearly_sorted = morton_order(gaussians.read("means"))
    times.append(seconds(lambda: [store.keep(nearly_sorted) for store in stores]))

    values = {name: gaussians.read(name)[ids] for name in ("means", "scales")}
    times.append(seconds(lambda: gaussians.append_copies(ids)))
    times.append(seconds(lambda: gaussians.overwrite(ids, values)))
    times.append(seconds(lambda: [store.relocate(ids, others) for store in stores]))
    times.append(seconds(lambda: gaussians.clamp_opacities(2.0)))
    is_kept = torch.ones(gaussians.num_gaussians, dtype=torch.bool)
    is_kept[every(SHARE, gaussians.num_gaussians)] = False
    kept = torch.where(is_kept)[0]
    times.append(seconds(lambda: gaussians.keep(kept)))

    few = gaussians.read("opacities").kthvalue(int(SHARE * gaussians.num_gaussians)).values
    rules = DensificationRules(prune_opa=float(few.sigmoid()))
    densification = DefaultStrategy(rules, scene_scale=1.0, seed=0)
    gradients = torch.zeros(gaussians.num_gaussians)
    gradients[every(2 * SHARE, gaussians.num_gaussians)] = 1.0  # half of them are small enough to be duplicated
    densification.statistics = Statistics(gradients, torch.ones_like(gradients), torch.zeros_like(gradients))
    times.append(seconds(lambda: densification.refine(600, gaussians)))
    return times


def main(options: Options) -> None:
    n, repeats = (100_000, 2) if options.quick else (options.gaussians, options.repeats)
    torch.set_num_threads(num_threads())
    parameters = random_parameters(n)
    one_round({name: value[:1000] for name, value in parameters.items()})  # starts all threads
    rounds = [one_round(parameters) for _ in range(repeats)]
    bandwidth = copy_bandwidth(CPU, min(n * ROW_BYTES, 1 << 30))

    report = Report("densify", "Densification of the host store", options)
    report.say(
        f"{n:,} Gaussians of SH degree 3, {n * ROW_BYTES / 1e9:.2f} GB; {repeats} runs. "
        f"Large copy on the host, read and written: {bandwidth / 1e9:.1f} GB/s."
    )
    columns = {
        "operation": str,
        "ms, median (10 %, 90 %)": spread,
        "GB moved": gigabytes,
        "floor, ms": number,
        "share of copy bandwidth": percent,
    }
    table = report.table("Each operation, and the bytes that it must move:", columns)
    for (name, num_bytes), seconds_of_rounds in zip(bytes_moved(n).items(), zip(*rounds, strict=True), strict=True):
        time = Spread.of([1e3 * value for value in seconds_of_rounds])
        floor = None if num_bytes is None else 1e3 * num_bytes / bandwidth
        table.add(name, time, num_bytes, floor, None if floor is None else floor / time.median)
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
