"""What must be done before torch is imported; every program that trains or measures imports this first."""

import os
import signal
import sys
from types import TracebackType


def _say_in_short(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Show Ctrl-C that came while modules load, or before or after a program's own handling, without a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        if os.environ.get("LOCAL_RANK", "") in ("", "0"):  # of several processes one says so
            print("Stopped.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _say_in_short

# By SIGTERM torchrun ends its processes when one of several has ended. It waits until this one can say which, and why
# (`distributed/mesh.py`, hear_sigterm).
if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "") not in ("", "1"):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

# Read by OpenMP when torch loads: threads sleep between parallel loops. Spinning, they take the cores that the next
# loop of another library, and the threads that read pictures, need at that moment.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# torchrun sets 1 where it starts several processes and nobody has said how many threads: each gets its part of the
# cores. (Who wants one thread says 1,1.)
_local_ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
_is_set_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
if _is_set_by_torchrun and _local_ranks.isdecimal() and int(_local_ranks) > 1:
    _cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(max(_cores // int(_local_ranks), 1))

try:
    import native  # noqa: F401, for whether it can be used
except ImportError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)
