"""Adam on the host, against the machine's copy bandwidth and torch's fused Adam.

    python -m benchmarks.host_adam [--quick] [--state compact] [--num_gaussians 4000000] [--visible 0.08] [--repeats 20]

The rows are appearance, 48 columns, in float32 or as a compact store has them; gradients and values that are sent ahead
are float32. Made gradients are those of harmonics, of means and gradients of sh0 side by side. The visible rows come in
runs, as those of a store in Morton order do, or at random. Bytes are counted, not measured: every array element read or
written once, nothing for what a cache line brings along. All cases take turns, so that other work on the machine meets
each alike. Dense steps are in float32, whatever the state.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import megabytes, percent
from benchmarks.report import Report, spread
from benchmarks.timing import Case, time_in_turns
from benchmarks.visible_rows import KINDS, MEAN_RUN
from offload.adam.codes import num_values
from offload.adam.harmonics import HarmonicsGradient
from offload.adam.host import DeferredAdam
from offload.backends import num_threads
from offload.store.layout import RowState, StateFormat, packed_rows
from offload.store.memory import HostArray
from reporting.numbers import number
from training.memory import available_bytes

COLUMNS = 48
ROW = 4 * COLUMNS  # bytes
LAST_STEP, ID = 4, 8  # bytes
MADE_OF = 4 * 6  # bytes: a mean and the gradient of sh0
STEPS_BEFORE = 1000
MOST_GAUSSIANS = 18_000_000
YARDSTICK = "torch.optim.Adam(fused=True), all rows"
COPIED_ROWS = 2_000_000  # 384 MB: beyond any cache


@dataclass
class Options(BenchmarkOptions):
    num_gaussians: int = 0
    """Rows of the store; 0: as many as fit half of the available memory, at most 18 million."""
    state: StateFormat = "float32"
    """How the rows are stored."""
    visible: float = 0.08
    """Share of the rows that a step visits."""
    repeats: int = 20
    """Timed turns."""
    threads: int = 0
    """Threads of all cases; 0: as many as this process has cores."""


@dataclass(frozen=True)
class Counted:
    """A case, and the bytes that it reads and writes, and the rows."""

    case: Case
    bytes_moved: int
    rows: int


def store_rows(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make zeros [rows, 48] in memory as the host store has it: in huge pages, where there are some."""
    array = HostArray(COLUMNS, max_rows=rows, dtype=dtype)
    array.resize(rows)
    return array.tensor


def random_rows(rows: int, state: StateFormat) -> RowState:
    """Make parameters and moments as training leaves them."""
    if state == "float32":
        stored = RowState(store_rows(rows), (store_rows(rows), store_rows(rows)))
        stored.exp_avg.normal_(std=1e-3)
        stored.exp_avg_sq.uniform_(1e-6, 1e-5)
    else:
        stored = packed_rows(store_rows(rows, torch.int32), "appearance")
        stored.moments[0].random_(-(2**15), 2**15)
        stored.moments[0][:, num_values(3) :] = torch.tensor(3e-3, dtype=torch.bfloat16).view(torch.int16)  # the scales
    stored.parameters[:, : num_values(3)].normal_()
    return stored


def threaded_copy(destination: Tensor, source: Tensor, pool: ThreadPoolExecutor, threads: int) -> None:
    """Copy by the C library's memcpy, an equal part on each thread."""
    part = source.nbytes // threads

    def copy(i: int) -> None:
        ctypes.memmove(destination.data_ptr() + i * part, source.data_ptr() + i * part, part)

    list(pool.map(copy, range(threads)))


