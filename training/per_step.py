"""Means per step of totals that grow while training runs, told to several readers."""

from __future__ import annotations

from collections.abc import Mapping


class PerStep:
    """Remember what each reader has been told of."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, dict[str, float]]] = {}  # steps and totals at each reader's last call

    def means(self, reader: str, num_steps: int, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the growth per step since this reader's last call, or since 0; nothing where there was no step.

        Args:
            reader: Who asks; each reader is told of every step once.
            num_steps: How many there have been so far.
            totals: Of all these steps, by name.
        """
        num_steps_seen, seen = self._seen.get(reader, (0, {}))
        self._seen[reader] = (num_steps, dict(totals))
        if num_steps == num_steps_seen:
            return {}
        return {name: (total - seen.get(name, 0)) / (num_steps - num_steps_seen) for name, total in totals.items()}
