"""What the command lines of all benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from errors import refusing
from option_words import parse


@dataclass
class BenchmarkOptions:
    quick: bool = False
    """A small size that shows whether everything works; the figures mean little."""
    out: Path | None = None
    """Result files without the suffixes .md and .json; else benchmarks/results/BENCHMARK_MACHINE."""


Options = TypeVar("Options", bound=BenchmarkOptions)


def run(main: Callable[[Options], None], options: type[Options], description: str) -> None:
    """Parse the command line and measure; the exit code is 2, with one sentence, for options that cannot be used."""
    with refusing():
        main(parse(options, description))
