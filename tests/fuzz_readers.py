"""Feeds damaged files to the readers of models, points, pictures and caches.

    python -m tests.fuzz_readers --cases 10000

Each case damages one file of a small dataset, or a checkpoint, and reads it. Either what is read holds together, or
there is an InputError of one line; anything else is reported with the number of the case, which `--first N --cases 1`
repeats: another exception, a crash, more than 120 seconds, more than 2.5 GiB, a path outside the dataset. The cases run
in a child process with that bound on its memory; after a crash the next child goes on behind it.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.colmap import open_model, read_sparse_model
from datasets.colmap_merge import merge_models, write_model
from datasets.image_files import decode_image
from datasets.matrix_city import read_transforms
from datasets.mega_nerf import read_metadata
from datasets.model_choice import load_sparse_model
from datasets.ply import read_points
from datasets.scene import load_scene
from errors import InputError
from offload.adam.options import AdamOptions
from offload.culling.cameras import Cameras
from offload.models.device import DeviceGaussians
from offload.models.forwarded import ForwardedGaussians
from tests import exported_formats
from tests.aerial_training import rows_of
from tests.made_up_downloads import matrix_city, mega_nerf
from tests.mutations import mutate, mutate_checkpoint, mutate_json, mutate_npz, mutate_text
from tests.small_scene import camera, ramp_picture, write_scene
from tests.waiting import HANGS_AFTER
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import Checkpoint, load_checkpoint
from training.gaussians import PARAMETER_NAMES, initial_gaussians
from training.ply import load_ply, save_ply

CPU = torch.device("cpu")
MEMORY = 5 << 29  # bytes beyond what the imports take
SECONDS = 120  # for one case, of which most take milliseconds
STAMP = 1_700_000_000_000_000_000  # ns, the time of every file that is not damaged: caches made with it hold

Files = dict[str, bytes]  # by path relative to the dataset
Reader = Callable[[Path, str], None]  # takes the dataset and the damaged file


def read_model(data_dir: Path, damaged: str) -> None:
    check_model(read_sparse_model(data_dir / "sparse/0"))


def read_cached_model(data_dir: Path, damaged: str) -> None:
    check_model(load_sparse_model(data_dir)[0])


def merge(data_dir: Path, damaged: str) -> None:
    first, second = open_model(data_dir / "a/sparse/0"), open_model(data_dir / "b/sparse/0")
    names = sorted(image.name for model in (first, second) for image in model.images.values() if image.has_pose)
    merge_models(first, second)
    model_dir = write_model(first, data_dir)
    assert sorted(image.name for image in open_model(model_dir).images.values()) == names


def check_model(model) -> None:
    n, k = len(model.image_names), len(model.camera_models)
    assert model.worldtocams.shape == (n, 4, 4)
    assert np.isfinite(model.worldtocams).all()
    assert model.camera_indices.shape == (n,)
    assert set(model.camera_indices.tolist()) <= set(range(k))
    assert model.camera_sizes.shape == (k, 2)
    assert model.camera_params.shape == (k, 9)
    assert np.isfinite(model.camera_params).all()
    assert model.points.shape == model.points_rgb.shape
    assert np.isfinite(model.points).all()
    folder = Path("/dataset/images")
    assert all(Path(os.path.normpath(folder / name)).is_relative_to(folder) for name in model.image_names)


def read_ply(data_dir: Path, damaged: str) -> None:
    points, colors = read_points(data_dir / damaged)
    assert len(points) > 0
    assert points.shape == colors.shape == (len(points), 3)
    assert (points.dtype, colors.dtype) == (np.float64, np.uint8)
    assert np.isfinite(points).all()


def read_gaussians(data_dir: Path, damaged: str) -> None:
    gaussians = load_ply(data_dir / damaged)
    shapes = {name: tuple(value.shape) for name, value in gaussians.items()}
    n, rest = shapes["shN"][:2]
    assert shapes == {
        **{"means": (n, 3), "scales": (n, 3), "quats": (n, 4), "opacities": (n,)},
        **{"sh0": (n, 1, 3), "shN": (n, rest, 3)},
    }


def read_picture(data_dir: Path, damaged: str) -> None:
    picture = decode_image(data_dir / damaged)
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3


def read_scene(data_dir: Path, damaged: str) -> None:
    init_ply = damaged.endswith(".ply")
    scene = load_scene(data_dir, data_factor=2, test_every=2, init_ply=init_ply, num_workers=1)
    for values in (scene.camtoworlds, scene.points, scene.transform, scene.scene_scale):
        assert np.isfinite(values).all()
    assert all(path.resolve().is_relative_to(data_dir.resolve()) for path in scene.image_paths)
    for image_id, path in enumerate(scene.image_paths):
        item = scene.cameras[scene.camera_indices[image_id]]
        assert np.isfinite(item.K).all()
        assert item.undistort(decode_image(path)).shape == (item.height, item.width, 3)


def read_poses(data_dir: Path, damaged: str) -> None:
    half = read_transforms(data_dir / damaged, data_dir)
    assert half.worldtocams.shape == (len(half.files), 3, 4)
    rotations = half.worldtocams[:, :, :3]
    assert np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max() < 1e-9
    assert np.isfinite(half.worldtocams).all()
    assert all(file.resolve().is_relative_to(data_dir.resolve()) for file in half.files)


def read_metadata_file(data_dir: Path, damaged: str) -> None:
    size, K, distortion = read_metadata(data_dir / damaged)
    assert min(size) > 0
    assert np.isfinite(K).all()
    assert np.isfinite(distortion).all()


def read_checkpoint(data_dir: Path, damaged: str) -> None:
    """Read a checkpoint, as for evaluation, and go on from it, as the trainers do."""
    checkpoint = load_checkpoint(data_dir / damaged)
    gaussians = checkpoint.gaussians
    assert list(gaussians) == list(PARAMETER_NAMES)
    assert {len(value) for value in gaussians.values()} == {len(gaussians["means"])}
    if not checkpoint.can_resume:
        return
    parameters = {name: checkpoint.state[f"parameters/{name}"] for name in PARAMETER_NAMES}
    adam = AdamOptions(dict.fromkeys(PARAMETER_NAMES, 1e-3), lambda step: 1e-3, (0.9, 0.999))
    places = [ForwardedGaussians(parameters, adam, device=CPU, geometry="host", max_gaussians=100)]
    places.append(DeviceGaussians(parameters, adam, device=CPU))
    for place in places:
        try:
            place.load_state(checkpoint.state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # which `TrainingRun` makes a sentence
            raise InputError("does not hold what resuming needs") from error
    places[0].rows(0, len(gaussians["means"]))


def checkpoint_files(folder: Path) -> Files:
    """Checkpoints of both versions, the newer one of a trainer that defers steps and of one that does not."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3), "shN": (15, 3)}
    parameters = {name: torch.randn(20, *shape, generator=generator) for name, shape in shapes.items()}
    adam = AdamOptions(dict.fromkeys(parameters, 1e-3), lambda step: 1e-3, (0.9, 0.999))
    gaussians = ForwardedGaussians(parameters, adam, device=CPU, geometry="host", max_gaussians=100)
    viewmats, Ks = torch.eye(4)[None], torch.tensor([[50.0, 0, 30], [0, 50, 20], [0, 0, 1]])[None]
    for _ in range(3):
        rows = gaussians.fetch(Cameras(viewmats, Ks, 60, 40))
        sum(value.square().sum() for value in rows.values()).backward()
        gaussians.update()
    deferred = {"densification/count": torch.ones(20), "elapsed_seconds": torch.tensor(1.0), **gaussians.state()}
    deferred["upcoming/ids"] = torch.arange(5)
    dense = DeviceGaussians(parameters, adam, device=CPU)
    options = {"max_steps": 3, "seed": 1}
    folder.mkdir(parents=True)
    save_checkpoint(folder / "deferred.pt", Checkpoint(3, np.eye(4), deferred, options))
    save_checkpoint(folder / "dense.pt", Checkpoint(0, np.eye(4), dense.state(), options))
    torch.save(
        {"version": 1, "step": 3, "splats": parameters, "transform": torch.eye(4, dtype=torch.float64)},
        folder / "version 1.pt",
    )
    return read_files(folder)


