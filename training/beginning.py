"""The Gaussians that training begins with; before it does, growth must come to what is wanted, and all must fit."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from configs import Config
from datasets.kept_pictures import what_is_kept
from datasets.scene import Scene
from distributed.mesh import local_ranks
from errors import InputError, counted
from offload.adam.state import num_gaussians_of, stored_values
from offload.store.morton import morton_order
from strategies.target import TARGET_TOLERANCE
from trainers import Lack, Trainer, footprint_of, remedy
from training.calibration import print_last_verdict
from training.checkpoints import Checkpoint
from training.gaussians import PARAMETER_NAMES, initial_gaussians
from training.growth import shortfall
from training.joint_run import JointRun
from training.memory_estimate import (
    Memory,
    Needs,
    bytes_to_spare,
    check_memory,
    most_that_fit,
    needs,
    share_in_largest_view,
    what_stays,
)
from training.saving import Saving


class Beginning:
    """Gives the Gaussians that a run begins with: one per point of the scene, or those that it was given.

    Attributes:
        keep_bytes: Host memory that decoded pictures may take, known once the Gaussians have been asked for.
    """

    def __init__(
        self,
        cfg: Config,
        scene: Scene,
        trainer: Trainer,
        joint: JointRun,
        *,
        saving: Saving,
        evaluated: Checkpoint | None,
        given: dict[str, Tensor] | None,
        modules_bytes: int,
    ) -> None:
        """
        Args:
            cfg: Options, with steps_scaler applied.
            scene: What is trained on.
            trainer: Which trainer it is, with these options.
            joint: The processes that train together.
            saving: Whose state is resumed, if one is.
            evaluated: What is evaluated, and not trained; None: training begins, or goes on.
            given: Gaussians to begin with, as `training.gaussians.initial_gaussians` makes them; None: of points.
            modules_bytes: Device memory of what is trained beside the Gaussians.
        """
        self._cfg = cfg
        self._scene = scene
        self._trainer = trainer
        self._joint = joint
        self._saving = saving
        self._evaluated = evaluated
        self._given = given
        self._modules_bytes = modules_bytes
        self.keep_bytes = 0
        self._needs: Needs | None = None  # before training takes any

    @property
    def num_gaussians(self) -> int:
        """Count the Gaussians that training begins with, at all ranks."""
        if self._evaluated is not None:
            return num_gaussians_of(self._evaluated.state)
        if self._given is not None:
            return len(self._given["means"])
        resumed = self._saving.resumed
        return len(self._scene.points) if resumed is None else num_gaussians_of(resumed.state)

    def gaussians(self) -> dict[str, Tensor]:
        """Return one Gaussian per point of the scene, in Morton order; those of a checkpoint or file that is given.

        Where ranks train together each gets its own. Before that, print what training will take of host and device
        memory.

        Raises:
            InputError: There are more than --target_gaussians, or growth cannot come to it.
            NotEnoughMemory: It does not fit, with the option to change.
        """
        if self._evaluated is None:
            warning = self._check_growth()
            self._check_memory()
            print_last_verdict(self._joint.device)  # of benchmarks.calibrate, where it has been run
            if warning is not None:  # not where memory refuses the bound
                print(warning)
            if self._saving.resumed is not None:
                state = self._saving.own_state(self._saving.resumed)
                return {name: stored_values(state, name) for name in PARAMETER_NAMES}
        return self._joint.own_rows(self._all_gaussians())

    def _all_gaussians(self) -> dict[str, Tensor]:
        """Return the Gaussians of all ranks: every one makes the same, or reads them."""
        if self._evaluated is not None:
            return self._evaluated.gaussians
        if self._given is not None:
            gaussians, self._given = self._given, None
            return gaussians
        order = morton_order(torch.from_numpy(self._scene.points)).numpy()
        return initial_gaussians(
            self._scene.points[order],
            self._scene.points_rgb[order],
            sh_degree=self._cfg.sh_degree,
            init_opacity=self._cfg.init_opacity,
            init_scale=self._cfg.init_scale,
            seed=self._cfg.seed,
        )

    def _check_growth(self) -> str | None:
        """Refuse a target that a run cannot come to; return where growth ends below that of a resumed run, or a bound.

        A resumed run may have reached what its target allows, and a bound is no promise: neither is refused.
        """
        cfg, begun, resumed = self._cfg, self.num_gaussians, self._saving.resumed
        target = cfg.target_gaussians
        if 0 < target < begun and resumed is None:
            instead = "" if cfg.init_ckpt else ", or in its place --max_gaussians, which takes fewer of the points"
            raise InputError(
                f"--target_gaussians {target:,} is below the {counted(begun, 'Gaussian')} that training begins with: "
                f"give more{instead}."
            )
        steps_done = 0 if resumed is None else resumed.steps
        option, wanted = "target_gaussians", target
        if cfg.strategy == "mcmc":
            option, wanted = "max_gaussians", cfg.max_gaussians
        elif resumed is not None:
            wanted = math.ceil((1 - TARGET_TOLERANCE) * target)
        lack = shortfall(cfg, steps_done, begun, wanted) if steps_done < cfg.max_steps else None
        if lack is None:
            return None
        if option == "target_gaussians" and resumed is None:
            leads = f", which leads to {lack.reached:,}" if lack.reached > begun else ""
            raise InputError(
                f"--target_gaussians {target:,} cannot be reached from {counted(begun, 'Gaussian')}: "
                f"{lack.cause}{leads}; {lack.remedy}."
            )
        return (
            f"Warning: growth will end below --{option} {getattr(cfg, option):,}, with "
            f"{counted(lack.reached, 'Gaussian')}: {lack.cause}; {lack.remedy}."
        )

    def _check_memory(self) -> None:
        """Print what training will take of each memory, and what of that stays where.

        Raises:
            NotEnoughMemory: It does not fit, with the option to change.
        """
        cfg, joint = self._cfg, self._joint
        all_needs, share, where = self._all_needs(), self._share, ""
        option = "target_gaussians" if cfg.target_gaussians > 0 else "max_gaussians"
        if joint.ranks is not None:
            where = f"For a rank that holds {100 * share:.0f} % of the Gaussians:\n"
        begun, most = self.num_gaussians, getattr(cfg, option)
        told = where + check_memory(
            all_needs,
            begun,
            most,
            option,
            share,
            what_helps=lambda memory: remedy(self._trainer, cfg, self.lack(memory)),
        )
        # That of the rank which has the least room for what it is to hold: where it has none, all end.
        print(min(joint.gather((most_that_fit(all_needs, share), told)))[1])
        stays = what_stays(cfg, joint.device, math.ceil(share * begun), "its" if where else "all")
        if stays is not None:
            print(stays)
        self.keep_bytes = min(joint.gather(bytes_to_spare(all_needs, begun, most, share)))
        if joint.speaks and (kept := what_is_kept(self._scene, self.keep_bytes)):
            print(kept)

    @property
    def _share(self) -> float:
        """Return the share of the Gaussians that this process holds."""
        ranks = self._joint.ranks
        return 1.0 if ranks is None else ranks.shares[ranks.rank]

    @cached_property
    def _share_in_view(self) -> float:
        return share_in_largest_view(self._scene, self._joint.size * self._cfg.batch_size)

    def lack(self, memory: Memory, held: int = 0, *, ran_out: bool = False) -> Lack:
        """Say what is known where a memory is too small.

        Args:
            memory: Which one.
            held: How many Gaussians this process has; 0: those that it begins with.
            ran_out: It is no estimate.
        """
        others = {} if self._needs is None else self._needs.by_memory
        other = others.get("host" if memory == "device" else "device")
        room = math.inf if other is None else other.room(held or math.ceil(self._share * self.num_gaussians))
        return Lack(memory, self._share_in_view, room, self._joint.size, ran_out)

    def _all_needs(self) -> Needs:
        """Return what training takes of each memory, and what there is."""
        cfg, joint = self._cfg, self._joint
        self._needs = needs(
            footprint_of(self._trainer, cfg, joint.size),
            self._share_in_view,
            cfg.batch_size * max(camera.width * camera.height for camera in self._scene.cameras),
            joint.device,
            modules_bytes=self._modules_bytes,
            num_processes=1 if joint.ranks is None else local_ranks(),
        )
        return self._needs
