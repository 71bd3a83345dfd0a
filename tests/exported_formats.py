"""Writes a COLMAP dataset as other programs would: their conventions, taken from their documentation, not the readers'.

Each exporter takes the model that COLMAP's reader has read, and writes its file into a dataset that has `images` alone.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
from scipy.spatial.transform import Rotation

from datasets.colmap import SparseModel


def write_ply(path: Path, points: np.ndarray, colors: np.ndarray) -> None:
    """Write points as an ASCII PLY file with double coordinates."""
    header = f"ply\nformat ascii 1.0\nelement vertex {len(points)}\n"
    header += "".join(f"property double {axis}\n" for axis in "xyz")
    header += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue")) + "end_header\n"
    rows = [f"{x!r} {y!r} {z!r} {r} {g} {b}" for (x, y, z), (r, g, b) in zip(points.tolist(), colors, strict=True)]
    path.write_text(header + "\n".join(rows) + "\n")


def photos_of(model: SparseModel) -> Iterator[tuple[str, np.ndarray, np.ndarray, int]]:
    """Yield name, rotation [3, 3] and translation [3] of world to camera, and the camera's index."""
    for name, pose, index in zip(model.image_names, model.worldtocams, model.camera_indices, strict=True):
        yield name, pose[:3, :3], pose[:3, 3], int(index)


def write_nerfstudio(
    model: SparseModel, data_dir: Path, *, per_frame: bool = False, applied: bool = True, points: bool = True
) -> Path:
    """Write transforms.json and sparse_pc.ply as ns-process-data does of a COLMAP model.

    https://docs.nerf.studio/quickstart/data_conventions.html
    """

    def intrinsics(index: int) -> dict[str, float]:
        width, height = model.camera_sizes[index].tolist()
        fx, fy, cx, cy, *distortion = model.camera_params[index].tolist()
        fisheye = model.camera_models[index] == "OPENCV_FISHEYE"
        keys = ("k1", "k2", "k3", "k4", "unused") if fisheye else ("k1", "k2", "p1", "p2", "k3")
        values = {"w": width, "h": height, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy}
        return values | {key: value for key, value in zip(keys, distortion, strict=True) if key != "unused"}

    # World (x, y, z) is written as (y, x, -z) or, later, as (x, z, -y).
    matrix = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]]) if applied else np.eye(4)[:3]
    frames = []
    for name, rotation, translation, index in photos_of(model):
        right, down, forwards = rotation  # the camera's axes in the world
        pose = np.eye(4)
        pose[:3] = np.stack([right, -down, -forwards, -rotation.T @ translation], axis=1)
        pose[:3] = matrix[:, :3] @ pose[:3] + np.c_[np.zeros((3, 3)), matrix[:, 3]]
        frame = {"file_path": f"images/{name}", "transform_matrix": pose.tolist()}
        frames.append(frame | (intrinsics(index) if per_frame else {}))
    fisheye = model.camera_models[0] == "OPENCV_FISHEYE"
    meta: dict[str, object] = {"camera_model": "OPENCV_FISHEYE" if fisheye else "OPENCV", "frames": frames}
    if not per_frame:
        meta |= intrinsics(0)
    if applied:
        meta["applied_transform"] = matrix.tolist()
    if points:
        meta["ply_file_path"] = "sparse_pc.ply"
        write_ply(data_dir / "sparse_pc.ply", model.points @ matrix[:, :3].T + matrix[:, 3], model.points_rgb)
    path = data_dir / "transforms.json"
    path.write_text(json.dumps(meta))
    return path


def write_open_drone_map(model: SparseModel, data_dir: Path, *, camera_beside: bool = False) -> Path:
    """Write opensfm/reconstruction.json, with a smaller second reconstruction; its camera in cameras.json on request.

    https://opensfm.org/docs/geometry.html: normalized image coordinates
    """
    width, height = model.camera_sizes[0].tolist()
    fx, fy, cx, cy, *distortion = model.camera_params[0].tolist()
    # Its pixel coordinates count from the first pixel's centre, H maps normalized ones to them.
    size = max(width, height)
    H = np.array([[size, 0, (width - 1) / 2], [0, size, (height - 1) / 2], [0, 0, 1]])
    c_x, c_y, _ = np.linalg.inv(H) @ [cx - 0.5, cy - 0.5, 1]
    fisheye = model.camera_models[0] == "OPENCV_FISHEYE"
    keys = ("k1", "k2", "k3", "k4") if fisheye else ("k1", "k2", "p1", "p2", "k3")
    camera = {
        "projection_type": "fisheye_opencv" if fisheye else "brown",
        **{"width": width, "height": height, "focal_x": fx / size, "focal_y": fy / size, "c_x": c_x, "c_y": c_y},
        **dict(zip(keys, distortion, strict=False)),
    }
    key = "v2 dji fc6310r 5472 3648 brown 0.6666"
    shots = {}
    for name, rotation, translation, _ in photos_of(model):
        angle_axis = Rotation.from_matrix(rotation).as_rotvec().tolist()
        shots[name] = {"camera": key, "rotation": angle_axis, "translation": translation.tolist(), "orientation": 1}
    points = {
        str(index): {"coordinates": xyz, "color": [float(value) for value in rgb]}
        for index, (xyz, rgb) in enumerate(zip(model.points.tolist(), model.points_rgb.tolist(), strict=True))
    }
    cameras = {} if camera_beside else {key: camera}
    if camera_beside:
        (data_dir / "cameras.json").write_text(json.dumps({key: camera}))
    small = {"cameras": cameras, "shots": dict(list(shots.items())[:1]), "points": {}}
    path = data_dir / "opensfm" / "reconstruction.json"
    path.parent.mkdir()
    path.write_text(json.dumps([small, {"cameras": cameras, "shots": shots, "points": points}]))
    return path