def model_files(folder: Path, *, text: bool = False, rigs: bool = True) -> Files:
    """A COLMAP model with observations, as COLMAP writes it since its version 3.12 (with rigs) or wrote it before."""
    import pycolmap

    cameras = [
        camera(),
        camera("OPENCV", (80, 82, 48, 32, 0.02, -0.01, 0.001, 0.002)),
        camera("SIMPLE_RADIAL", (80, 48, 32, 0.01)),
    ]
    write_scene(folder, 5, cameras, text=text, num_points=30)
    model_dir = folder / "sparse/0"
    model = pycolmap.Reconstruction(str(model_dir))
    rng = np.random.default_rng(0)
    for image in model.images.values():
        image.points2D = pycolmap.Point2DList([pycolmap.Point2D(xy) for xy in rng.uniform(0, 60, (10, 2))])
    for index in range(10):
        track = pycolmap.Track()
        for image_id in model.images:
            track.add_element(image_id, index)
        model.add_point3D(rng.normal(size=3), track, np.array([1, 2, 3], np.uint8))
    (model.write_text if text else model.write_binary)(str(model_dir))
    if not rigs:
        for path in model_dir.glob("[rf][ir][ga]*"):
            path.unlink()
    return read_files(folder)


def ply_files() -> Files:
    rng = np.random.default_rng(0)
    points, colors = rng.normal(size=(20, 3)), rng.integers(0, 256, (20, 3))

    def header(kind: str, xyz: str, rgb: str, more: str = "") -> bytes:
        properties = [f"property {xyz} {n}" for n in "xyz"] + [f"property {rgb} {n}" for n in ("red", "green", "blue")]
        return "\n".join(
            ["ply", f"format {kind} 1.0", "element vertex 20", *properties, more + "end_header", ""]
        ).encode()

    rows = "".join(" ".join(map(str, (*p, *c))) + "\n" for p, c in zip(points, colors, strict=True)).encode()
    row = np.dtype([(name, "f8") for name in "xyz"] + [(name, "u1") for name in "rgb"])
    vertices = np.rec.fromarrays([*points.T, *colors.T], dtype=row)
    faces = "element face 2\nproperty list uchar int vertex_indices\n"
    face_rows = np.array([(3, (0, 1, 2))] * 2, np.dtype([("n", "u1"), ("i", "<i4", 3)])).tobytes()
    return {
        "ascii.ply": header("ascii", "double", "uchar") + rows,
        "float colors.ply": header("ascii", "float", "float") + rows,
        "binary.ply": header("binary_little_endian", "double", "uchar") + vertices.tobytes(),
        "big.ply": header("binary_big_endian", "double", "uchar") + vertices.astype(row.newbyteorder(">")).tobytes(),
        "faces.ply": header("binary_little_endian", "double", "uchar", faces) + vertices.tobytes() + face_rows,
        "ascii faces.ply": header("ascii", "double", "uchar", faces) + rows + b"3 0 1 2\n" * 2,
    }


