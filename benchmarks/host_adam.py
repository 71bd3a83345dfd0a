"""Times Adam on the host against the machine's copy bandwidth and torch's fused Adam, and prints a Markdown table.

    python -m benchmarks.host_adam [--quick] [--num_gaussians 4000000] [--visible 0.08] [--repeats 20]

The rows are appearance, 48 float32 columns. The visible ones come in runs, as those of a store in
Morton order do, or at random. Bytes are counted, not measured: every array element read or written once, nothing for
what a cache line brings along. All cases take turns, so that other work on the machine meets each alike.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads its OpenMP
import torch
import tyro
from torch import Tensor

from benchmarks.machine import processor
from offload.adam import DeferredAdam
from offload.host_memory import HostArray
from offload.threads import num_threads
from training.memory import available_bytes

COLUMNS = 48
ROW = 4 * COLUMNS  # bytes
STAMP, ID = 4, 8  # bytes
MEAN_RUN = 50  # rows
STEPS_BEFORE = 1000
MOST_GAUSSIANS = 18_000_000
COPIED_ROWS = 2_000_000  # 384 MB: beyond any cache


@dataclass
class Options:
    num_gaussians: int = 0
    """rows of the store; 0: as many as fit half of the available memory, at most 18 million"""
    visible: float = 0.08
    """share of the rows that a step visits"""
    repeats: int = 20
    """timed turns"""
    threads: int = 0
    """of all cases; 0: the cores of this process"""
    quick: bool = False
    """400,000 rows and 5 turns: a look, not a measurement"""


@dataclass
class Case:
    name: str
    bytes_moved: int
    run: Callable[[], None]
    prepare: Callable[[], None] = lambda: None


def store_rows(rows: int) -> Tensor:
    """Zeros float32 [rows, 48] in memory as the host store has it: huge pages, where the system allows them."""
    array = HostArray(COLUMNS, max_rows=rows)
    array.resize(rows)
    return array.tensor


def runs_of_rows(n: int, visible: float, rng: np.random.Generator) -> Tensor:
    """Sorted ids: runs and the gaps between them have geometric lengths."""
    mean_gap = MEAN_RUN * (1 - visible) / visible
    count = int(2 * n / (MEAN_RUN + mean_gap)) + 10  # runs enough to pass n
    lengths = np.stack([rng.geometric(1 / mean_gap, count), rng.geometric(1 / MEAN_RUN, count)], 1)
    mask = np.repeat(np.tile([False, True], count), lengths.reshape(-1))[:n]
    return torch.from_numpy(np.flatnonzero(mask))


def random_rows(n: int, visible: float, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(np.flatnonzero(rng.random(n) < visible))


def threaded_copy(destination: Tensor, source: Tensor, pool: ThreadPoolExecutor, threads: int) -> None:
    """The C library's memcpy, on an equal part for each thread."""
    part = source.nbytes // threads

    def copy(i: int) -> None:
        ctypes.memmove(destination.data_ptr() + i * part, source.data_ptr() + i * part, part)

    list(pool.map(copy, range(threads)))


def measure(cases: list[Case], repeats: int) -> dict[str, np.ndarray]:
    """Milliseconds [repeats] of each case after three turns to warm up."""
    times = {case.name: [] for case in cases}
    for _ in range(repeats + 3):
        for case in cases:
            case.prepare()
            start = time.perf_counter()
            case.run()
            times[case.name].append(1e3 * (time.perf_counter() - start))
    return {name: np.array(samples[3:]) for name, samples in times.items()}


