r"""PSNR, SSIM and LPIPS of several trainers on one dataset, from the same seeds or from one checkpoint, in pairs.

    python -m benchmarks.quality --data_dir D --trainers gpu_only_deferred gpu_only_compact --max_steps 7000 --seeds 3
    python -m benchmarks.quality --data_dir D --from CKPT --max_steps 4000 --parallel 6 --limit_minutes 9
        [--data_factor K] [--any_option_of_the_trainers ...]
    python -m benchmarks.quality --data_dir D --variants plain "mcmc: --strategy mcmc --max_gaussians 1000000"
    python -m benchmarks.quality --data_dir D --trainers streamed --max_steps 28000 \
        --variants one "two: --batch_size 2 --steps_scaler 0.5" "four: --batch_size 4 --steps_scaler 0.25"

Each run is a trainer script in a process of its own. With --from it goes on from that checkpoint, for --max_steps more
steps, without densification: runs that begin anew soon differ in their Gaussians, and that hides what is looked for.
Differences are to the first trainer with the first variant, run by run and picture by picture, where both have seen as
many pictures: with W views in a step and W times fewer steps a process makes the model that W ranks make
(docs/several_gpus.md). Figures with corrected colours exist of runs with --exposure; give --color_correct to have them,
and their differences, of all. Runs side by side on one GPU tell nothing of times. Nothing that is finished is lost or
done again: the same command goes on where the last one stopped.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from signal import SIGTERM
from statistics import fmean, stdev
from typing import Annotated, Any

import tyro

from benchmarks.command_line import BenchmarkOptions
from benchmarks.numbers import count, gigabytes
from benchmarks.report import Format, Report
from comparing.launch import Interruption, Plan, check_free_folders, check_nothing_is_lost, launch, plan
from comparing.runs import is_finished, last_step
from errors import InputError, refusing
from option_words import parse_own
from reporting.figures import FIGURES
from training.checkpoints import peek_checkpoint
from training.ending import FINISHED

METRICS = {"psnr": "{:.3f}", "ssim": "{:.4f}", "lpips": "{:.4f}"}
METRICS |= {f"{kind}_{metric}": form for kind in ("cc", "aligned") for metric, form in METRICS.items()}
# What this benchmark gives to its runs itself, or would break: no variant has them.
OF_ALL_RUNS = ("data_dir", "max_steps", "seed", "result_dir", "resume", "new_photos", "force", "ckpt")
FIRST_SEED = 42
QUICK = ("--sh_degree_interval", "5", "--max_gaussians", "2000", "--device", "cpu")


@dataclass
class Options(BenchmarkOptions):
    data_dir: Path = Path("data/city_block")
    """Dataset folder, as the trainers take it."""
    trainers: tuple[str, ...] = ("gpu_only_deferred", "gpu_only_compact")
    """Which trainers; differences are to the first."""
    variants: tuple[str, ...] = ("",)
    """Each trainer is run with each of these: a name, and behind a colon the options that others do not have; by
    default there is one, with neither."""
    max_steps: int = 7000
    """How many steps; with --from how many more."""
    seeds: int = 3
    """Runs of each trainer, with seeds from 42 on."""
    from_checkpoint: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Checkpoint of any trainer to go on from, without densification."""
    result_dir: Path = Path("results/quality")
    """Gets a folder for each seed, with one for each trainer."""
    parallel: int = 1
    """Runs side by side on the GPU."""
    limit_minutes: float = 0.0
    """After so long runs save and end, no other begins, and the tables show what there is; 0 sets no limit."""


@dataclass(frozen=True)
class Wanted:
    """One run."""

    case: str  # trainer and variant
    seed: int
    plan: Plan


@dataclass(frozen=True)
class Evaluation:
    """Hold what a run's model was worth after so many steps."""

    num_gaussians: int
    device_bytes: int | None  # the peak that torch allocated so far; None where there are no statistics of the step
    pictures: Mapping[str, Mapping[str, float]]  # by name: those of `METRICS`, psnr in dB; what is missing is not there

    def mean(self, metric: str) -> float | None:
        """Return the mean over the pictures; None where some have no value."""
        values = [picture[metric] for picture in self.pictures.values() if metric in picture]
        return fmean(values) if values and len(values) == len(self.pictures) else None


