"""Writes tests/data/gsplat_golden.npz. Needs a CUDA GPU and the gsplat that install.sh installs:

python -m tests.data.make_gsplat_golden
"""

import gsplat
import torch

from tests.gsplat_comparison import compare_renders, run
from tests.gsplat_golden import GOLDEN_CASES, GOLDEN_FILE, golden_scene, save_golden


def main() -> None:
    scene = golden_scene()
    runs = {case: run(scene, "cuda", **options) for case, options in GOLDEN_CASES.items()}
    save_golden(scene, runs, gsplat.__version__)
    size = f"{GOLDEN_FILE.stat().st_size / 1024:.0f} KiB"
    print(f"{GOLDEN_FILE}: {size}, gsplat {gsplat.__version__}, torch {torch.__version__}")
    for case, options in GOLDEN_CASES.items():
        print(case, compare_renders(run(scene, "cpu", **options), runs[case]))


if __name__ == "__main__":
    main()
