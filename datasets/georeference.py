"""Brings a model into metres by the GPS positions of its photos: x east, y north, z up, from a place on the Earth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycolmap

from datasets.links import write_whole
from datasets.photogrammetry import Photo
from errors import InputError

SIDE_FILE = "georeference.json"

_FEWEST = 3  # photos that fix a similarity
_NARROWEST = 0.02  # of the positions' extent: nearer to a line, what turns around it is unknown
_LARGEST_ERROR = 10.0  # metres, of a GPS position that counts


@dataclass(frozen=True)
class LocalFrame:
    """Hold the positions of photos in metres east, north and up of an origin, which is their mean."""

    origin: tuple[float, float, float]  # latitude and longitude in degrees (WGS84), altitude in metres
    positions: dict[str, np.ndarray]  # of photos, [3] metres

    @classmethod
    def of(cls, photos: list[Photo]) -> LocalFrame:
        """Make the frame of photos.

        Raises:
            InputError: Fewer than three have GPS, or they stand on one line or at one place.
        """
        with_gps = [(photo.name, photo.gps) for photo in photos if photo.gps is not None]
        if len(with_gps) < _FEWEST:
            raise InputError(
                f"--georeference needs {_FEWEST} photos with latitude, longitude and altitude in EXIF, and "
                f"{len(with_gps)} of {len(photos)} have them: leave it out."
            )
        geographic = np.array([gps for _, gps in with_gps])  # [n, 3]
        latitude, longitude, altitude = (float(x) for x in geographic.mean(axis=0))
        local: np.ndarray = _wgs84().ellipsoid_to_enu(geographic, latitude, longitude, altitude)  # [n, 3]
        extents = np.linalg.svd(local - local.mean(axis=0), compute_uv=False)
        if extents[1] <= _NARROWEST * extents[0]:
            raise InputError(
                "--georeference needs photos that stand neither at one place nor on one line, as their GPS positions "
                "do: leave it out."
            )
        return cls((latitude, longitude, altitude), {name: xyz for (name, _), xyz in zip(with_gps, local, strict=True)})

    def align(self, model: pycolmap.Reconstruction) -> float | None:
        """Move a model into this frame.

        Returns:
            The median distance of its cameras from their GPS positions, in metres; None where too few agree.
        """
        names = {model.image(image_id).name: image_id for image_id in model.reg_image_ids()}
        common = [name for name in names if name in self.positions]
        if len(common) < _FEWEST:
            return None
        targets = np.array([self.positions[name] for name in common])  # [n, 3]
        options = pycolmap.RANSACOptions()
        options.max_error = _LARGEST_ERROR
        options.random_seed = 0
        found = pycolmap.align_reconstruction_to_locations(model, common, targets, _FEWEST, options)
        if found is None:
            return None
        model.transform(found)
        centers = np.array([model.image(names[name]).projection_center() for name in common])
        return float(np.median(np.linalg.norm(centers - targets, axis=1)))

    def write(self, path: Path) -> None:
        """Write where the frame lies: geocentric = offset + scale * rotation @ (east, north, up)."""
        latitude, longitude, altitude = self.origin
        base = np.vstack([np.zeros(3), np.eye(3)])  # [4, 3]: the origin, and a metre along each axis
        geocentric: np.ndarray = _wgs84().ellipsoid_to_ecef(
            _wgs84().enu_to_ellipsoid(base, latitude, longitude, altitude)
        )
        content = {
            "axes": "x east, y north, z up, in metres",
            "latitude": latitude,
            "longitude": longitude,
            "altitude": altitude,
            "geocentric": "EPSG:4978 = offset + scale * rotation @ (x, y, z)",
            "offset": geocentric[0].tolist(),
            "scale": 1.0,
            "rotation": (geocentric[1:] - geocentric[0]).T.tolist(),
        }
        write_whole(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n"))


def _wgs84() -> pycolmap.GPSTransform:
    return pycolmap.GPSTransform(pycolmap.GPSTransfromEllipsoid.WGS84)