@dataclass(frozen=True)
class Difference:
    """Say how much better a trainer was than another, over pairs of runs, and the standard errors of that."""

    mean: float
    over_seeds: float | None  # None: there is one
    over_pictures: float | None

    @staticmethod
    def of(pairs: Sequence[tuple[Evaluation, Evaluation]], metric: str) -> Difference | None:
        """Compare the second of each pair with its first; None where a picture has no value."""
        if not pairs or any(evaluation.mean(metric) is None for pair in pairs for evaluation in pair):
            return None
        names = pairs[0][0].pictures
        differences = [  # [seeds][pictures]
            [other.pictures[name][metric] - first.pictures[name][metric] for name in names] for first, other in pairs
        ]
        by_seed = [fmean(values) for values in differences]
        by_picture = [fmean(values) for values in zip(*differences, strict=True)]
        return Difference(fmean(by_seed), standard_error(by_seed), standard_error(by_picture))


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent values; None of a single one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def wanted_runs(options: Options, passed_on: Sequence[str]) -> list[Wanted]:
    """Return all runs, those of one seed side by side.

    Raises:
        InputError: Options that cannot be used.
    """
    if min(options.max_steps, options.seeds, options.parallel) < 1 or options.limit_minutes < 0:
        raise InputError("--max_steps, --seeds and --parallel must be at least 1, and --limit_minutes at least 0.")
    steps, of_all = options.max_steps, [*passed_on]
    if options.from_checkpoint is not None:
        steps += peek_checkpoint(options.from_checkpoint).steps
        of_all += ["--refine_stop_iter", "0"]
    if not any(word.startswith("--save_every") for word in passed_on):
        of_all += ["--save_every", "0"]  # a run that is told to end saves
    of_all += ["--data_dir", str(options.data_dir), "--max_steps", str(steps)]
    variants = variants_of(options)
    runs = []
    for seed, (name, own) in product(range(FIRST_SEED, FIRST_SEED + options.seeds), variants.items()):
        folder = options.result_dir / f"seed_{seed}" / name
        for planned in plan("default", options.trainers, folder, [*of_all, *own, "--seed", str(seed)]):
            case = case_of(planned.name, name)
            runs.append(Wanted(case, seed, replace(planned, checkpoint=options.from_checkpoint)))
    plans = [wanted.plan for wanted in runs]
    check_free_folders(plans)
    check_nothing_is_lost(plans)
    return runs


def variants_of(options: Options) -> dict[str, list[str]]:
    """Return the options of each variant, by its name.

    Raises:
        InputError: Two have one name, a name cannot be that of a folder, or an option is not to differ.
    """
    found = {}
    for variant in options.variants:
        name, _, own = (part.strip() for part in variant.partition(":"))
        if name in found or "/" in name or name.startswith(("-", ".")) or (own and not name):
            raise InputError(
                f"--variants {variant!r} needs a name of its own, which a folder can have, as in "
                "'mcmc: --strategy mcmc'."
            )
        found[name] = shlex.split(own)
        options_of = [word[2:].partition("=")[0].replace("-", "_") for word in found[name] if word.startswith("--")]
        refused = next((option for option in options_of if option in OF_ALL_RUNS), None)
        if refused:
            remedy = "give it --steps_scaler to do fewer" if refused == "max_steps" else "leave it out"
            raise InputError(f"--variants {variant!r} has --{refused}, which is the same for all runs: {remedy}.")
    return found


def case_of(trainer: str, variant: str) -> str:
    """Return how a trainer with a variant is called."""
    return ", ".join(filter(None, [trainer, variant]))


def train(runs: Sequence[Wanted], parallel: int, limit_minutes: float) -> list[str]:
    """Do what has not been done yet, some runs at the same time; returns how each of them ended."""
    os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // parallel, 1))  # each run has its part of the cores
    with Interruption() as interruption, ThreadPoolExecutor(parallel) as pool:
        timer = threading.Timer(60 * limit_minutes, interruption.request, [SIGTERM])
        timer.daemon = True
        if limit_minutes:
            timer.start()

        def run_one(wanted: Wanted) -> str:
            outcome = FINISHED
            if not is_finished(wanted.plan.folder, wanted.plan.cfg):
                if interruption.requested:
                    return "not begun"
                ending = launch(wanted.plan, interruption, lambda line: None)
                outcome = ". ".join(filter(None, [ending.status, ending.message]))
            print(f"{wanted.case}, seed {wanted.seed}: {outcome}", flush=True)
            return outcome

        outcomes = list(pool.map(run_one, runs))
        timer.cancel()
    return outcomes


