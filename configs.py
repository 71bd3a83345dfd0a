"""Options that all trainer scripts share, and the facts of each dataset.

What is tuned per scene (learning rates, thresholds, steps) stands at the end of each script, to be edited.

`Config` is flat; the class that declares an option is its group in `--help`, and the sentence under it is its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, overload


@dataclass
class DataOptions:
    """Choose which pictures and cameras to train on."""

    data_dir: str = "data/scene"
    """Dataset folder: images/, a COLMAP model in sparse/ or another program's file (docs/datasets.md), and masks/."""
    model_dir: str = ""
    """COLMAP model, such as sparse/1, or file of another program; if empty, the one in sparse/ of the most photos."""
    data_factor: float = 1.0
    """Pictures are scaled down by this factor, which may be fractional, into images_{factor}/."""
    test_every: int = 8
    """Every photo whose index is a multiple of this is held out; -1 where --test_after is used."""
    test_after: int = -1
    """Photos whose index is above this are held out; -1 where --test_every is used."""
    init_ply: bool = False
    """Start from points.ply in the model folder instead of COLMAP's points."""
    num_workers: int = 0
    """Threads that read pictures; 0 takes one per core, at most 16."""


@dataclass
class RunOptions:
    """Set how long to train, and what to evaluate, save and report on the way."""

    result_dir: str = "results/scene"
    """Folder that receives checkpoints, statistics, renderings and logs."""
    ckpt: str = ""
    """Evaluate this checkpoint instead of training."""
    init_ckpt: str = ""
    """Begin from the Gaussians of this checkpoint or 3DGS PLY file, at step 0 and without Adam's moments."""
    resume: bool = False
    """Continue from the newest valid checkpoint in --result_dir; start from the beginning where none was written."""
    new_photos: bool = False
    """With --resume: train on although photos were added to the dataset or removed, in the checkpoint's coordinates."""
    force: bool = False
    """Begin anew in a --result_dir that holds a run, whose results are removed."""
    save_every: str = "15m"
    """Save a checkpoint to resume from after so many steps (500) or so much time (90s, 15m, 2h); 0 for never."""
    keep: int = 2
    """How many of those stay, the newest ones; 0 keeps all. Checkpoints of --save_steps and the last always stay."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to render; auto takes CUDA where there is a GPU."""
    shares: list[int] = field(default_factory=list)
    """On several GPUs: in which proportion they hold the Gaussians, such as 2 1 1; if empty, equally."""
    seed: int = 42
    """The order of views, the first Gaussians' rotations, what strategies draw and random backgrounds follow it."""
    max_steps: int = 30_000
    """How many steps to train."""
    eval_steps: list[int] = field(default_factory=lambda: [7_000, 30_000])
    """Evaluate after these numbers of steps, and after the last."""
    save_steps: list[int] = field(default_factory=lambda: [7_000, 30_000])
    """Save a checkpoint and statistics after these numbers of steps, and after the last."""
    ply_steps: list[int] = field(default_factory=lambda: [7_000, 30_000])
    """Export a PLY file after these numbers of steps, and after the last."""
    video: bool = False
    """After the last step, or of an evaluated checkpoint, render a calm path through the scene to videos/."""
    trajectory: str = "flight"
    """Path of the video: flight (past the cameras), orbit, ellipse, spiral, or a JSON file of poses."""
    video_seconds: float = 0.0
    """Length of the video; 0 is as long as it takes to turn by at most 20 degrees a second."""
    video_size: list[int] = field(default_factory=list)
    """Width and height of the video in pixels; if empty, those of the first training picture."""
    video_depth: bool = False
    """Show depth beside the colours of the video."""
    timelapse: int = 0
    """Draw a held-out view after every so many steps, for a video of the training; 0 draws none."""
    viewer: list[int] | None = None
    """Show the scene in a browser while it trains, at this port, or 8080 where none is given."""
    viewer_host: str = "127.0.0.1"
    """By whom the viewer may be opened: from this machine alone, or 0.0.0.0 from everywhere."""
    steps_scaler: float = 1.0
    """Multiply every schedule given in steps by this factor, but for --save_every, --log_every and --profile."""
    log_every: int = 100
    """TensorBoard gets an entry every so many steps."""
    profile: int = 0
    """Trace so many steps, after the first ones, with torch.profiler, into profile/trace.json; 0 traces none."""
    lpips_net: Literal["alex", "vgg"] = "alex"
    """Network that the LPIPS metric uses."""
    color_correct: bool = False
    """Score held-out photos with corrected colours as well, as runs with --exposure do."""


