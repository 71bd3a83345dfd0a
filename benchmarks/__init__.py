"""Scripts that measure. `python -m benchmarks` lists them; README.md says what each figure is held against."""

import os

# Read by OpenMP when torch loads, as in the trainer scripts: threads sleep between parallel loops.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
