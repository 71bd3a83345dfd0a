"""Writes a trained model as a file that other programs open.

    python export.py MODEL --to FILE [--crop ...] [--max_gaussians N] [--sh_degree D] [--world input] [--up z]

MODEL is a checkpoint or a 3DGS PLY file. The ending of FILE says the format: .ply, .compressed.ply, .spz, .sog,
.splat, .html (one page with a viewer, for small models), or FOLDER/lod-meta.json (streamed levels of detail, for large
ones). docs/exports.md says what each keeps.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import startup  # noqa: F401, before torch is imported
from distributed.mesh import refuse_several
from errors import InputError, counted, format_bytes, refusing, stopped_by_signals
from exports.crop import read_region
from exports.formats import PLY, Format, format_of
from exports.gaussians import choose
from exports.placing import check_target, placing, side_file, unwritable
from exports.ply import write_commented_ply
from exports.source import Source, open_source
from exports.streamed import INDEX
from exports.world import Up, World, placement
from option_words import parse
from training.model_files import not_held
from training.ply import write_way_back
from training.streams import unbreakable_output


@dataclass
class Options:
    model: tyro.conf.Positional[Path]
    """A checkpoint (ckpts/ckpt_30000.pt) or a 3DGS PLY file."""
    to: Path
    """File to write, or lod-meta.json in a folder to make; its ending says the format."""
    crop: tuple[str, ...] = ()
    """Leave out what is outside: the lowest x y z of a box and the highest, or a file with a polygon (GeoJSON, or one
    corner x y a line), in the coordinates of --world with z up."""
    max_gaussians: int = 0
    """Keep at most so many, those with the largest product of opacity and area; 0 keeps all."""
    sh_degree: int = 3
    """Highest degree of the spherical harmonics that are kept, 0 to 3."""
    world: World | None = None
    """Coordinates: normalized, those of training, or input, those of the dataset. By default as the file has
    them."""
    up: Up | None = None
    """Vertical axis: z, or y, down as viewers take it. By default y in formats for viewers, where the model's file says
    what is up and --world is not input, and elsewhere as it is."""
    plain: bool = False
    """Write a .ply without comments, which some programs do not expect."""


def main() -> None:
    """Export; the exit code is 0, or 2 with one sentence where something in the input cannot be used."""
    with refusing():
        refuse_several("export.py writes a model")
        options = parse(Options, __doc__)
    with unbreakable_output(), refusing(), stopped_by_signals():
        try:
            export(options)
        except KeyboardInterrupt:
            print("Stopped; nothing was written.", file=sys.stderr)
            sys.exit(130)


def export(options: Options) -> None:
    """Write the file that the options ask for.

    Raises:
        InputError: It cannot be written; nothing is left of it.
    """
    to, form = options.to, _check(options)
    check_target(to)
    region = read_region(options.crop)
    source = open_source(options.model)
    up = options.up
    if up is None and form is not PLY and options.world != "input" and source.up is not None:
        up = "y"
    place = placement(source.transform, source.up, options.world, up)
    degree = min(options.sh_degree, source.sh_degree, form.highest_degree)
    gaussians = choose(source, place, region=region, most=options.max_gaussians, sh_degree=degree, say=print)
    if form.most_gaussians is not None and gaussians.count > form.most_gaussians:
        raise InputError(
            f"--to {to} would hold {gaussians.count:,} Gaussians, and {form.name} is for at most "
            f"{form.most_gaussians:,}: choose fewer with --max_gaussians or --crop, or .sog or FOLDER/{INDEX}."
        )
    _check_space(to, form, gaussians.count, degree)
    print(
        f"Writing {counted(gaussians.count, 'Gaussian')} of {source.path} with {_harmonics(degree, source)} to {to} "
        f"({form.name}), in {place.describe(options.world)}."
    )
    behind = not_held(source.background)
    if behind:
        print(f"It was trained before {behind}, which no format holds: a viewer shows its own background.")
    try:
        with placing(to) as path:
            if form is PLY and not options.plain:
                write_commented_ply(path, gaussians, place)
            else:
                form.write(path, gaussians)
            if place.transform is not None:
                write_way_back(side_file(path), place.transform, axes=place.axes)
    except OSError as error:
        raise InputError(unwritable(to, error)) from error
    files = [file for file in to.parent.rglob("*") if file.is_file()] if to.name == INDEX else [to]
    size = sum(file.stat().st_size for file in files)
    print(f"Wrote {to}, {format_bytes(size)}.")
    if place.transform is not None:
        print(f"{side_file(to)} says how to come back to the dataset's coordinates.")


def _check(options: Options) -> Format:
    """Return the format, and refuse options that cannot be used, before anything is read."""
    form = format_of(options.to)
    if not 0 <= options.sh_degree <= 3:
        raise InputError(f"--sh_degree is {options.sh_degree}, but must be 0 to 3.")
    if options.max_gaussians < 0:
        raise InputError(f"--max_gaussians is {options.max_gaussians}, but must be 0, for all, or more.")
    if options.plain and form is not PLY:
        raise InputError(f"--plain is for .ply, and --to {options.to} is {form.name}: leave it out.")
    return form


def _check_space(to: Path, form: Format, count: int, degree: int) -> None:
    """Refuse a disk that is too small."""
    needed = form.most_bytes(count, degree)
    free = shutil.disk_usage((to.parent if to.name == INDEX else to).resolve().parent).free
    if needed > free:
        raise InputError(
            f"--to {to} can take {format_bytes(needed)}, and {format_bytes(free)} are free on its disk: free some, or "
            "keep less with --max_gaussians, --crop or --sh_degree."
        )


def _harmonics(degree: int, source: Source) -> str:
    cut = f" (of {source.sh_degree})" if degree < source.sh_degree else ""
    return f"harmonics of degree {degree}{cut}"


if __name__ == "__main__":
    main()
