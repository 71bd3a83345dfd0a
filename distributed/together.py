"""What ranks do as one: they share work in rounds that all take part in, and fail alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from distributed.mesh import Ranks


def taken_in_turn(ids: np.ndarray, ranks: Ranks | None) -> tuple[np.ndarray, int]:
    """Return which of some ids this rank works on, one a round, and how many of these count.

    Rank r takes ids r, r + W, ... In the last round some ranks may have none left: they take the last id of all, since
    others want their help, and it does not count.

    Args:
        ids: [n], at least one, the same at all ranks.
        ranks: None: there is this process only, which takes all.
    """
    if ranks is None:
        return ids, len(ids)
    own = ids[ranks.rank :: ranks.size]
    rounds = -(-len(ids) // ranks.size)
    return np.append(own, ids[-1:].repeat(rounds - len(own))), len(own)


@contextmanager
def failing_together(ranks: Ranks | None, kind: type[Exception] = OSError) -> Iterator[None]:
    """Let what one rank cannot do be an error of all, which then go on alike; all of them call this.

    Args:
        ranks: None: there is this process only.
        kind: Of the error; with OSError it is what a rank cannot read or write.

    Raises:
        kind: At every rank, naming the first of those that have failed.
    """
    failure: Exception | None = None
    try:
        yield
    except kind as error:
        failure = error
        if ranks is None:
            raise
    if ranks is None:
        return
    failures = ranks.gather(None if failure is None else str(failure))
    for rank, said in enumerate(failures):
        if said is not None:
            raise kind(f"rank {rank}: {said}") from failure