def visiting_cases(adam: DeferredAdam, rows: RowState, last_step: Tensor, visible: float) -> dict[str, Counted]:
    """Make cases of the deferred kernels on rows in runs and at random, other rows at every turn."""
    n = len(last_step)
    rng = np.random.default_rng(0)
    cases = {}
    for kind, choose in KINDS.items():
        choices = [choose(n, visible, rng) for _ in range(4)]
        most = max(map(len, choices))
        gradients, out = store_rows(most), store_rows(most)
        gradients[:, : num_values(3)].normal_()
        made_of = torch.randn(most, 6)
        has_constant = len(rows.moments) == 2  # with geometry where the state is compact
        turn = {"ids": choices[0]}

        def prepare(turn=turn, choices=choices) -> None:
            adam.begin_step([1e-3])
            turn["ids"] = choices[adam.step % len(choices)]

        def commit(turn=turn, gradients=gradients) -> None:
            adam.commit(rows, last_step, turn["ids"], gradients[: len(turn["ids"])])

        def commit_made(turn=turn, made_of=made_of, has_constant=has_constant) -> None:
            means, constant = made_of[: len(turn["ids"])].split(3, dim=1)
            made = HarmonicsGradient(means, constant, (0.0, 0.0, 10.0), 3, has_constant)
            adam.commit(rows, last_step, turn["ids"], made)

        def commit_and_forward(turn=turn, gradients=gradients, out=out) -> None:
            v = len(turn["ids"])
            adam.commit_and_forward(rows, last_step, turn["ids"], gradients[:v], out[:v])

        def forward(turn=turn, out=out) -> None:
            adam.forward(rows, last_step, turn["ids"], out[: len(turn["ids"])])

        v = sum(map(len, choices)) // len(choices)
        commit_bytes = v * (2 * rows.row_bytes + ROW + 2 * LAST_STEP + ID)  # reads w m v g, writes w m v
        forward_bytes = v * (rows.row_bytes + ROW + LAST_STEP + ID)  # reads w m v, writes out
        cases[f"commit, {kind}"] = Counted(Case(commit, prepare), commit_bytes, v)
        made_bytes = commit_bytes - v * (ROW - MADE_OF)
        cases[f"commit, made gradients, {kind}"] = Counted(Case(commit_made, prepare), made_bytes, v)
        cases[f"commit and forward, {kind}"] = Counted(Case(commit_and_forward, prepare), commit_bytes + v * ROW, v)
        cases[f"forward, {kind}"] = Counted(Case(forward, prepare), forward_bytes, v)
    return cases


def dense_cases(adam: DeferredAdam, rows: RowState, threads: int) -> dict[str, Counted]:
    """Make cases of Adam over all rows: torch's and ours, on the same memory."""
    parameters, exp_avg, exp_avg_sq = rows.tensors()
    torch.set_num_threads(threads)
    gradients = store_rows(len(parameters)).normal_()
    parameters.grad = gradients
    fused = torch.optim.Adam([parameters], lr=1e-3, eps=1e-15, fused=True)
    step = torch.tensor(float(STEPS_BEFORE))
    fused.state[parameters] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    bytes_moved = 7 * parameters.nbytes
    ours = Case(lambda: adam.dense(rows, gradients), lambda: adam.begin_step([1e-3]))
    return {
        YARDSTICK: Counted(Case(fused.step), bytes_moved, len(parameters)),
        "dense, all rows": Counted(ours, bytes_moved, len(parameters)),
    }


def main(options: Options) -> None:
    threads = options.threads or num_threads()
    n = options.num_gaussians
    if not n:
        stored = 4 * ROW if options.state == "float32" else 5 * ROW  # with the gradients of dense steps
        bytes_per_row = stored + LAST_STEP + 5 * options.visible * ROW
        n = min(MOST_GAUSSIANS, int(available_bytes(torch.device("cpu")) / 2 / bytes_per_row))
    repeats = options.repeats
    if options.quick:
        n, repeats = min(n, 400_000), 5

    rows = random_rows(n, options.state)
    dense_rows = rows if options.state == "float32" else random_rows(n, "float32")
    adam = DeferredAdam(torch.tensor([[1.0] * 3 + [1 / 20] * 45]), threads=threads)
    for _ in range(STEPS_BEFORE):
        adam.begin_step([1e-3])
    gaps = torch.empty(n).geometric_(options.visible).clamp_(max=STEPS_BEFORE).int()  # steps
    last_step = STEPS_BEFORE - gaps

    with ThreadPoolExecutor(threads) as pool:
        source, destination = (store_rows(COPIED_ROWS) for _ in range(2))
        copy = Case(lambda: threaded_copy(destination, source, pool, threads))
        cases = {
            "copy": Counted(copy, 2 * source.nbytes, COPIED_ROWS),
            **visiting_cases(adam, rows, last_step, options.visible),
            **dense_cases(adam, dense_rows, threads),
        }
        times = time_in_turns({name: counted.case for name, counted in cases.items()}, repeats, warmup=3)

    report = Report("host_adam", "Adam on the host", options)
    report.say(
        f"{n:,} rows of {COLUMNS} columns, {options.state}, {options.visible:.0%} visible, runs of {MEAN_RUN} rows in "
        f"the mean, {threads} threads; {repeats} turns; bytes by count."
    )
    columns = {
        "work": str,
        "ms, median (10 %, 90 %)": spread,
        "MB moved": megabytes,
        "million rows/s": number,
        "GB/s": number,
        "of copy": percent,
        "torch's time / this": number,
    }
    table = report.table("Time of one step's visit of rows:", columns)
    bandwidth = cases["copy"].bytes_moved / times["copy"].median  # bytes per ms
    for name, counted in cases.items():
        time = times[name]
        speed = counted.bytes_moved / time.median
        ratio = times[YARDSTICK].median / time.median
        table.add(
            name, time, counted.bytes_moved, counted.rows / time.median / 1e3, speed / 1e6, speed / bandwidth, ratio
        )
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
