"""What has come of a reconstruction: which photos are in the model, which are not, and why."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pycolmap

from datasets.links import write_whole
from datasets.photogrammetry import Photo, registered_names
from datasets.prepared import check_prepared

NO_FEATURES = "no features (blank, blurred or covered)"
NAMED = 5  # of photos of a kind; all are in a file


def no_model(what: str, photos: list[Photo], matching: str) -> str:
    """Say why there is no model.

    Args:
        what: Where the photos come from.
        photos: As they were matched.
        matching: How.
    """
    without = sum(photo.num_features == 0 for photo in photos)
    alone = sum(photo.num_partners == 0 for photo in photos)
    if alone == len(photos):
        cause = "no two of them have enough in common"
    else:
        cause = f"those that match ({len(photos) - alone} of them) see too little from places far enough apart"
    return (
        f"No model can be made of the {len(photos)} photos of {what}, since {cause}"
        + (f", and {without} have no features at all" if without else "")
        + ": take sharp photos from several places, each of which shows most of what another shows"
        + ("." if matching == "exhaustive" else ", or compare all pairs of them with --matching exhaustive.")
    )


def report(out: Path, photos: list[Photo], matching: str, left_out_file: Path) -> list[str]:
    """Return the lines of the report: what was registered, what not and why, and what `prepare --check` finds.

    Args:
        out: The dataset's folder, which holds the models.
        photos: As they were matched.
        matching: How.
        left_out_file: Receives the photos that the largest model lacks, each with the reason; removed where it has all.
    """
    models = [pycolmap.Reconstruction(out / "sparse" / str(k)) for k in range(_count_models(out / "sparse"))]
    registered = [registered_names(model) for model in models]
    left_out: dict[str, list[Photo]] = {}
    for photo in photos:
        if photo.name not in registered[0]:
            left_out.setdefault(_why_left_out(photo, registered), []).append(photo)
    usual = _median_features([photo for photo in photos if photo.name in registered[0]])
    lines = [
        f"registered: {len(registered[0]):,} of {len(photos):,} photos, {models[0].num_points3D():,} points, "
        f"mean reprojection error {models[0].compute_mean_reprojection_error():.2f} pixels"
    ]
    left_out_file.unlink(missing_ok=True)
    for why, group in left_out.items():
        more = f" and {len(group) - NAMED} more, all in {left_out_file}" if len(group) > NAMED else ""
        names = ", ".join(photo.name for photo in group[:NAMED])
        lines.append(f"left out:   {len(group):,}, {why}{_few_features(group, usual)}: {names}{more}")
    if 2 * len(registered[0]) < len(photos):
        lines.append(
            "Warning:    most photos are left out; photos that show more of what others show give a larger model."
        )
    if matching != "exhaustive" and any(why != NO_FEATURES for why in left_out):
        lines.append(
            f"            Not all pairs were compared ({matching} matching): the same command with --matching "
            "exhaustive keeps what has been matched, compares the others too, and may place more photos in a new "
            "model; this one is kept, too."
        )
    if left_out:
        rows = [f"{photo.name}\t{why}\n" for why, group in left_out.items() for photo in group]
        write_whole(left_out_file, lambda partial: partial.write_text("".join(sorted(rows))))
    return lines + check_prepared("default", out)


def _few_features(group: list[Photo], usual: int) -> str:
    """Say that photos have fewer features than half the usual number, where they do."""
    count = _median_features(group)
    return f" (of few features: {count:,} in the median, registered photos {usual:,})" if 0 < 2 * count < usual else ""


def _median_features(photos: list[Photo]) -> int:
    return round(median(photo.num_features for photo in photos))


def _count_models(sparse: Path) -> int:
    return sum(path.is_dir() and path.name.isdecimal() for path in sparse.iterdir())


def _why_left_out(photo: Photo, registered: list[set[str]]) -> str:
    if photo.num_features == 0:
        return NO_FEATURES
    if photo.num_partners == 0:
        return "no other photo matches"
    for number, names in enumerate(registered[1:], start=1):
        if photo.name in names:
            return f"in another model (sparse/{number})"
    return "matches too few points of the model"
