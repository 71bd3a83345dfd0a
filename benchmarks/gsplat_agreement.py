"""How far the CPU rasterizer is from gsplat: image, radii, and gradients of the training loss.

    python -m benchmarks.gsplat_agreement --ckpt results/garden/ckpts/ckpt_7000.pt --data_dir data/garden
    python -m benchmarks.gsplat_agreement --quick

On the first, middle and last held-out photo of a trained model, with a CUDA GPU and gsplat. --quick takes random
Gaussians, and without a GPU only holds our rasterizer in float32 against itself in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import count
from benchmarks.report import Report
from datasets.image_files import decode_image
from datasets.scene import load_scene
from errors import InputError
from rendering.losses import photometric_loss
from tests import gsplat_comparison
from tests.gaussian_scenes import GaussianScene, random_scene
from tests.gsplat_comparison import Comparison, compare_renders
from training.checkpoints import load_checkpoint
from training.gaussians import activate


@dataclass
class Options(BenchmarkOptions):
    ckpt: Path | None = None
    """Checkpoint of a trainer."""
    data_dir: Path | None = None
    """The dataset that it was trained on."""


def views(options: Options) -> Iterator[tuple[str, GaussianScene, Tensor]]:
    """Yield the name, scene and photo [1, H, W, 3] of each view."""
    if options.quick:
        scene = random_scene(2000, seed=0, width=160, height=120)
        yield "random", scene, torch.rand(1, 120, 160, 3, generator=torch.Generator().manual_seed(1))
        return
    gaussians = load_checkpoint(options.ckpt).gaussians
    activated = activate(gaussians)
    dataset = load_scene(options.data_dir)
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
        yield dataset.image_names[image_id], scene, photo


def worst(comparison: Comparison) -> dict[str, object]:
    """Find the tensor whose gradient differs most, and by how much (relative norm)."""
    error, name = max((error, name) for name, error in comparison.gradient_errors.items())
    return {"error": error, "tensor": name}


def main(options: Options) -> None:
    with_gsplat = torch.cuda.is_available()
    if not options.quick and not (options.ckpt and options.data_dir and with_gsplat):
        raise InputError("This needs --ckpt, --data_dir and a CUDA GPU with gsplat: or try --quick.")
    report = Report("gsplat_agreement", "The CPU rasterizer and gsplat", options)
    report.say("Worst gradient error: relative norm of the tensor that differs most.")

    def error_and_tensor(value: dict[str, object]) -> str:
        return f"{value['error']:.1e} ({value['tensor']})"

    columns = {
        "view": str,
        "mode": str,
        "visible": count,
        "seen by one only": count,
        "other radii": count,
        "pixels off by > 1e-3": lambda share: f"{100 * share:.4f} %",
        "worst gradient error": error_and_tensor,
        "of ours against float64": error_and_tensor,
        "of gsplat against float64": error_and_tensor,
    }
    title = "Ours against gsplat:" if with_gsplat else "Ours against ours in float64, for want of gsplat:"
    table = report.table(title, columns)
    for name, scene, photo in views(options):

        def loss(colors: Tensor, alphas: Tensor, photo: Tensor = photo) -> Tensor:
            return photometric_loss(colors, photo.to(colors))

        for mode in ("classic", "antialiased"):
            how = {"sh_degree": 3, "rasterize_mode": mode, "absgrad": True, "loss": loss}
            ours = gsplat_comparison.run(scene, "cpu", **how)
            exact = gsplat_comparison.run(scene, "cpu", torch.float64, **how)
            theirs = gsplat_comparison.run(scene, "cuda", **how) if with_gsplat else exact
            found = compare_renders(ours, theirs)
            table.add(
                name,
                mode,
                found.visible,
                found.seen_by_one_only,
                found.differing_radii,
                found.outlier_pixels,
                worst(found),
                worst(compare_renders(ours, exact)),
                worst(compare_renders(theirs, exact)) if with_gsplat else None,
            )
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
