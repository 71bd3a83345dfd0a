"""What must be set before torch is imported; every program of the suite imports this first."""

import os

# Read by OpenMP when torch loads: threads sleep between parallel loops. Spinning, they take the cores that the next
# loop of another library, and the threads that read pictures, need at that moment.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