@dataclass
class OptimizationOptions:
    """Set which loss Adam follows, and how."""

    batch_size: int = 1
    """Views per step, of each GPU; learning rates scale by its square root (Grendel, arXiv 2406.18533)."""
    view_window: int = 1
    """Arrange so many views at a time, drawn at random, so that neighbours see the same; 1 leaves them as drawn."""
    position_lr: float = 1.6e-4
    """Learning rate of means, times the scene scale; decays to 1 % at --max_steps."""
    scaling_lr: float = 5e-3
    """Learning rate of log scales."""
    quats_lr: float = 1e-3
    """Learning rate of quaternions."""
    opacities_lr: float = 5e-2
    """Learning rate of logit opacities."""
    sh0_lr: float = 2.5e-3
    """Learning rate of the constant spherical harmonic."""
    shN_lr: float = 2.5e-3 / 20
    """Learning rate of the other spherical harmonics."""
    ssim_lambda: float = 0.2
    """Weight of 1 - SSIM in the loss; L1 has the rest."""
    depth_loss: bool = False
    """Compare depths with those of the points that each photo saw, and of maps in depths/ (docs/datasets.md)."""
    depth_lambda: float = 1.0
    """Weight of the mean difference of inverse depths, times the scene scale, in the loss."""
    pose_opt: bool = False
    """Correct the pose of each training photo by a small turn and shift of its camera."""
    pose_opt_lr: float = 1e-4
    """Learning rate of turns in radians and shifts in scene scales; 0 in the first quarter, then decays to 1 %."""
    pose_opt_reg: float = 1.0
    """Weight of the mean square of corrections, in the same units, in the loss."""


@dataclass
class DensificationRules:
    """Set when and which Gaussians are added, removed and moved; the names and defaults are gsplat's."""

    strategy: Literal["default", "mcmc"] = "default"
    """default duplicates and splits by gradients; mcmc relocates and adds by opacity, up to --max_gaussians."""
    grow_grad2d: float = 2e-4
    """Gaussians whose mean screen-space gradient is above this are duplicated or split."""
    grow_scale3d: float = 0.01
    """Below this share of the scene scale a growing Gaussian is duplicated, above it split."""
    grow_scale2d: float = 0.05
    """Gaussians larger than this share of the picture are split (before --refine_scale2d_stop_iter)."""
    prune_opa: float = 0.005
    """Gaussians less opaque than this are removed, or relocated by mcmc."""
    prune_scale3d: float = 0.1
    """Gaussians larger than this share of the scene scale are removed (after the first opacity reset)."""
    prune_scale2d: float = 0.15
    """Gaussians larger than this share of the picture are removed (before --refine_scale2d_stop_iter)."""
    refine_scale2d_stop_iter: int = 0
    """Until this step sizes on the screen matter as well."""
    refine_start_iter: int = 500
    """Gaussians are refined after steps whose number, from 0, is above this."""
    refine_stop_iter: int = 15_000
    """From this step on nothing is refined or reset."""
    refine_every: int = 100
    """Gaussians are refined every so many steps."""
    reset_every: int = 3000
    """Opacities are reset every so many steps."""
    pause_refine_after_reset: int = 0
    """For so many steps after an opacity reset nothing is refined."""
    absgrad: bool = False
    """Grow by the mean of absolute gradients (AbsGS, arXiv 2404.10484); wants --grow_grad2d near 8e-4."""
    revised_opacity: bool = False
    """Opacity of split Gaussians follows arXiv 2404.06109."""
    max_gaussians: int = 0
    """Never start from or grow beyond this many Gaussians; 0 sets no bound, as --target_gaussians wants it."""
    target_gaussians: int = 0
    """With strategy default let growth end within 5 % of this many Gaussians, at the last refinement; 0 leaves it to
    --grow_grad2d. It excludes --max_gaussians: give that as 0 where the scene has one of its own, as demo has."""
    noise_lr: float = 5e5
    """Size of the noise that mcmc adds to means, in units of their learning rate."""
    opacity_reg: float | None = None
    """Weight of the mean opacity in the loss; 0.01 with mcmc and else 0 where nothing is given."""
    scale_reg: float | None = None
    """Weight of the mean scale in the loss; 0.01 with mcmc and else 0 where nothing is given."""

    @property
    def most_gaussians(self) -> int:
        """Return for how many Gaussians address space is reserved; 0: as many as memory could hold."""
        return self.max_gaussians or 2 * self.target_gaussians  # which growth passes by a twentieth at most

    @property
    def regularizers(self) -> tuple[float, float]:
        """Return the weights of the mean opacity and the mean scale in the loss, which hold where none is given too."""
        options = in_effect({name: getattr(self, name) for name in ("strategy", "opacity_reg", "scale_reg")})
        return options["opacity_reg"], options["scale_reg"]


