"""What each option of the trainers changes: the model that is made, or only how, where and what of it is told.

Three places ask for that, each another question:

| role      | resuming tells of another value | ranks may differ | with another value it is another run |
|-----------|---------------------------------|------------------|--------------------------------------|
| `MODEL`   | yes                             | no               | yes                                  |
| `RESULTS` | no                              | no               | yes, its files or figures are others |
| `SOURCE`  | no, photos are compared         | yes              | yes                                  |
| `MACHINE` | no                              | yes              | no                                   |
| `COURSE`  | no                              | no               | no                                   |

`training/saving.py` asks when it resumes, `training/agreement.py` before ranks begin, `comparing/runs.py` before
compare.py goes on with a folder. The options that `benchmarks/quality.py` gives to all its runs are none of these: no
variant may have one, whatever its role.
"""

from __future__ import annotations

from enum import Enum, auto


class Role(Enum):
    """Say what an option changes."""

    MODEL = auto()  # what is computed
    RESULTS = auto()  # which files a run leaves, and what is measured of it: no bit of the model
    SOURCE = auto()  # where this machine has what the run reads, and on what it computes
    MACHINE = auto()  # what else is this machine's own
    COURSE = auto()  # how a run begins or goes on, what is kept on the way, and who watches


# Every option of all scripts. tests/test_roles.py says that none is missing.
ROLES: dict[Role, tuple[str, ...]] = {
    Role.SOURCE: ("data_dir", "model_dir", "ckpt", "init_ckpt", "device"),
    Role.MACHINE: ("result_dir", "num_workers"),
    Role.COURSE: (
        *("resume", "new_photos", "force", "save_every", "keep"),
        *("log_every", "viewer", "viewer_host"),
    ),
    Role.RESULTS: (
        *("eval_steps", "save_steps", "ply_steps", "profile", "lpips_net", "color_correct"),
        *("video", "trajectory", "video_seconds", "video_size", "video_depth", "timelapse"),
        *("shares", "resident_share"),  # where rows lie
    ),
    Role.MODEL: (
        *("data_factor", "test_every", "test_after", "init_ply", "seed", "max_steps", "steps_scaler"),
        *("batch_size", "view_window", "ssim_lambda", "depth_loss", "depth_lambda"),
        *("position_lr", "scaling_lr", "quats_lr", "opacities_lr", "sh0_lr", "shN_lr"),
        *("pose_opt", "pose_opt_lr", "pose_opt_reg"),
        *("strategy", "grow_grad2d", "grow_scale3d", "grow_scale2d", "prune_opa", "prune_scale3d", "prune_scale2d"),
        *("refine_scale2d_stop_iter", "refine_start_iter", "refine_stop_iter", "refine_every", "reset_every"),
        *("pause_refine_after_reset", "absgrad", "revised_opacity", "max_gaussians", "target_gaussians"),
        *("noise_lr", "opacity_reg", "scale_reg"),
        *("sh_degree", "sh_degree_interval", "init_opacity", "init_scale", "antialiased", "near_plane", "far_plane"),
        *("background", "random_background", "exposure"),
        *("geometry", "state", "moments", "adam", "split_threshold", "device_memory_budget"),
    ),
}

TOLD_WHEN_RESUMED = ROLES[Role.MODEL]
OF_A_MACHINE = (*ROLES[Role.SOURCE], *ROLES[Role.MACHINE])  # which ranks need not have alike
OF_NO_OTHER_RUN = (*ROLES[Role.MACHINE], *ROLES[Role.COURSE])
