"""From Gaussians to pictures and losses."""

import os

# Read when the OpenMP library of the native module loads: its threads should sleep between parallel loops. Spinning
# ones take the cores that PyTorch's own threads, and those that read pictures, need at that moment.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