def write_metashape(
    model: SparseModel, data_dir: Path, *, internal_points: bool = False, component: bool = False, points: bool = True
) -> Path:
    """Write cameras.xml and a PLY file, in local coordinates or in the chunk's own, as Metashape 2 does.

    Equations: https://www.agisoft.com/forum/index.php?action=profile;area=showposts;u=220832
    """
    width, height = model.camera_sizes[0].tolist()
    fx, fy, cx, cy, *d = model.camera_params[0].tolist()
    fisheye = model.camera_models[0] == "OPENCV_FISHEYE"
    # u = w / 2 + cx + x' f + x' b1, v = h / 2 + cy + y' f; x' has p1 (r^2 + 2 x^2) + 2 p2 x y
    values = {"f": fy, "b1": fx - fy, "cx": cx - width / 2, "cy": cy - height / 2}
    keys = ("k1", "k2", "k3", "k4") if fisheye else ("k1", "k2", "p2", "p1", "k3")
    values |= dict(zip(keys, d, strict=False))
    size = f'<resolution width="{width}" height="{height}"/>'
    adjusted = "".join(f"<{key}>{value!r}</{key}>" for key, value in values.items())
    kind = "fisheye" if fisheye else "frame"
    # From the chunk's own coordinates to local ones: turned, three times as large, moved.
    turn, scale, shift = Rotation.from_rotvec([0.4, -1.1, 0.3]).as_matrix(), 3.0, np.array([10.0, -20.0, 5.0])
    cameras, internal = [], (model.points - shift) @ turn / scale
    for name, rotation, translation, _ in photos_of(model):
        pose = np.eye(4)
        pose[:3, :3] = turn.T @ rotation.T
        pose[:3, 3] = turn.T @ (-rotation.T @ translation - shift) / scale
        label, text = quoteattr(Path(name).stem), " ".join(map(repr, pose.ravel().tolist()))
        cameras.append(
            f'<camera id="{len(cameras)}" sensor_id="0" component_id="0" label={label}>'
            f"<transform>{text}</transform></camera>"
        )
    world = (
        f'<transform><rotation locked="true">{" ".join(map(repr, turn.ravel().tolist()))}</rotation>'
        f"<translation>{' '.join(map(repr, shift.tolist()))}</translation><scale>{scale!r}</scale></transform>"
    )
    components = f'<components><component id="0" label="Component 1">{world}</component></components>'
    path = data_dir / "cameras.xml"
    path.write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<document version="2.0.0"><chunk label="Chunk 1" enabled="true">'
        f'<sensors next_id="1"><sensor id="0" label="unknown" type="{kind}">{size}'
        f'<calibration type="{kind}" class="initial">{size}<f>50</f></calibration>'
        f'<calibration type="{kind}" class="adjusted">{size}{adjusted}</calibration></sensor></sensors>'
        + (components if component else "")
        + f'<cameras next_id="9"><group id="0" label="Group 1">{"".join(cameras[:2])}</group>{"".join(cameras[2:])}'
        '<camera id="99" sensor_id="0" label="not aligned"/></cameras>'
        + ("" if component else world)
        + "</chunk></document>"
    )
    if points:
        write_ply(data_dir / "points of anything.ply", internal if internal_points else model.points, model.points_rgb)
    return path


def write_reality_capture(
    model: SparseModel, data_dir: Path, *, count_line: bool = False, points: bool = True, newer: bool = False
) -> Path:
    """Write a CSV file of Internal/External camera parameters, of lenses with one focal length, and a PLY file.

    The newer one is RealityScan 2's; its angles are an aircraft's in a world of north, east and down:
    https://dev.epicgames.com/documentation/realityscan/camera-geometry-in-realityscan-camera-models-and-coordinate-systems-reference
    """
    width, height = model.camera_sizes[0].tolist()
    f, _, cx, cy, k1, k2, p1, p2, k3 = model.camera_params[0].tolist()
    larger = max(width, height)
    lens = [f * 36 / larger, (cx - width / 2) / larger, (cy - height / 2) / larger, k1, k2, k3, 0.0, p2, p1]
    names = "yaw,pitch,roll,f_35mm,px_norm,py_norm" if newer else "heading,pitch,roll,f,px,py"
    lines = [f"#name,x,y,alt,{names},k1,k2,k3,k4,t1,t2"]
    if count_line:
        lines.insert(0, f"#cameras {len(model.image_names)}")
    for name, rotation, translation, _ in photos_of(model):
        # Columns: the camera's right, up and backwards in the world.
        R = rotation.T * [1, -1, -1]
        if newer:
            # The nose is the picture's upper side, the right wing its right one; north is y, east is x.
            aircraft = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1]]) @ np.stack([R[:, 1], R[:, 0], -R[:, 2]], axis=1)
            angles = Rotation.from_matrix(aircraft).as_euler("ZYX", degrees=True)
        else:
            # With R = Rz(-h) Rx(p) Ry(r), its entries are R[2] = (-cos p sin r, sin p, cos p cos r) and
            # R[:, 1] = (sin h cos p, cos h cos p, sin p).
            pitch, roll = np.arcsin(R[2, 1]), np.arctan2(-R[2, 0], R[2, 2])
            angles = np.rad2deg([np.arctan2(R[0, 1], R[1, 1]), pitch, roll])
        pose = [*(-rotation.T @ translation).tolist(), *angles.tolist()]
        lines.append(",".join([Path(name).name, *map(repr, [*pose, *lens])]))
    path = data_dir / "parameters.csv"
    path.write_text("\n".join(lines) + "\n")
    if points:
        write_ply(data_dir / "parameters.ply", model.points, model.points_rgb)
    return path