@dataclass
class ModelOptions:
    """Set what the Gaussians are at first, and how they are drawn."""

    sh_degree: int = 3
    """Degree of the spherical harmonics."""
    sh_degree_interval: int = 1000
    """One more degree is used after so many steps."""
    init_opacity: float = 0.1
    """Opacity of the first Gaussians."""
    init_scale: float = 1.0
    """The first Gaussians are larger than their neighbourhood by this factor."""
    antialiased: bool = False
    """Compensate the opacity of small Gaussians (Mip-Splatting, arXiv 2311.16493)."""
    background: Literal["black", "white", "random", "sky"] = "black"
    """Behind the Gaussians; random trains before random colours and shows black, sky is learnt, by direction."""
    random_background: bool = False
    """The older way to say --background random."""
    exposure: Literal["none", "affine", "bilateral_grid"] = "none"
    """Learn for each training photo how it changes colours: by a matrix, or by a grid of them over the picture."""
    near_plane: float = 0.01
    """Gaussians nearer than this are not drawn."""
    far_plane: float = 1e10
    """Gaussians farther than this are not drawn."""

    def __post_init__(self) -> None:
        if self.random_background and self.background == "black":
            self.background = "random"


@dataclass
class HostOptions:
    """Choose what lies in host memory."""

    geometry: Literal["device", "host"] = "device"
    """Where means, scales, quaternions and opacities are; on the host they cost no device memory. Streamed with --state
    compact has them on the host, and this says what the device culls by: each of them, or boxes around 64."""


@dataclass
class StateOptions:
    """Choose the form that Gaussians and Adam's moments are kept in."""

    state: Literal["float32", "compact"] = "float32"
    """compact: 328 bytes a Gaussian, rounded at random, in place of 716 or more that are exact."""


@dataclass
class ForwardedOptions(StateOptions, HostOptions):
    """Choose what lies in host memory, and in which form all Gaussians are kept."""


# dataclass takes fields of the last base first.
@dataclass
class Config(ModelOptions, OptimizationOptions, RunOptions, DataOptions, DensificationRules):
    """Train a 3D Gaussian Splatting model of a COLMAP scene."""

    def with_scaled_steps(self: AnyConfig) -> AnyConfig:
        """Return the same options with `steps_scaler` applied to every schedule given in steps."""
        there = {name: getattr(self, name) for name in (*AT_STEPS, *EVERY_STEPS)}
        return replace(self, steps_scaler=1.0, **{name: scaled(name, there[name], self.steps_scaler) for name in there})


AnyConfig = TypeVar("AnyConfig", bound=Config)

# What `steps_scaler` scales: options that are numbers of steps, and those that are so many steps each time.
AT_STEPS = (
    *("max_steps", "eval_steps", "save_steps", "ply_steps"),
    *("refine_start_iter", "refine_stop_iter", "refine_scale2d_stop_iter", "pause_refine_after_reset"),
)
EVERY_STEPS = ("timelapse", "sh_degree_interval", "refine_every", "reset_every")


