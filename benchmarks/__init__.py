"""Scripts that measure. `python -m benchmarks` lists them; README.md says what each figure is held against."""

import startup  # noqa: F401, before torch is imported
