"""What must be done before torch is imported; every program of the suite imports this first."""

import os
import sys

# Read by OpenMP when torch loads: threads sleep between parallel loops. Spinning, they take the cores that the next
# loop of another library, and the threads that read pictures, need at that moment.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import native  # noqa: F401, for whether it can be used
except ImportError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)