def scaled(name: str, steps: Any, factor: float) -> Any:
    """Return the value of an option of `AT_STEPS` or `EVERY_STEPS`, times a factor: the nearest whole number.

    An interval that would become 0 is 1: 0 means never, or is refused by `training.options`.
    """
    if isinstance(steps, list):
        return [scaled(name, each, factor) for each in steps]
    nearest = round(steps * factor)
    return max(nearest, 1) if name in EVERY_STEPS and steps > 0 else nearest


# What holds where nothing is given; the help of these options says so too.
MCMC_REGULARIZER = 0.01  # with mcmc, for the mean opacity as for the mean scale
SPLIT_THRESHOLD = 0.3


def in_effect(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options by name, with what holds where nothing was given and that follows from others.

    Args:
        options: Of a run, or of a cfg.yml that an older version wrote, which holds None there.
    """
    regularizer = MCMC_REGULARIZER if options.get("strategy") == "mcmc" else 0.0
    follows = {"opacity_reg": regularizer, "scale_reg": regularizer}
    if options.get("device_memory_budget") is None:  # which decides in its place
        follows["split_threshold"] = SPLIT_THRESHOLD
    return {**options, **{name: value for name, value in follows.items() if options.get(name, value) is None}}


# Where each dataset lies and how it is split; `python -m datasets.prepare` puts them there.
DATASETS: dict[str, dict[str, object]] = {
    "demo": {"data_dir": "data/city_block"},
    "rubble": {"data_dir": "data/mill19/rubble-pixsfm", "data_factor": 4.0, "test_every": 83},
    "building": {"data_dir": "data/mill19/building-pixsfm", "data_factor": 4.0, "test_every": 97},
    "sztu": {"data_dir": "data/GauU_Scene/SZTU", "data_factor": 3.4175, "test_every": 10},
    "lfls": {"data_dir": "data/GauU_Scene/LFLS", "data_factor": 3.4175, "test_every": 10},
    "sziit": {"data_dir": "data/GauU_Scene/SZIIT", "data_factor": 3.4175, "test_every": 10},
    "aerial": {
        "data_dir": "data/MatrixCity/aerial",
        "data_factor": 1.2,
        "test_every": -1,
        "test_after": 5620,  # 5621 training pictures, then 741
        "init_ply": True,
    },
    "residence": {
        "data_dir": "data/urban_scene_3d/residence-pixsfm",
        "data_factor": 4.0,
        "test_every": -1,
        "test_after": 2561,
    },
    "sciart": {
        "data_dir": "data/urban_scene_3d/sci-art-pixsfm",
        "data_factor": 4.0,
        "test_every": -1,
        "test_after": 2998,
    },
    "default": {},
}


@overload
def scene_config(scene: str, **hyperparameters: object) -> Config: ...


@overload
def scene_config(scene: str, config: type[AnyConfig], **hyperparameters: object) -> AnyConfig: ...


def scene_config(scene: str, config: Any = Config, **hyperparameters: object) -> Config:
    """Return the options of one scene: the facts of its dataset and the script's own hyperparameters.

    Args:
        scene: A key of `DATASETS`.
        config: `Config`, or a script's extension of it.
        hyperparameters: Fields of `config`.

    Returns:
        The options; results go to results/{scene}. Where `max_steps` is named, the model is evaluated, saved and
        exported at the last step, unless other steps are named.
    """
    at_the_end: dict[str, object] = {}
    if "max_steps" in hyperparameters:
        at_the_end = {name: [hyperparameters["max_steps"]] for name in ("eval_steps", "save_steps", "ply_steps")}
    options: dict[str, Any] = {"result_dir": f"results/{scene}", **DATASETS[scene], **at_the_end, **hyperparameters}
    return config(**options)


def scenes(config: type[AnyConfig], **tables: Mapping[str, object]) -> dict[str, AnyConfig]:
    """Return the options of each scene, from a script's table of them; as `scene_config`, scene by scene."""
    return {scene: scene_config(scene, config, **hyperparameters) for scene, hyperparameters in tables.items()}
