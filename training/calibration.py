"""Which trainer a machine trains a scene with in the shortest time, and where the last finding is kept.

`python -m benchmarks.calibrate` measures the speeds. A step takes about what its slowest part takes: the host, which
launches; the device, which renders and moves what lies in its memory; the link; and the host's memory.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from offload.models.device_room import AT_START, bytes_there
from offload.pipelines.arena import USABLE
from offload.tiles.budget import PIXEL_BYTES
from trainers import TRAINERS
from training.memory_estimate import NO_ROOM, needs_beside_gpu

STREAMED = "simple_trainer_hybrid_streamed"  # the script whose device reads and writes rows of the host
# Launching the kernels of a step takes the host so many times what launching those of rendering does. Of
# benchmarks.train_step with 1 million on H200s with 16 threads, where that took 2.6 and 2.7 ms, less what the device
# moves for all Gaussians: 3.7 to 4.2 ms with dense Adam, 6.0 deferred and 4.1 in a compact state; streamed 6.9 and 7.3,
# compact 5.3 to 5.6; 7.8 with Adam on the CPU. Deferred as the ratio to compact rows at 4 million says.
LAUNCHES = {
    "gpu_only": 1.25,
    "gpu_only_deferred": 2.0,
    "gpu_only_compact": 1.55,
    "streamed": 2.5,
    "streamed_bfloat16": 2.5,
    "streamed_geometry_on_host": 2.65,
}
LAUNCHES_STREAMED = 2.05  # of other streamed trainers
LAUNCHES_BESIDE_CPU = 2.95  # of the trainers whose CPU runs Adam
DENSE = 0.7  # of the speed of copies, at which dense Adam and what goes with it visit all Gaussians (18 and 40 million)
# Bytes over the link, of a row, that wait for its gradients: nothing is rendered meanwhile.
AFTER_RENDERING = {"streamed_geometry_on_host": 768}
# Of the speed of copies, at which a view's rows are read where they lie on the host, while it is rendered: 12.9 ms for
# those of 1.15 million (benchmarks/results/bigcity_h200.md).
IN_PLACE = 0.53
# Values of --resident_share that are tried beside none: those that were measured.
RESIDENT_SHARES = {"streamed_compact": (0.2, 1.0)}
ALL_RESIDENT = 1.02  # times what gpu_only_compact takes, with all rows on the device too (4 million)
NEXT = 2  # trainers that are named beside the fastest


@dataclass(frozen=True)
class Speeds:
    """Hold bytes per second of a machine, and seconds of rendering; zero where there is no GPU."""

    host: float  # that Adam's forward and commit kernels read and write
    copies: float = 0.0  # pinned copies one way
    copies_both_ways: float = 0.0  # both together
    rows_both_ways: float = 0.0  # kernels of the device that read and write pinned rows at once, both together
    packed_both_ways: float = 0.0  # the same of rows of a compact state
    device: float = 0.0  # copies on the device, read and written
    launching: float = 0.0  # seconds of rendering and its backward pass where a view sees few: launching takes them
    rendering: float = 0.0  # seconds more for each Gaussian that it sees
    host_packed: float = 0.0  # as `host`, of rows of a compact state: coding, more than memory, takes its time


@dataclass(frozen=True)
class Scene:
    """Hold what is to be trained, and the memory that there is for it."""

    num_gaussians: int  # N, to which it grows
    visible: float  # share of them that a view sees; each view the same
    num_pixels: int  # of a picture
    device_memory: float  # bytes
    host_memory: float  # bytes


@dataclass(frozen=True)
class Advice:
    """Hold what a trainer is thought to take."""

    trainer: str  # its name in the register
    milliseconds: float  # of a step
    moving: float  # milliseconds of all that it moves, one after the other: of two equals the one that moves less wins
    device_memory: float  # bytes
    host_memory: float  # bytes
    fits: bool  # the trainer accepts so many Gaussians
    at_least: bool  # the GPU has no room for the rows of two views at once, so that steps may take longer than said
    slows: bool  # nor for those of one: they stay on the host, as the trainer says
    resident_share: float = 0.0  # that the option of this name says

    @property
    def command(self) -> str:
        """Return the script and the options that choose the trainer."""
        trainer = TRAINERS[self.trainer]
        residents = ("--resident_share", f"{self.resident_share:g}") if self.resident_share else ()
        return shlex.join([trainer.path.name, *trainer.arguments, *residents])


def advise(speeds: Speeds, scene: Scene) -> list[Advice]:
    """Return the trainers that fit into memory, the fastest first; one with residents beside itself without.

    Args:
        speeds: Of a machine with a GPU.
        scene: What is to be trained.
    """
    all_advice = [
        estimate(name, speeds, scene, share) for name in TRAINERS for share in (0.0, *RESIDENT_SHARES.get(name, ()))
    ]
    fitting = [advice for advice in all_advice if advice.fits]
    return sorted(fitting, key=lambda advice: (advice.milliseconds, advice.resident_share, advice.moving))


def estimate(name: str, speeds: Speeds, scene: Scene, resident_share: float = 0.0) -> Advice:
    """Return what a trainer takes of a machine's time and memory.

    Args:
        name: Of the trainer.
        speeds: Of a machine with a GPU.
        scene: What is to be trained.
        resident_share: Of the Gaussians, whose rows stay on the device: as many of a view's at the least, since those
            stay that views show most often.
    """
    if resident_share == 1:
        return _with_all_resident(estimate(name, speeds, scene), estimate("gpu_only_compact", speeds, scene), scene)
    trainer = TRAINERS[name]
    residents = {"resident_share": resident_share} if resident_share else {}
    cfg = replace(trainer.load().CONFIGS["default"], **trainer.options, **residents)
    needs = needs_beside_gpu(
        trainer.footprint(cfg),
        scene.visible,
        PIXEL_BYTES * scene.num_pixels,
        int(scene.host_memory),
        int(scene.device_memory),
    )
    of_device = needs.by_memory["device"]
    lacking, slows = of_device.lacking_bytes(scene.num_gaussians), of_device.slows(scene.num_gaussians)
    num_visible = scene.visible * scene.num_gaussians
    traffic = trainer.traffic(scene.num_gaussians, num_visible)
    compact, streams = trainer.options.get("state") == "compact", trainer.script == STREAMED
    if streams:
        link_speed = (speeds.packed_both_ways if compact else speeds.rows_both_ways) / 2
    else:
        link_speed = speeds.copies_both_ways / 2
    # Coding takes a device no longer than the bytes that it spares: 6.4 ms at 18 million, and 6.6 with rows in float32
    # (benchmarks/results/train_step_compact_h200.md).
    on_device = num_visible * (speeds.rendering + AFTER_RENDERING.get(name, 0) / link_speed)
    on_all = traffic.device / ((DENSE if name == "gpu_only" else 1) * speeds.device)
    on_device += on_all
    on_link = (1 - resident_share) * traffic.link / link_speed
    if slows:  # read in place, and brought to the device to be stepped when that is done
        on_device += traffic.link / (IN_PLACE * speeds.copies) + on_link
    else:  # what finds no room comes when the view before has gone
        on_link += lacking / link_speed
    # What streams over the host's memory the device has measured.
    on_host = 0.0 if streams else traffic.host / (speeds.host_packed if compact else speeds.host)
    launching = LAUNCHES.get(name, LAUNCHES_STREAMED if streams else LAUNCHES_BESIDE_CPU) * speeds.launching
    # The next view's rendering is not launched to its end before Adam's update is done: the host waits for a count.
    launching += on_all
    return Advice(
        name,
        milliseconds=1e3 * max(launching, on_device, on_link, on_host),
        moving=1e3 * (on_device + on_link + on_host),
        device_memory=of_device.expected_bytes(scene.num_gaussians),
        host_memory=needs.host.bytes(scene.num_gaussians),
        # Residents have what views leave.
        fits=scene.num_gaussians <= needs.most_gaussians() and not (resident_share and lacking),
        at_least=lacking > 0,
        slows=slows,
        resident_share=resident_share,
    )


def _with_all_resident(travelling: Advice, on_gpu_only: Advice, scene: Scene) -> Advice:
    """Return what a trainer takes with all rows on the device; growth may take them to the host, which must have room.

    Args:
        travelling: What it takes without residents.
        on_gpu_only: What the trainer takes that has the same rows on the device alone.
        scene: What is to be trained.
    """
    trainer = TRAINERS[travelling.trainer]
    cfg = replace(trainer.load().CONFIGS["default"], **trainer.options)
    rows = bytes_there(scene.num_gaussians, sh_degree=cfg.sh_degree, geometry=cfg.geometry)
    return replace(
        travelling,
        milliseconds=ALL_RESIDENT * on_gpu_only.milliseconds,
        moving=on_gpu_only.moving,
        device_memory=on_gpu_only.device_memory,
        fits=travelling.fits and on_gpu_only.fits and rows <= AT_START * USABLE * scene.device_memory,
        at_least=False,
        slows=False,
        resident_share=1.0,
    )


def verdict(speeds: Speeds, scene: Scene) -> str:
    """Return in a line which trainer to use, what it will take, and which come next.

    Args:
        speeds: Of a machine with a GPU.
        scene: What is to be trained.
    """
    given = (
        f"{scene.num_gaussians:,} Gaussians, {100 * scene.visible:g} % of them visible, in "
        f"{_gigabytes(scene.device_memory)} of GPU and {_gigabytes(scene.host_memory)} of host memory"
    )
    found = advise(speeds, scene)
    if not found:
        return f"{given}: no trainer fits; fewer Gaussians, or views that see less of them, would."
    named: dict[str, Advice] = {}
    for advice in found:
        named.setdefault(advice.trainer, advice)  # each with the residents that make it fastest
    chosen = list(named.values())[: 1 + NEXT]
    best, *others = [
        f"{advice.command} ({'at least' if advice.at_least else 'about'} {advice.milliseconds:.1f} ms a step, "
        f"{_gigabytes(advice.device_memory)} of GPU and {_gigabytes(advice.host_memory)} of host memory)"
        for advice in chosen
    ]
    slow = " and with ".join(advice.command for advice in chosen if advice.slows)
    note = f" With {slow} the {NO_ROOM}" if slow else ""
    return f"{given}: use {best}" + "".join(f"; then {other}" for other in others) + f".{note}"


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


# --------------------------------------------------------------------------------------------------- the last one


def machine_name(device: torch.device) -> str | None:
    """Return the name of this GPU in this host; None for a CPU."""
    return f"{torch.cuda.get_device_name(device)} in {platform.node()}" if device.type == "cuda" else None


def cache_file() -> Path:
    """Return where verdicts are kept."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "gaussian-offload" / "calibration.json"


def save_verdict(machine: str, speeds: Speeds, scene: Scene) -> Path:
    """Keep what has been found for a machine, beside what is known of others.

    Raises:
        OSError: The file cannot be written.
    """
    path = cache_file()
    found = {
        "date": datetime.date.today().isoformat(),
        "bytes_per_second": asdict(speeds),
        "scene": asdict(scene),
        "verdict": verdict(speeds, scene),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({**_saved(), machine: found}, indent=1) + "\n")
    unfinished.replace(path)
    return path


def print_last_verdict(device: torch.device) -> None:
    """Say in one line what was found when this machine was calibrated; nothing where it was not."""
    with contextlib.suppress(KeyError, TypeError):  # never calibrated, or a file that is none of ours
        found = _saved()[machine_name(device) or ""]
        print(f"Calibrated on {found['date']}: {found['verdict']}")


def _saved() -> dict[str, dict]:
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no file, not JSON, no home
        saved = json.loads(cache_file().read_text())
        return saved if isinstance(saved, dict) else {}
    return {}
