"""How far the CPU rasterizer is from gsplat on a trained model: image, radii, and gradients of the training loss.

python -m benchmarks.gsplat_agreement --ckpt results/garden/ckpts/ckpt_7000.pt --data_dir data/garden

Needs a CUDA GPU and gsplat. Views are the first, middle and last test picture.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from torch import Tensor

from datasets.images import decode_image
from datasets.scene import load_scene
from rendering.losses import photometric_loss
from tests.gaussian_scenes import GaussianScene
from tests.gsplat_comparison import compare_renders, run
from training.checkpoints import load_checkpoint
from training.gaussians import activate


def main(ckpt: Path, data_dir: Path) -> None:
    """Print a Markdown table, one row per view and rasterization mode.

    Args:
        ckpt: Checkpoint of a trainer.
        data_dir: The dataset that it was trained on.
    """
    gaussians = load_checkpoint(ckpt).gaussians
    activated = activate(gaussians)
    dataset = load_scene(data_dir)
    print(f"{ckpt}, {len(gaussians['means'])} Gaussians, {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(
        "| view | mode | visible | seen by one only | other radii | pixels off by > 1e-3 "
        "| worst gradient error | of ours against float64 | of gsplat against float64 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for image_id in dataset.test_ids[[0, len(dataset.test_ids) // 2, -1]]:
        camera = dataset.cameras[dataset.camera_indices[image_id]]
        scene = GaussianScene(
            **{name: activated[name] for name in ("means", "quats", "scales", "opacities")},
            sh0=gaussians["sh0"],
            shN=gaussians["shN"],
            viewmats=torch.linalg.inv(torch.from_numpy(dataset.camtoworlds[image_id]))[None].float(),
            Ks=torch.from_numpy(camera.K)[None].float(),
            width=camera.width,
            height=camera.height,
        )
        photo = torch.tensor(camera.undistort(decode_image(dataset.image_paths[image_id])))[None] / 255.0

        def loss(colors: Tensor, alphas: Tensor, photo: Tensor = photo) -> Tensor:
            return photometric_loss(colors, photo.to(colors))

        for mode in ("classic", "antialiased"):
            options = {"sh_degree": 3, "rasterize_mode": mode, "absgrad": True, "loss": loss}
            ours, theirs = run(scene, "cpu", **options), run(scene, "cuda", **options)
            exact = run(scene, "cpu", torch.float64, **options)
            result = compare_renders(ours, theirs)
            worst = [
                max((error, name) for name, error in comparison.gradient_errors.items())
                for comparison in (result, compare_renders(ours, exact), compare_renders(theirs, exact))
            ]
            print(
                f"| {dataset.image_names[image_id]} | {mode} | {result.visible} | {result.seen_by_one_only} "
                f"| {result.differing_radii} | {100 * result.outlier_pixels:.4f} % | "
                + " | ".join(f"{error:.1e} ({name})" for error, name in worst)
                + " |"
            )


if __name__ == "__main__":
    tyro.cli(main)
