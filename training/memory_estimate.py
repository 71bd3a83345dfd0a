"""How much memory training will take, from the number of Gaussians; known before anything is allocated.

Bytes of device memory for each Gaussian in view, at SH degree 3, of the trainers that send rows there:

    appearance row  192 x 3   values, gradient, rows of the next view
    geometry row     48 x 3   the same, where geometry is on the host;
                     44 x 3   else: values, gradient, a gathered copy

Where harmonics have no gradient there (`offload/adam/stored_harmonics.py`), an appearance row takes 192 x 2, or packed
196 x 2, or 196 where geometry stays (`offload/pipelines/device_reading.py`), slopes of its colours (36), and what the
gradient is made of. Compact rows of two views of the streamed trainer, and what is known of both, are given up where
there is no room, at the end of the backward pass, when slopes have been given back. Beside them:

    rendering           200   at the end of the backward pass: numbers, position, conic, colour, opacity, depth and
                              radii on the screen, activated scales and opacities, gradients of those

Bytes per pixel: the photos of this view and the next (3 each), this one's in float32, where the rendering's gradient
takes its place (12), the rendering (12), SSIM's derivatives (36; on a GPU those of a band of a large picture), alphas
and their gradient, last ids (12): 78, and 58 of 1920x1080 pixels, counted as 100.

Nothing takes memory for all Gaussians beside the trainer's own: checkpoints and PLY files are written block by block.
But those that training starts with stand twice until they are stored, 236 bytes as read; and a host store that grows
or is re-ordered takes up to a tenth more.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from datasets.free_memory import SPARED_PART
from datasets.scene import Scene
from datasets.view_order import sample_of, sees
from errors import NotEnoughMemory, counted, format_bytes
from offload.adam.harmonics import MADE_COLUMNS
from offload.culling.balls import Balls
from offload.culling.boxes import Boxes
from offload.models.device_room import DeviceRoom, bytes_there
from offload.models.geometry_device import BYTES as GEOMETRY_BYTES
from offload.pipelines.arena import IDLE, USABLE
from offload.pipelines.residents import BYTES as RESIDENT_BYTES
from offload.pipelines.streamed import SPARE
from offload.store.host_store import PEAK
from offload.store.layout import (
    GROUP_NAMES,
    LAST_STEP_BYTES,
    Moments,
    StateFormat,
    compact_bytes,
    num_columns,
    row_bytes,
)
from offload.tiles.budget import PIXEL_BYTES
from training.memory import available_bytes

Memory = Literal["device", "host"]

# Of a Gaussian in view. `offload.tiles.budget` begins with 180, of a row in a tile, and counts ids for all of the view.
RENDERING_BYTES = 200
MOVING_ROWS = 3  # tensors of a view's rows on the device at once
# Pinned rows on the host for each row in view: two downloads, with a quarter to spare, and as many of the rows that the
# next view needs too, here taken for a fifth.
STAGING_ROWS = 3
SLOTS = 3 * (1 + 1 / SPARE)  # rows of the streamed trainer on the device for each row in view
ID_BYTES = 8
SLOPE_BYTES = 36  # of colours that are made of harmonics as they are stored, where a step has one view
GEOMETRY_COPIES = 40  # of means, quats and sh0 of compact rows, which rendering takes beside what it activates
MADE_BYTES = 4 * MADE_COLUMNS  # of what the gradient of harmonics is made of
NUMBERS_BYTES = 40  # ids, last_step and places of a row in two views
SAMPLE = 10_000  # points whose visibility stands for all
NO_ROOM = (  # as `Need.slows` tells
    "GPU has no room for the rows of the largest views beside their rendering: these stay on the host, and steps on "
    "them take longer."
)


@dataclass(frozen=True)
class Footprint:
    """Hold the bytes that one Gaussian takes while a trainer runs."""

    host_at_start: int  # while the Gaussians that training starts with are stored
    device_at_start: float
    host: int  # later
    host_in_view: int  # more, if the largest view shows it
    device: float
    device_in_view: int
    device_while_changed: int = 0  # more, while Gaussians are added or removed and no view is rendered
    # Of `device_in_view`, what is given up where there is no room: rows of large views stay on the host, and steps on
    # them take longer.
    device_spared_in_view: int = 0
    largest_part: float = 1.0  # share of the Gaussians above which a view is rendered in parts

    def while_training(self, share_in_view: float, *, sparing: bool = False) -> tuple[float, float]:
        """Return the bytes of host and of device memory for each Gaussian.

        Args:
            share_in_view: That a view shows of them at most.
            sparing: Give up what can be.
        """
        share_in_view = min(share_in_view, self.largest_part)
        in_view = self.device_in_view - (self.device_spared_in_view if sparing else 0)
        of_view = max(share_in_view * in_view, self.device_while_changed)
        return self.host + share_in_view * self.host_in_view, self.device + of_view


@dataclass(frozen=True)
class Need:
    """Hold what training takes of one memory, and what there is."""

    memory: str  # its name
    starting_bytes_per_gaussian: float  # while the Gaussians that training starts with are stored
    bytes_per_gaussian: float  # later, at the least
    other_bytes: float  # later
    free_bytes: int
    bytes_at_speed: float = 0.0  # in place of `bytes_per_gaussian`, where there is room; 0: no more

    def bytes(self, num_gaussians: int) -> float:
        """Return what training takes at the least once it has grown to so many."""
        return num_gaussians * self.bytes_per_gaussian + self.other_bytes

    def slows(self, num_gaussians: int) -> bool:
        """Tell whether there is no room for half of what makes steps on so many fast, the rows of one view of two."""
        makes_fast = self._bytes_at_speed(num_gaussians) - self.bytes(num_gaussians)
        return 2 * self.lacking_bytes(num_gaussians) > makes_fast

    def lacking_bytes(self, num_gaussians: int) -> float:
        """Return how much there lacks of the room for all that makes steps on so many fast."""
        if self.bytes_at_speed <= self.bytes_per_gaussian:  # nothing does
            return 0.0
        return max(self._bytes_at_speed(num_gaussians) - (USABLE * self.free_bytes - IDLE), 0.0)

    def expected_bytes(self, num_gaussians: int) -> float:
        """Return what training will take of what is free once it has grown to so many."""
        return max(self.bytes(num_gaussians), min(self._bytes_at_speed(num_gaussians), self.free_bytes))

    def _bytes_at_speed(self, num_gaussians: int) -> float:
        return num_gaussians * max(self.bytes_at_speed, self.bytes_per_gaussian) + self.other_bytes

    def bytes_from_start(self, num_gaussians: int) -> float:
        """Return what starting with so many and training them takes."""
        return max(num_gaussians * self.starting_bytes_per_gaussian, self.bytes(num_gaussians))

    def most_gaussians(self) -> int:
        """Return how many Gaussians can be trained at most."""
        if self.bytes_per_gaussian == 0:
            return sys.maxsize
        return max(int((self.free_bytes - self.other_bytes) / self.bytes_per_gaussian), 0)

    def room(self, num_gaussians: int) -> float:
        """Return the bytes that there are for each of so many Gaussians."""
        return (self.free_bytes - self.other_bytes) / max(num_gaussians, 1)


@dataclass(frozen=True)
class Needs:
    """Hold what training takes of the host's memory, and of the device's."""

    host: Need
    device: Need | None  # None: on the CPU, whose memory is both

    @property
    def by_memory(self) -> dict[Memory, Need]:
        """Return them by what `trainers` calls them."""
        return {"host": self.host} if self.device is None else {"host": self.host, "device": self.device}

    def most_gaussians(self) -> int:
        """Return how many Gaussians can be trained at most."""
        return min(need.most_gaussians() for need in self.by_memory.values())


def gpu_only(
    sh_degree: int, adam: Literal["dense", "deferred"], state: StateFormat = "float32", batch_size: int = 1
) -> Footprint:
    """Return that of simple_trainer.py.

    With dense Adam: parameters, gradients, moments; activated scales and opacities with theirs. With deferred Adam:
    parameters and moments; values and gradients of geometry in view, those of harmonics where a step has several views,
    and ids of the rows in view and of those of the next one.

    Args:
        sh_degree: Degree of the spherical harmonics.
        adam: Which Adam.
        state: The form of rows.
        batch_size: Views per step, those of all ranks.
    """
    parameters = parameter_bytes(sh_degree)
    if state == "compact":
        rows = Balls.BYTES + compact_bytes(sh_degree, tight=True)
        return Footprint(
            host_at_start=parameters,  # as read
            device_at_start=rows,
            host=0,
            host_in_view=0,
            device=rows,
            device_in_view=_compact_view_bytes(sh_degree, batch_size, holds_geometry=True)
            + 2 * ID_BYTES
            + RENDERING_BYTES,
            device_while_changed=row_bytes("appearance", sh_degree, state=state),
        )
    if adam == "deferred":
        row, rows = _row_bytes(("appearance",), sh_degree), GEOMETRY_BYTES + row_bytes("appearance", sh_degree)
        harmonics = SLOPE_BYTES if batch_size == 1 else 2 * row  # values and gradients, where they are copied
        return Footprint(
            host_at_start=parameters,  # as read
            device_at_start=rows,
            host=0,
            host_in_view=0,
            device=rows,
            device_in_view=harmonics + 3 * 44 + 2 * 12 + 2 * ID_BYTES + RENDERING_BYTES,
            device_while_changed=row,
        )
    return Footprint(
        host_at_start=parameters,  # as read
        device_at_start=parameters,
        host=0,
        host_in_view=0,
        device=4 * parameters + 32,
        device_in_view=RENDERING_BYTES,
    )


def baseline(sh_degree: int) -> Footprint:
    """Return that of simple_trainer_hybrid_baseline.py: gradients of all rows lie on the host too."""
    row, store = _row_bytes(GROUP_NAMES, sh_degree), sum(row_bytes(group, sh_degree) for group in GROUP_NAMES)
    return Footprint(
        host_at_start=store + parameter_bytes(sh_degree),
        device_at_start=0,
        host=int(PEAK * store) + row,
        host_in_view=int(STAGING_ROWS * row),
        device=0,
        device_in_view=2 * row + RENDERING_BYTES,
    )


def optimized(
    sh_degree: int, geometry: Literal["device", "host"], state: StateFormat = "float32", batch_size: int = 1
) -> Footprint:
    """Return that of simple_trainer_hybrid_optimized.py.

    Geometry on the device lies there with its moments; in a compact state it stands there twice while rows are added or
    removed.

    Args:
        sh_degree: Degree of the spherical harmonics.
        geometry: Where it is.
        state: The form of rows.
        batch_size: Views per step, those of all ranks.
    """
    return _forwarded(sh_degree, geometry, state, is_made=batch_size == 1)


def _forwarded(sh_degree: int, geometry: Literal["device", "host"], state: StateFormat, *, is_made: bool) -> Footprint:
    """Return that of rows that the host updates; `is_made` tells whether the gradient of harmonics is made there."""
    on_device, is_float32 = geometry == "device", state == "float32"
    groups = ("appearance",) if on_device else GROUP_NAMES
    store = sum(row_bytes(group, sh_degree, state=state) for group in groups)
    of_geometry = 0 if on_device else 4 * num_columns("geometry", sh_degree, state)
    staged = 4 * num_columns("appearance", sh_degree, state)
    moving = MOVING_ROWS * staged
    if is_made:
        arrived = staged if is_float32 else row_bytes("appearance", sh_degree, state=state)
        views = 1 if on_device and not is_float32 else 2  # whose rows are there at once
        # These; sh0's leaf and gradient, where geometry has none; a copy of means, where rows have them.
        moving = views * arrived + SLOPE_BYTES + MADE_BYTES + (2 * 12 if is_float32 else 0) + (0 if on_device else 12)
        staged = MADE_BYTES
    compact_geometry = row_bytes("geometry", sh_degree, state="compact", tight=True)
    rows, in_view = (GEOMETRY_BYTES, 3 * 44) if is_float32 else (compact_geometry, 2 * 64)
    if not on_device:
        in_view = MOVING_ROWS * of_geometry + (0 if is_float32 else GEOMETRY_COPIES)
    return Footprint(
        host_at_start=store + parameter_bytes(sh_degree),
        device_at_start=rows if on_device else 0,
        host=int(PEAK * store),
        host_in_view=int(STAGING_ROWS * (of_geometry + staged)),
        device=rows if on_device else 0,
        device_in_view=moving + in_view + RENDERING_BYTES,
        device_while_changed=compact_geometry if on_device and not is_float32 else 0,
    )


def split(
    sh_degree: int, geometry: Literal["device", "host"], largest_part: float, state: StateFormat = "float32"
) -> Footprint:
    """Return that of simple_trainer_hybrid_optimized_split.py.

    Args:
        sh_degree: Degree of the spherical harmonics.
        geometry: Where it is.
        largest_part: Share of the Gaussians above which a view is rendered in parts.
        state: The form of rows.
    """
    return replace(_forwarded(sh_degree, geometry, state, is_made=False), largest_part=largest_part)


def streamed(
    sh_degree: int,
    geometry: Literal["device", "host"],
    moments: Moments,
    state: StateFormat = "float32",
    batch_size: int = 1,
) -> Footprint:
    """Return that of simple_trainer_hybrid_streamed.py.

    With geometry on the device: rows of three views there with their moments, and gradients. With geometry on the host:
    parameters of two views, gradients, and numbers of rows. A compact state has all rows on the host in either place,
    and on the device those of two views, what rendering takes of one and its gradients, and what culling needs.

    Args:
        sh_degree: Degree of the spherical harmonics.
        geometry: Where it is.
        moments: Their precision.
        state: The form of rows.
        batch_size: Views per step, those of all ranks.
    """
    on_device = geometry == "device"
    if state == "compact":
        store = compact_bytes(sh_degree)
        bounds = Balls.BYTES if on_device else Boxes.BYTES
        return Footprint(
            host_at_start=store + parameter_bytes(sh_degree),
            device_at_start=bounds,
            host=int(PEAK * store),
            host_in_view=0,
            device=bounds,
            device_in_view=2 * store
            + _compact_view_bytes(sh_degree, batch_size, holds_geometry=False)
            + NUMBERS_BYTES
            + RENDERING_BYTES,
            device_spared_in_view=2 * store + NUMBERS_BYTES - 2 * ID_BYTES + (SLOPE_BYTES if batch_size == 1 else 0),
        )
    groups = ("appearance",) if on_device else GROUP_NAMES
    row, appearance = _row_bytes(groups, sh_degree), row_bytes("appearance", sh_degree, moments)
    store = appearance if on_device else appearance + row_bytes("geometry", sh_degree, pad_to_cache_line=True)
    slots = int(SLOTS * (store - LAST_STEP_BYTES)) + 3 * 44 if on_device else 2 * row + NUMBERS_BYTES
    return Footprint(
        host_at_start=store + parameter_bytes(sh_degree),
        device_at_start=GEOMETRY_BYTES if on_device else 0,
        host=int(PEAK * store),
        host_in_view=0,
        device=GEOMETRY_BYTES + LAST_STEP_BYTES if on_device else 0,
        device_in_view=slots + row + RENDERING_BYTES,
    )


def with_residents(footprint: Footprint, sh_degree: int, share: float) -> Footprint:
    """Return a footprint with that of this share of all compact rows, which stay on the device from view to view.

    They are given back while Gaussians are added or removed. All stay only while there is room, which none is kept for.
    """
    if share in (0, 1):
        return footprint
    return replace(footprint, device=footprint.device + math.ceil(share * compact_bytes(sh_degree)) + RESIDENT_BYTES)


def what_stays(cfg: Any, device: torch.device, num_gaussians: int, whose: str) -> str | None:
    """Return a sentence on the Gaussians that stay on the device, or could; None of trainers that keep none there.

    Args:
        cfg: Options of a trainer.
        device: Where views are rendered.
        num_gaussians: That this process starts with.
        whose: "all" Gaussians of a run, or "its" of a rank.
    """
    share, state = getattr(cfg, "resident_share", None), getattr(cfg, "state", None)
    if share is None or state != "compact":
        return None
    if device.type != "cuda":
        return "Without a GPU --resident_share saves nothing: all rows are in this machine's memory." if share else None
    needed = bytes_there(num_gaussians, sh_degree=cfg.sh_degree, geometry=cfg.geometry)
    has_room = DeviceRoom(device).holds_at_start(needed)
    if share == 1 and has_room:
        return (
            f"While the GPU has room for {whose} Gaussians they stay there "
            f"({compact_bytes(cfg.sh_degree, tight=True)} bytes each, beside what is said above), and take no host "
            "memory."
        )
    if share > 0:
        return (
            f"Of {whose} Gaussians up to {100 * share:g} % stay on the GPU, those that views show most often, as far "
            "as its memory reaches."
        )
    if not has_room:
        return None
    return (
        f"The GPU has room for {whose} Gaussians that training starts with: with --resident_share 1 they stay there "
        "while it has, and steps are faster."
    )


def parameter_bytes(sh_degree: int) -> int:
    """Return the bytes of the parameters of one Gaussian: 236 at SH degree 3."""
    return 4 * (11 + 3 * (sh_degree + 1) ** 2)


def _compact_view_bytes(sh_degree: int, batch_size: int, *, holds_geometry: bool) -> int:
    """Return the bytes of values and gradients of a compact row in view, and of what rendering takes of geometry.

    Where a step has one view, and only there, harmonics have slopes in their place.

    Args:
        sh_degree: Degree of the spherical harmonics.
        batch_size: Views per step.
        holds_geometry: Whether its values are there beside what rendering takes.
    """
    values = {group: 4 * num_columns(group, sh_degree, "compact") for group in GROUP_NAMES}
    of_geometry = GEOMETRY_COPIES + values["geometry"] * (2 if holds_geometry else 1)
    return of_geometry + (SLOPE_BYTES if batch_size == 1 else 2 * values["appearance"])


def _row_bytes(groups: tuple[str, ...], sh_degree: int) -> int:
    return 4 * sum(num_columns(group, sh_degree) for group in groups)


def share_in_largest_view(scene: Scene, batch_size: int) -> float:
    """Return the share of a scene's points that the training views of one step show at most, counted on a sample.

    Args:
        scene: The dataset.
        batch_size: Views per step.
    """
    points = sample_of(scene.points, SAMPLE)
    largest = 0.0
    for index in scene.train_ids:
        camera = scene.cameras[scene.camera_indices[index]]
        inside = sees(points, np.linalg.inv(scene.camtoworlds[index]), camera.K, camera.width, camera.height)
        largest = max(largest, inside.mean())
    return min(1.0, batch_size * largest)


def needs(
    footprint: Footprint,
    share_in_view: float,
    num_pixels: int,
    device: torch.device,
    *,
    modules_bytes: int = 0,
    num_processes: int = 1,
) -> Needs:
    """Return what a trainer takes of the host's and of the device's memory; on the CPU they are one.

    Args:
        footprint: Of the trainer.
        share_in_view: Of the Gaussians, in the largest view.
        num_pixels: Of the pictures of one step.
        device: Where views are rendered.
        modules_bytes: Of what is trained beside the Gaussians, on the device.
        num_processes: That share the host's memory, and have a device each.
    """
    others = num_pixels * PIXEL_BYTES + modules_bytes
    free = available_bytes(torch.device("cpu")) // num_processes
    if device.type == "cpu":
        of_host, of_device = footprint.while_training(share_in_view)
        at_start = footprint.host_at_start + footprint.device_at_start
        return Needs(Need("memory", at_start, of_host + of_device, others, free), None)
    return needs_beside_gpu(footprint, share_in_view, others, free, available_bytes(device))


def needs_beside_gpu(
    footprint: Footprint, share_in_view: float, other_bytes: float, free_on_host: int, free_on_gpu: int
) -> Needs:
    """Return what a trainer takes of the memory of a host and of its GPU.

    Args:
        footprint: Of the trainer.
        share_in_view: Of the Gaussians, in the largest view.
        other_bytes: On the GPU, for pictures and for what is trained beside the Gaussians.
        free_on_host: Bytes that there are.
        free_on_gpu: The same of the GPU.
    """
    of_host, of_device = footprint.while_training(share_in_view, sparing=True)
    _, at_speed = footprint.while_training(share_in_view)
    return Needs(
        Need("host memory", footprint.host_at_start, of_host, 0, free_on_host),
        Need("GPU memory", footprint.device_at_start, of_device, other_bytes, free_on_gpu, at_speed),
    )


def check_memory(
    all_needs: Needs,
    num_gaussians: int,
    max_gaussians: int,
    option: str = "max_gaussians",
    share: float = 1.0,
    *,
    what_helps: Callable[[Memory], str],
) -> str:
    """Refuse what cannot fit.

    Args:
        all_needs: Of a trainer.
        num_gaussians: That training starts with, at all ranks.
        max_gaussians: The number that an option lets the model grow to, at all ranks; 0 where none does.
        option: Which one.
        share: Of them that this process holds.
        what_helps: Returns what to change where a memory is too small.

    Returns:
        Lines for the user: what these Gaussians take, what the allowed number takes or could be, and whether memory is
        short of what makes steps fast.

    Raises:
        NotEnoughMemory: The Gaussians at hand do not fit, or those that the option lets it grow to.
    """
    whose = "" if share == 1.0 else " for its share"
    held, held_later = math.ceil(share * num_gaussians), math.ceil(share * max_gaussians)
    for memory, need in all_needs.by_memory.items():
        needed = need.bytes_from_start(held)
        if needed > need.free_bytes:
            raise NotEnoughMemory(
                f"Training {counted(num_gaussians, 'Gaussian')} takes about {format_bytes(needed)} of "
                f"{need.memory}{whose}, and {format_bytes(need.free_bytes)} are free: {what_helps(memory)}."
            )
    most = most_that_fit(all_needs, share)
    if max_gaussians > most:
        need = min(all_needs.by_memory.values(), key=Need.most_gaussians)
        raise NotEnoughMemory(
            f"--{option} {max_gaussians:,} would take about {format_bytes(need.bytes(held_later))} of "
            f"{need.memory}{whose}, and {format_bytes(need.free_bytes)} are free: set it to at most {most:,}."
        )
    listed = _listed(all_needs, lambda need: max(need.bytes_from_start(held), need.expected_bytes(held)))
    lines = [f"Memory for {counted(num_gaussians, 'Gaussian')}{whose}: {listed}."]
    if max_gaussians > num_gaussians:
        listed = _listed(all_needs, lambda need: need.expected_bytes(held_later))
        verb = "allows" if option == "max_gaussians" else "asks"
        lines.append(f"Memory for {max_gaussians:,}{whose}, as --{option} {verb}: {listed}.")
    elif max_gaussians == 0:
        lines.append(f"About {most:,} would fit.")
    device = all_needs.device
    if device is not None and device.slows(max(held, held_later)):
        lines.append(f"The {NO_ROOM}")
    return "\n".join(lines)


def most_that_fit(all_needs: Needs, share: float = 1.0) -> int:
    """Return how many Gaussians, at all ranks, training can hold where this process has a share of them."""
    return int(all_needs.most_gaussians() / share)


def bytes_to_spare(all_needs: Needs, num_gaussians: int, max_gaussians: int, share: float = 1.0) -> int:
    """Return the bytes of host memory that this process may hold to save time: a small part of what training leaves.

    Args:
        all_needs: Of a trainer.
        num_gaussians: That training starts with, at all ranks.
        max_gaussians: The number that an option lets the model grow to, at all ranks; 0 where none does.
        share: Of them that this process holds.
    """
    host = all_needs.host
    needed = max(host.bytes_from_start(math.ceil(share * num_gaussians)), host.bytes(math.ceil(share * max_gaussians)))
    return max(int(host.free_bytes - needed), 0) // SPARED_PART


def _listed(all_needs: Needs, needed: Callable[[Need], float]) -> str:
    return ", ".join(
        f"{format_bytes(needed(need))} of {need.memory} ({format_bytes(need.free_bytes)} free)"
        for need in all_needs.by_memory.values()
    )