def posed_files(folder: Path) -> dict[str, Files]:
    """By program, a dataset whose poses it has written."""
    colmap = write_scene(folder / "colmap", 5, [camera("OPENCV", (80, 80, 48, 32, 0.02, -0.01, 0.001, 0.002))])
    model = read_sparse_model(colmap / "sparse/0")
    found = {}
    for write in (
        *(exported_formats.write_nerfstudio, exported_formats.write_open_drone_map),
        *(exported_formats.write_metashape, exported_formats.write_reality_capture),
    ):
        name = write.__name__.removeprefix("write_").replace("_", " ")
        shutil.copytree(colmap / "images", folder / name / "images")
        write(model, folder / name)
        found[name] = read_files(folder / name)
    return found


def gaussian_files(scratch: Path) -> Files:
    points = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    colors = np.full((10, 3), 128, np.uint8)
    gaussians = initial_gaussians(points, colors, sh_degree=3, init_opacity=0.1, init_scale=1.0, seed=0)
    save_ply(scratch / "gaussians.ply", rows_of(gaussians), 10, np.eye(4))
    return {"gaussians.ply": (scratch / "gaussians.ply").read_bytes()}


def picture_files() -> Files:
    picture = Image.fromarray(ramp_picture((40, 30)))
    gray16 = Image.fromarray(ramp_picture((40, 30))[..., 0].astype(np.uint16) * 257)
    made = {
        "a.png": (picture, {}),
        "palette.png": (picture.quantize(16), {}),
        "gray.png": (gray16, {}),
        "a.jpg": (picture, {"quality": 90}),
        "progressive.jpg": (picture, {"progressive": True, "quality": 50}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "a.tif": (picture, {"compression": "tiff_lzw"}),
        "a.webp": (picture, {"lossless": True}),
        "a.bmp": (picture, {}),
    }
    files = {}
    for name, (image, options) in made.items():
        content = io.BytesIO()
        image.save(content, format=Image.registered_extensions()[Path(name).suffix], **options)
        files[name] = content.getvalue()
    return files


def scene_files(folder: Path) -> Files:
    """A whole dataset with a PLY file and all caches."""
    files = model_files(folder)
    (folder / "sparse/0/points.ply").write_bytes(ply_files()["binary.ply"])
    for _ in range(2):  # what the first run makes gets its final time for the second, which remembers it
        load_scene(folder, data_factor=2, test_every=2, num_workers=1)
        for path in folder.rglob("*.*"):
            os.utime(path, ns=(STAMP, STAMP))
    load_scene(folder, data_factor=2, test_every=2, num_workers=1)
    return files | read_files(folder)


def read_files(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def targets(scratch: Path) -> list[tuple[str, Files, list[str], Reader]]:
    """What is fuzzed: a name, the files of the dataset, which of them are damaged, and their reader."""
    binary, older = model_files(scratch / "binary"), model_files(scratch / "older", rigs=False)
    text, plys, pictures = model_files(scratch / "text", text=True), ply_files(), picture_files()
    scene, checkpoints = scene_files(scratch / "scene"), checkpoint_files(scratch / "checkpoints")
    gaussians = gaussian_files(scratch)
    matrix_city(scratch / "poses", 4, 2)
    poses = read_files(scratch / "poses")
    mega_nerf(scratch / "photos", scratch / "models", 4, 2)
    metadata = {name: content for name, content in read_files(scratch / "photos").items() if name.endswith(".pt")}

    halves = {f"a/{name}": content for name, content in older.items()}
    halves |= {f"b/{name}": content.replace(b".png", b".jpg") for name, content in older.items()}

    posed = posed_files(scratch / "posed")

    def model_parts(files: Files) -> list[str]:
        return [name for name in files if "sparse/" in name]

    return [
        ("binary model", binary, model_parts(binary), read_model),
        ("binary model without rigs", older, model_parts(older), read_model),
        ("text model", text, model_parts(text), read_model),
        ("models to merge", halves, model_parts(halves), merge),
        ("cache of a model", scene, ["sparse/0/parsed_scene.npz"], read_cached_model),
        ("PLY", plys, list(plys), read_ply),
        ("PLY of Gaussians", gaussians, list(gaussians), read_gaussians),
        ("picture", pictures, list(pictures), read_picture),
        ("dataset", scene, list(scene), read_scene),
        ("checkpoint", checkpoints, ["deferred.pt", "dense.pt"], read_checkpoint),
        ("checkpoint of version 1", checkpoints, ["version 1.pt"], read_checkpoint),
        ("MatrixCity's poses", poses, [name for name in poses if name.endswith(".json")], read_poses),
        ("Mega-NeRF's metadata", metadata, [n for n in metadata if "metadata" in n], read_metadata_file),
        *(
            (f"poses of {program}", files, [name for name in files if "images/" not in name], read_cached_model)
            for program, files in posed.items()
        ),
    ]


SINGLE = (read_ply, read_picture, read_checkpoint, read_gaussians)  # read one file alone
# What makes damage that checksums, or a parser, do not notice.
RESEALING = {
    **{".npz": mutate_npz, "checkpoint": mutate_checkpoint},
    **{".json": mutate_json, ".xml": mutate_text, ".csv": mutate_text},
}


def outcome(read: Reader, data_dir: Path, damaged: str) -> str:
    """ "read" or "sentence", or what went wrong."""
    try:
        read(data_dir, damaged)
    except InputError as error:
        cause: BaseException | None = error
        while cause:
            if isinstance(cause, MemoryError) or "nsufficient memory" in str(cause):
                return f"runaway allocation: {error}"
            cause = cause.__cause__
        return "sentence" if str(error).isprintable() else f"more than one line: {str(error)!r}"
    except Exception as error:
        frame = error.__traceback__
        while frame and frame.tb_next:
            frame = frame.tb_next
        return f"{type(error).__name__} at {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}: {error}"[:300]
    return "read"


def work(first: int, cases: int, chosen: list[str] | None) -> None:
    """Run cases in this process; write a line before each and its outcome after it."""
    os.environ["XDG_CACHE_HOME"] = "/nonexistent"
    with tempfile.TemporaryDirectory() as scratch:
        everything = [target for target in targets(Path(scratch) / "whole") if not chosen or target[0] in chosen]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        data_dir = Path(scratch) / "case"
        for case in range(first, first + cases):
            rng = random.Random(case)
            name, files, damageable, read = everything[case % len(everything)]
            damaged, donor = rng.choice(damageable), rng.choice(damageable)
            shutil.rmtree(data_dir, ignore_errors=True)
            for path, content in files.items():
                if read in SINGLE and path != damaged:
                    continue
                (data_dir / path).parent.mkdir(parents=True, exist_ok=True)
                if path == damaged:
                    mutated = RESEALING.get(name if path.endswith(".pt") else Path(path).suffix, mutate)
                    mutated = mutated if rng.random() < 0.8 else mutate
                    content = mutated(content, files[donor], rng)
                (data_dir / path).write_bytes(content)
                stamp = STAMP + (path == damaged and not path.endswith(".npz"))  # caches notice a change by its time
                os.utime(data_dir / path, ns=(stamp, stamp))
            print(f"{case}\t{name}\t{damaged}", flush=True)
            print(" ".join(outcome(read, data_dir, damaged).split()), flush=True)


def run(first: int, cases: int, chosen: list[str] | None = None) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Run cases in child processes. Returns how often each target ended how, and a line for each failure."""
    counts: Counter[tuple[str, str]] = Counter()
    failures = []
    next_case, end = first, first + cases
    while next_case < end:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz_readers",
            "--work",
            "--first",
            str(next_case),
            "--cases",
            str(end - next_case),
            *(["--targets", *chosen] if chosen else []),
        ]
        # Threads take address space, which is bounded, and there may be one for each core.
        few = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=few) as child:
            lines = Lines(child.stdout)
            while next_case < end:
                started = lines.next(HANGS_AFTER if next_case == first else SECONDS)
                if started is None:
                    raise SystemExit(f"The child process ended before case {next_case} (exit code {child.wait()}).")
                ended = lines.next(SECONDS)
                if ended is None:
                    child.kill() if child.poll() is None else None
                    ended = f"killed, or hung for {SECONDS} s (exit code {child.wait()})"
                case, name, damaged = started.split("\t")
                counts[name, ended if ended in ("read", "sentence") else "FAILED"] += 1
                if ended not in ("read", "sentence"):
                    failures.append(f"case {case}: {name}, {damaged}: {ended}")
                next_case = int(case) + 1
                if child.poll() is not None and next_case < end and ended.startswith("killed"):
                    break
    return counts, failures


class Lines:
    """Lines from a pipe, waited for no longer than a given time."""

    def __init__(self, pipe: io.BufferedReader):
        self._descriptor = pipe.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)
        self._pending = b""

    def next(self, seconds: float) -> str | None:
        """The next line; None where none comes in time, or the pipe has ended."""
        while b"\n" not in self._pending:
            if not self._selector.select(seconds):
                return None
            more = os.read(self._descriptor, 1 << 16)
            if not more:
                return None
            self._pending += more
        line, self._pending = self._pending.split(b"\n", 1)
        return line.decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--targets", nargs="+", help="names of what is damaged, such as checkpoint (everything)")
    parser.add_argument("--first", type=int, default=0, help="number of the first, which decides its damage (0)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.first, arguments.cases, arguments.targets)
        return
    counts, failures = run(arguments.first, arguments.cases, arguments.targets)
    for name in dict.fromkeys(name for name, _ in counts):
        parts = (f"{counts[name, ended]} {ended}" for ended in ("read", "sentence", "FAILED"))
        print(f"{name}: {', '.join(parts)}")
    print(f"{arguments.cases} cases, {len(failures)} failures", *failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
