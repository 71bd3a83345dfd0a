"""What a benchmark found: printed as Markdown while it runs, and written as Markdown and JSON when it has ended."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import Spread
from reporting.machine import describe_machine, sentence
from reporting.numbers import number

RESULTS = Path(__file__).parent / "results"

Format = Callable[[object], str]


def spread(value: Spread) -> str:
    return f"{number(value.median)} ({number(value.low)}, {number(value.high)})"


def milliseconds_by_name(times: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in times.items())


class Table:
    """Rows of plain values: as they are in JSON, and by each column's format in Markdown; None stays empty."""

    def __init__(self, title: str, columns: Mapping[str, Format]) -> None:
        self.title = title
        self.columns = dict(columns)
        self.rows: list[dict[str, object]] = []

    def add(self, *values: object) -> None:
        """Add a row, and print it at once."""
        if not self.rows:
            print("\n".join(["", *self._head()]))
        self.rows.append(dict(zip(self.columns, values, strict=True)))
        print(self._line(self.rows[-1]), flush=True)

    def markdown(self) -> list[str]:
        return [*self._head(), *map(self._line, self.rows)]

    def _head(self) -> list[str]:
        return [self.title, "", f"| {' | '.join(self.columns)} |", "|---" * len(self.columns) + "|"]

    def _line(self, row: Mapping[str, object]) -> str:
        cells = ("" if value is None else self.columns[name](value) for name, value in row.items())
        return f"| {' | '.join(cells)} |"


class Report:
    """Sentences and tables of one benchmark, in the order in which they were made."""

    def __init__(self, benchmark: str, purpose: str, options: object, *, variant: str = "") -> None:
        """
        Args:
            benchmark: Its module's name.
            purpose: A sentence, the head of the Markdown file.
            options: A dataclass with at least `quick` and `out`.
            variant: Part of the file names, where another run of the benchmark measures something else.
        """
        self.benchmark = benchmark
        self.variant = variant
        self.purpose = purpose
        self.options = options
        self.machine = describe_machine()
        self.command = shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]])
        self.date = datetime.date.today().isoformat()
        self._parts: list[str | Table] = []
        print(f"{sentence(self.machine)}\n")

    def say(self, text: str) -> None:
        """Add a sentence, and print it at once."""
        self._parts.append(text)
        print(text, flush=True)

    def table(self, title: str, columns: Mapping[str, Format]) -> Table:
        """Begin a table; a column's name says the unit that its format writes."""
        table = Table(title, columns)
        self._parts.append(table)
        return table

    @property
    def tables(self) -> Sequence[Table]:
        return [part for part in self._parts if isinstance(part, Table)]

    def write(self) -> Path:
        """Write NAME.md and NAME.json; returns NAME.

        NAME is the option `out`, or results/BENCHMARK_MACHINE, with _quick at the end for a quick run.
        """
        parts = (self.benchmark, self.variant, short_name(self.machine), "quick" if self.options.quick else "")
        path = self.options.out or RESULTS / "_".join(filter(None, parts))
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"# {self.purpose}", "", f"{self.date}, `{self.command}`", "", f"{sentence(self.machine)}."]
        for part in self._parts:
            lines += ["", part] if isinstance(part, str) else ["", *part.markdown()]
        path.with_name(path.name + ".md").write_text("\n".join(lines) + "\n")
        content = {
            "benchmark": self.benchmark,
            "date": self.date,
            "command": self.command,
            "machine": self.machine,
            "options": asdict(self.options),
            "notes": [part for part in self._parts if isinstance(part, str)],
            "tables": [{"title": table.title, "rows": table.rows} for table in self.tables],
        }
        path.with_name(path.name + ".json").write_text(json.dumps(content, indent=1, default=_plain) + "\n")
        print(f"\nWritten to {os.path.relpath(path)}.md and .json")
        return path


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) else str(value)


def short_name(machine: Mapping[str, Any]) -> str:
    """Return a short name for file names: the GPU's, or the processor's with its threads."""
    name = machine["gpu"] or f"{machine['processor']} {machine['threads']} threads"
    name = re.sub(r"\((r|tm|c)\)|@.*?hz|\b(nvidia|geforce|intel|amd|cpu|processor)\b", " ", name.lower())
    return "_".join(re.findall(r"[a-z0-9.]+", name))
