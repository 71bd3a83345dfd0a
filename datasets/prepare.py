"""Turns the public downloads of the large scenes into the folders that the trainers expect.

    python -m datasets.prepare DATASET --help       what to download from where
    python -m datasets.prepare DATASET ...          prepare it; run it again after an interruption
    python -m datasets.prepare DATASET --check      check a prepared folder

Nothing is downloaded, and pictures are linked, not copied, wherever the file system can.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from configs import scene_config
from datasets import gauu_scene, matrix_city, mega_nerf
from datasets.prepared import check_prepared
from errors import InputError, refusing, stopped_by_signals
from option_words import Parser, named_path

_COLMAP_RESULTS = (
    "the COLMAP models of CityGaussian (colmap_results), linked in\n"
    "   https://github.com/Linketic/CityGaussian/blob/main/doc/data_preparation.md"
)

_MILL_19 = f"""\
Download and unpack
1. https://storage.cmusatyalab.org/mega-nerf-data/{{name}}.tgz in {{parent}},
   which makes {{data_dir}} with train/rgbs and val/rgbs (or elsewhere: name that folder with --source);
2. {_COLMAP_RESULTS};
   name its folder {{dataset}}, which holds train/sparse/0 and val/sparse/0, with --colmap.
"""

_URBAN_SCENE_3D = f"""\
Download and unpack
1. https://storage.cmusatyalab.org/mega-nerf-data/{{name}}.tgz in {{parent}}, which makes
   {{data_dir}} with mappings.txt, train/metadata and val/metadata
   (or elsewhere: name that folder with --source);
2. the scene's photos in UrbanScene3D-V1, https://github.com/Linxius/UrbanScene3D#urbanscene3d-v1;
   name the folder that the paths in mappings.txt start from with --photos
   (they are undistorted into train/rgbs and val/rgbs of the prepared folder);
3. {_COLMAP_RESULTS};
   name its folder {{dataset}}, which holds train/sparse/0 and val/sparse/0, with --colmap.
"""

_GAUU_SCENE = """\
Download {name} with its COLMAP model as https://saliteta.github.io/CUHKSZ_SMBU/ describes, and unpack it as
{data_dir} (or elsewhere: name that folder with --source). It holds images and sparse/0 or sparse;
a model elsewhere is named with --colmap.
"""

_MATRIX_CITY = f"""\
Download from https://huggingface.co/datasets/BoDai/MatrixCity/tree/main
1. small_city/aerial: pose/block_all/transforms_train.json and transforms_test.json, train/block_1.tar to
   block_10.tar, test/block_1_test.tar to block_10_test.tar; keep these folders in
   {{data_dir}} (or elsewhere: name that folder with --source) and unpack each .tar where it lies;
2. the initial points, small_city_pointcloud/matrixcity_point_cloud_ds20.zip;
   name its file aerial/Block_all.ply with --points.
The points can also come from {_COLMAP_RESULTS};
   name its folder matrix_city_aerial, which holds train/sparse/0 and test/sparse/0, with --colmap.
"""

INSTRUCTIONS = {
    **dict.fromkeys(("rubble", "building"), _MILL_19),
    **dict.fromkeys(("residence", "sciart"), _URBAN_SCENE_3D),
    **dict.fromkeys(("sztu", "lfls", "sziit"), _GAUU_SCENE),
    "aerial": _MATRIX_CITY,
}

# How many pictures are trained on and held out, to be compared with a download. Users of the downloads report 1920 + 20
# (building), 3019 in all (sciart) and 5621 + 741 (aerial); the others follow from Mega-NeRF's rule, which holds out
# every (n // 20)-th of n pictures: every 83rd of 1678 and every 129th of 2582.
PUBLISHED_COUNTS = {
    "rubble": (1657, 21),
    "building": (1920, 20),
    "residence": (2561, 21),
    "sciart": (2998, 21),
    "aerial": (5621, 741),
}


def instructions(dataset: str) -> str:
    """Say what to download from where."""
    data_dir = Path(str(scene_config(dataset).data_dir))
    return INSTRUCTIONS[dataset].format(dataset=dataset, data_dir=data_dir, parent=data_dir.parent, name=data_dir.name)


def main(arguments: list[str] | None = None) -> None:
    """Prepare or check a dataset, and exit: 0 when it can be trained on, 2 with one sentence when it cannot."""
    with refusing():
        options = _parse(arguments)
    dataset = options.dataset
    data_dir = options.data_dir or Path(scene_config(dataset).data_dir)
    source = options.source or data_dir
    with refusing(), stopped_by_signals():
        try:
            if not options.check:
                _prepare(options, source, data_dir)
            lines = check_prepared(dataset, data_dir)
        except KeyboardInterrupt:
            print("Stopped; the same command goes on from here.", file=sys.stderr)
            sys.exit(130)
    print(
        f"{data_dir} is ready: python simple_trainer.py {dataset}" + f" --data_dir {data_dir}" * bool(options.data_dir)
    )
    print("\n".join(f"  {line}" for line in lines))
    if dataset in PUBLISHED_COUNTS:
        print("  published: {} train, {} test".format(*PUBLISHED_COUNTS[dataset]))


def _prepare(options: argparse.Namespace, source: Path, data_dir: Path) -> None:
    """Make a dataset of a download.

    Raises:
        InputError: It is not there, or not what is published.
    """
    dataset = options.dataset
    if not source.is_dir():
        print(instructions(dataset))
        raise InputError(f"{source} does not exist: download what is named above, or correct --source.")
    if dataset == "aerial":
        matrix_city.prepare(source, options.colmap, options.points, data_dir)
    elif INSTRUCTIONS[dataset] is _GAUU_SCENE:
        gauu_scene.prepare(source, options.colmap, data_dir)
    else:
        mega_nerf.prepare(scene_config(dataset), source, options.colmap, getattr(options, "photos", None), data_dir)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets = parser.add_subparsers(dest="dataset", metavar="DATASET", required=True, help=", ".join(INSTRUCTIONS))
    for name, text in INSTRUCTIONS.items():
        one = datasets.add_parser(
            name, description=instructions(name), formatter_class=argparse.RawDescriptionHelpFormatter
        )
        default = scene_config(name).data_dir
        one.add_argument("--data_dir", type=named_path, help=f"the folder to prepare or check ({default})")
        one.add_argument("--source", type=named_path, help="the unpacked download (the folder to prepare)")
        one.add_argument("--colmap", type=named_path, help="the folder of the COLMAP models")
        if text is _URBAN_SCENE_3D:
            one.add_argument("--photos", type=named_path, help="the publishers' photos, where there are no rgbs")
        if text is _MATRIX_CITY:
            one.add_argument("--points", type=named_path, help="the initial points, Block_all.ply")
        one.add_argument("--check", action="store_true", help="check a prepared folder, and change nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