def evaluations(wanted: Wanted) -> Iterator[tuple[int, Evaluation]]:
    """Yield the evaluations in a run's result folder, with the steps done."""
    last = last_step(vars(wanted.plan.cfg))
    found = {int(path.stem.removeprefix("val_step")): path for path in wanted.plan.folder.glob("stats/val_step*.json")}
    for steps, path in sorted(found.items()):
        if steps <= last:
            content = json.loads(path.read_text())
            pictures = {
                picture["name"]: {metric: picture[metric] for metric in METRICS if picture.get(metric) is not None}
                for picture in content["images"]
            }
            measured = wanted.plan.folder / "stats" / f"train_step{steps}.json"
            peak = json.loads(measured.read_text())["peak_device_bytes_allocated"] if measured.exists() else None
            yield steps, Evaluation(content["num_GS"], peak, pictures)


def signed(pairs: Sequence[tuple[Evaluation, Evaluation]], metric: str) -> str | None:
    """Return the difference of the pairs and its standard errors, as the table shows them."""
    difference = Difference.of(pairs, metric)
    if difference is None:
        return None
    form = METRICS[metric]
    errors = [
        "-" if error is None else form.format(error) for error in (difference.over_seeds, difference.over_pictures)
    ]
    return f"{form.replace(':', ':+').format(difference.mean)} ± {errors[0]} ± {errors[1]}"


def main(options: Options, passed_on: Sequence[str] = ()) -> None:
    """Train and compare.

    Raises:
        InputError: Options that cannot be used; nothing has been trained.
    """
    runs = wanted_runs(options, passed_on)
    report = Report("quality", "Quality of trainers, in pairs", options, variant=options.data_dir.name)
    beginning = "the beginning" if options.from_checkpoint is None else f"{options.from_checkpoint}, not densified"
    report.say(
        f"{options.data_dir}, {options.max_steps:,} steps from {beginning}, {options.parallel} runs side by side."
    )
    outcomes = train(runs, options.parallel, options.limit_minutes)
    views = {wanted.case: wanted.plan.cfg.batch_size for wanted in runs}  # per step
    found = {  # by the views that a model was trained on
        (wanted.case, wanted.seed, views[wanted.case] * steps): each
        for wanted in runs
        for steps, each in evaluations(wanted)
    }

    metrics = shown_metrics(found.values())
    titles = [title_of(metric) for metric in metrics]
    formats: dict[str, Format] = {title_of(metric): METRICS[metric].format for metric in metrics}
    table = report.table(
        "Each run, by its held-out photos:",
        {
            "trainer": str,
            "seed": str,
            "steps": thousands,
            **formats,
            "Gaussians": thousands,
            "device GB": gigabytes,
            "run": str,
        },
    )
    for wanted, outcome in zip(runs, outcomes, strict=True):
        head = wanted.case, wanted.seed
        cells = [
            [
                seen // views[wanted.case],
                *map(evaluation.mean, metrics),
                evaluation.num_gaussians,
                evaluation.device_bytes,
            ]
            for (*of, seen), evaluation in found.items()
            if (*of,) == head
        ]
        for row in cells or [[None] * (3 + len(metrics))]:
            table.add(*head, *row, outcome)

    first, *others = (case_of(trainer, variant) for variant, trainer in product(variants_of(options), options.trainers))
    table = report.table(
        f"Difference to {first} ± standard error over seeds ± over pictures:",
        {"trainer": str, "steps": thousands, "pairs": thousands, **dict.fromkeys(titles, str)},
    )
    seeds = sorted({wanted.seed for wanted in runs})
    for other, seen in product(others, sorted({seen for *_, seen in found})):
        keys = [((first, seed, seen), (other, seed, seen)) for seed in seeds]
        pairs = [(found[one], found[two]) for one, two in keys if one in found and two in found]
        if pairs:
            table.add(other, seen // views[other], len(pairs), *(signed(pairs, metric) for metric in metrics))
    report.write()


def shown_metrics(found: Iterable[Evaluation]) -> list[str]:
    """Return the keys of `METRICS` that tables have: of corrected colours and aligned poses where a run has them."""
    there = {metric for evaluation in found for picture in evaluation.pictures.values() for metric in picture}
    return [metric for metric in METRICS if metric in there or "_" not in metric]


def title_of(metric: str) -> str:
    """Return what a metric is called at the head of a column."""
    (title,) = (figure.title for figure in FIGURES if figure.key == metric)
    return title.replace("PSNR", "PSNR, dB", 1) if metric.endswith("psnr") else title


def thousands(value: Any) -> str:
    return count(value)


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, list[str]]:
    """Return the options of a command line, and those that are passed on to the trainers."""
    options, passed_on = parse_own(Options, __doc__, arguments)
    if options.quick:  # a laptop's CPU
        options.max_steps, options.seeds, passed_on = 10, 2, [*QUICK, *passed_on]
    return options, passed_on


if __name__ == "__main__":
    with refusing():
        main(*parse())