def visiting_cases(adam: DeferredAdam, state: tuple[Tensor, ...], visible: float) -> list[Case]:
    """The deferred kernels on rows in runs and at random, other rows at every turn."""
    n = len(state[0])
    rng = np.random.default_rng(0)
    cases = []
    for kind, choose in (("Morton runs", runs_of_rows), ("random rows", random_rows)):
        choices = [choose(n, visible, rng) for _ in range(4)]
        most = max(map(len, choices))
        gradients, out = store_rows(most), store_rows(most)
        gradients.normal_()
        turn = {"ids": choices[0]}

        def prepare(turn=turn, choices=choices) -> None:
            adam.begin_step([1e-3])
            turn["ids"] = choices[adam.step_count % len(choices)]

        def commit(turn=turn, gradients=gradients) -> None:
            adam.commit(*state, turn["ids"], gradients[: len(turn["ids"])])

        def commit_and_forward(turn=turn, gradients=gradients, out=out) -> None:
            v = len(turn["ids"])
            adam.commit_and_forward(*state, turn["ids"], gradients[:v], out[:v])

        def forward(turn=turn, out=out) -> None:
            adam.forward(*state, turn["ids"], out[: len(turn["ids"])])

        v = sum(map(len, choices)) // len(choices)
        commit_bytes = v * (7 * ROW + 2 * STAMP + ID)  # reads w m v g, writes w m v
        cases += [
            Case(f"commit, {kind}", commit_bytes, commit, prepare),
            Case(f"commit and forward, {kind}", commit_bytes + v * ROW, commit_and_forward, prepare),
            Case(f"forward, {kind}", v * (4 * ROW + STAMP + ID), forward, prepare),  # reads w m v, writes out
        ]
    return cases


def dense_cases(adam: DeferredAdam, state: tuple[Tensor, ...], threads: int) -> list[Case]:
    """Adam over all rows: torch's and ours, on the same memory."""
    parameters, exp_avg, exp_avg_sq, _ = state
    torch.set_num_threads(threads)
    gradients = store_rows(len(parameters)).normal_()
    parameters.grad = gradients
    fused = torch.optim.Adam([parameters], lr=1e-3, eps=adam.eps, fused=True)
    step = torch.tensor(float(STEPS_BEFORE))
    fused.state[parameters] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    bytes_moved = 7 * parameters.nbytes
    return [
        Case("torch.optim.Adam(fused=True), all rows", bytes_moved, fused.step),
        Case(
            "dense, all rows",
            bytes_moved,
            lambda: adam.dense(parameters, exp_avg, exp_avg_sq, gradients),
            lambda: adam.begin_step([1e-3]),
        ),
    ]


def main(options: Options) -> None:
    threads = options.threads or num_threads()
    n = options.num_gaussians
    if not n:
        bytes_per_row = 4 * ROW + STAMP + 5 * options.visible * ROW
        n = min(MOST_GAUSSIANS, int(available_bytes(torch.device("cpu")) / 2 / bytes_per_row))
    repeats = options.repeats
    if options.quick:
        n, repeats = min(n, 400_000), 5

    parameters, exp_avg, exp_avg_sq = (store_rows(n) for _ in range(3))
    parameters.normal_()
    exp_avg.normal_(std=1e-3)
    exp_avg_sq.uniform_(1e-6, 1e-5)
    adam = DeferredAdam(torch.tensor([[1.0] * 3 + [1 / 20] * 45]), threads=threads)
    for _ in range(STEPS_BEFORE):
        adam.begin_step([1e-3])
    gaps = torch.empty(n).geometric_(options.visible).clamp_(max=STEPS_BEFORE).int()  # steps
    state = (parameters, exp_avg, exp_avg_sq, STEPS_BEFORE - gaps)

    with ThreadPoolExecutor(threads) as pool:
        source, destination = (store_rows(COPIED_ROWS) for _ in range(2))
        copy = Case("copy", 2 * source.nbytes, lambda: threaded_copy(destination, source, pool, threads))
        dense = dense_cases(adam, state, threads)
        cases = [copy, *visiting_cases(adam, state, options.visible), *dense]
        times = measure(cases, repeats)

    bandwidth = copy.bytes_moved / np.median(times["copy"]) / 1e6  # GB/s
    yardstick = np.median(times[dense[0].name])
    python = platform.python_version()
    print(f"{processor()}, {threads} threads, {platform.system()}, Python {python}, torch {torch.__version__}")
    print(f"{n} rows of {COLUMNS} float32, {options.visible:.0%} visible, runs of {MEAN_RUN} rows in the mean,")
    print(f"median of {repeats} turns (10th to 90th percentile), bytes by count, MB = 10^6 bytes\n")
    print("| | ms | MB moved | GB/s | of copy | torch's time / this |\n|---|---|---|---|---|---|")
    for case in cases:
        low, median, high = np.percentile(times[case.name], (10, 50, 90))
        speed = case.bytes_moved / median / 1e6
        print(
            f"| {case.name} | {median:.2f} ({low:.2f} to {high:.2f}) | {case.bytes_moved / 1e6:.0f} "
            f"| {speed:.1f} | {speed / bandwidth:.0%} | {yardstick / median:.1f} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
