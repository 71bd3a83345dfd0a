"""The built-in scene: a small city block, photographed as by a drone, written to disk as a COLMAP dataset.

The pictures are ray-cast from textured boxes on a textured ground plane, so that they owe nothing to the
Gaussians that are later fitted to them. World axes: x east, y north, z up, in metres, the block's centre at
the origin. Camera axes: x right, y down, z forward (COLMAP, OpenCV).

    python -m datasets.synthetic --data_dir data/city_block --num_views 200 --size 144
"""

import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from errors import InputError, reason, refusing
from option_words import parse

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

LOT_PITCH = 24.0  # metres from street axis to street axis
STREET_HALF_WIDTH = 4.0
SIDEWALK_WIDTH = 1.5
FLIGHT_HEIGHT = 55.0  # above every roof
# Half the field of view along the longer image side. As oblique views look 45 degrees down, every ray points
# below the horizon: each pixel hits the block or the ground around it, and no sky is needed.
HALF_FOV = np.deg2rad(29.0)
SUN = np.array([0.46, -0.34, 0.82]) / np.linalg.norm([0.46, -0.34, 0.82])
# Rotated grid: four samples per pixel at four different heights and widths, in pixels.
SUBPIXELS = ((0.125, 0.625), (0.375, 0.125), (0.625, 0.875), (0.875, 0.375))
MOST_RAYS = 1 << 16  # at once: beyond that they leave the caches, and calls take no time beside what they do

BUILDING, MACHINE, TREE, CAR = range(4)
PUNCHED, RIBBON, CURTAIN = range(3)  # facades: single windows, bands of windows, glass between mullions

GRASS = np.array([0.36, 0.44, 0.24])
PAVING = np.array([0.66, 0.61, 0.53])
ASPHALT = np.array([0.36, 0.37, 0.39])
CONCRETE = np.array([0.68, 0.68, 0.66])
MARKING = np.array([0.80, 0.79, 0.74])
GLASS = np.array([0.20, 0.26, 0.34])
BLIND = np.array([0.55, 0.53, 0.46])
WALLS = np.array(
    [
        [0.78, 0.38, 0.28],
        [0.93, 0.86, 0.70],
        [0.86, 0.85, 0.83],
        [0.62, 0.42, 0.33],
        [0.90, 0.68, 0.40],
        [0.55, 0.62, 0.68],
        [0.75, 0.78, 0.66],
    ]
)
ROOFS = np.array([[0.72, 0.71, 0.69], [0.42, 0.40, 0.40], [0.62, 0.33, 0.25], [0.55, 0.58, 0.60], [0.85, 0.83, 0.78]])
PAINTS = np.array([[0.75, 0.10, 0.10], [0.90, 0.90, 0.90], [0.12, 0.25, 0.60], [0.15, 0.15, 0.16], [0.95, 0.75, 0.15]])


@dataclass(frozen=True)
class City:
    """B axis-aligned boxes on the ground plane z = 0."""

    low: Floats  # [B, 3] metres
    high: Floats  # [B, 3]
    kind: Ints  # [B] BUILDING, MACHINE, TREE or CAR
    facade: Ints  # [B] PUNCHED, RIBBON or CURTAIN
    side: Floats  # [B, 3] colour of the four sides, in 0..1
    top: Floats  # [B, 3] colour of the top
    lots: int  # lots along each side of the block
    pitch: float  # metres from street axis to street axis
    is_green: NDArray[np.bool_]  # [lots, lots] lots of grass; the others are paved
    noise: Floats  # [64, 64] in -1..1, periodic

    @property
    def half_size(self) -> float:
        return self.lots * self.pitch / 2


@dataclass(frozen=True)
class Camera:
    """Pinhole camera; pixel (column, row) covers [column, column + 1] x [row, row + 1], as in COLMAP."""

    width: int
    height: int

    @property
    def focal(self) -> float:
        return max(self.width, self.height) / (2 * np.tan(HALF_FOV))

    def rays(self, columns: Floats, rows: Floats) -> Floats:
        """Return directions [3, ...] in camera axes, with z = 1, through image positions in pixels."""
        x = (columns - self.width / 2) / self.focal
        y = (rows - self.height / 2) / self.focal
        return np.stack([x, y, np.ones_like(x)])

    def project(self, points: Floats) -> Floats:
        """Return image positions [2, ...] in pixels of points [3, ...] in camera axes."""
        return self.focal * points[:2] / points[2] + np.array([self.width / 2, self.height / 2])[:, None]


@dataclass(frozen=True)
class View:
    rotation: Floats  # [3, 3] world to camera
    position: Floats  # [3] of the camera, in the world


def write_city_block(
    data_dir: Path,
    *,
    num_views: int = 80,
    width: int = 320,
    height: int = 240,
    size: float = 72.0,
    num_points: int = 10000,
    point_noise: float = 0.15,
    seed: int = 0,
) -> None:
    """Write a city block as a COLMAP dataset: `images/*.png` and `sparse/0/{cameras,images,points3D}.bin`.

    The flight keeps its height, so a larger block needs more views, and each sees a smaller part of it.
    Neighbouring names are neighbouring views. The dataset appears under `data_dir` only when it is complete.

    Args:
        data_dir: folder to make; it must not exist or be empty.
        num_views: number of pictures.
        width: of a picture, in pixels.
        height: of a picture, in pixels.
        size: side of the block, in metres, rounded to whole lots of 24 m.
        num_points: number of points in the sparse cloud.
        point_noise: standard deviation of each coordinate of these points, in metres.
        seed: of buildings, views and points.

    Raises:
        InputError: an option is out of range, or `data_dir` is not empty or cannot be written.
    """
    for name, value in (
        ("num_views", num_views),
        ("width", width),
        ("height", height),
        ("num_points", num_points),
    ):
        if value < 1:
            raise InputError(f"--{name} is {value}; give at least 1.")
    if not 0 < size < 1e5:
        raise InputError(f"--size is {size}; give a side of the block in metres, such as 72.")
    if not 0 <= point_noise < 1e5:
        raise InputError(f"--point_noise is {point_noise}; give metres, 0 or more.")
    if seed < 0:
        raise InputError(f"--seed is {seed}; give 0 or more.")

    data_dir = Path(data_dir).absolute()
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise InputError(f"{data_dir} is not an empty folder; name a new one as --data_dir.")
    build_rng, flight_rng, point_rng = (np.random.default_rng([seed, part]) for part in range(3))
    city = build_city(size, build_rng)
    camera = Camera(width, height)
    views = plan_flight(num_views, city.half_size, flight_rng)
    points, colors = sample_points(city, camera, views, num_points, point_rng)
    noisy_points = points + point_rng.normal(0, point_noise, points.shape)
    names = [f"{index:0{len(str(num_views))}d}.png" for index in range(num_views)]
    try:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{data_dir.name}.partial-", dir=data_dir.parent) as workspace:
            partial = Path(workspace) / data_dir.name
            (partial / "images").mkdir(parents=True)
            (partial / "sparse" / "0").mkdir(parents=True)
            seen = shoot_views(city, camera, views, points, [partial / "images" / name for name in names])
            write_colmap(partial / "sparse" / "0", camera, views, names, points, noisy_points, colors, seen)
            partial.replace(data_dir)
    except OSError as error:
        raise InputError(f"{data_dir} cannot be written ({reason(error)}): name another --data_dir.") from error


def ensure_city_block(data_dir: Path) -> None:
    """Make the default city block in `data_dir`, unless a COLMAP model is there already.

    Raises:
        InputError: `data_dir` holds something else or cannot be written.
    """
    if not (Path(data_dir) / "sparse").is_dir():
        write_city_block(data_dir)


# -------------------------------------------------------------------------------------------------- the block


def build_city(size: float, rng: np.random.Generator) -> City:
    """Build buildings, parks and parked cars on a square of about `size` metres."""
    lots = max(1, round(size / LOT_PITCH))
    half = lots * LOT_PITCH / 2
    is_park = rng.random((lots, lots)) < 0.12
    is_park[rng.integers(lots), rng.integers(lots)] = True
    boxes: list[tuple] = []  # (low, high, kind, facade, side, top)

    def add(kind: int, center: tuple[float, float], extent: tuple[float, float, float], base: float, **look) -> None:
        low = np.array([center[0] - extent[0] / 2, center[1] - extent[1] / 2, base])
        side = look.get("side", CONCRETE)
        boxes.append((low, low + extent, kind, look.get("facade", PUNCHED), side, look.get("top", side)))

    def add_building(center: tuple[float, float], extent: tuple[float, float], floors: int) -> None:
        side, top, facade = WALLS[rng.integers(len(WALLS))], ROOFS[rng.integers(len(ROOFS))], rng.integers(3)
        tall = 3.0 * floors + 1.0
        add(BUILDING, center, (*extent, tall), 0.0, side=side, top=top, facade=facade)
        if floors >= 5:  # a set-back upper part
            inner = (0.62 * extent[0], 0.62 * extent[1])
            add(BUILDING, center, (*inner, 7.0), tall, side=side, top=top, facade=facade)
        else:
            shift = rng.uniform(-0.2, 0.2, 2) * extent
            add(MACHINE, tuple(center + shift), (*rng.uniform(2.0, 3.5, 2), 1.8), tall)

    for i, j in np.ndindex(lots, lots):
        x, y = (np.array([i, j]) + 0.5) * LOT_PITCH - half
        if is_park[i, j]:
            for dx, dy in rng.permutation([(dx, dy) for dx in (-4.8, 0, 4.8) for dy in (-4.8, 0, 4.8)])[:6]:
                tree = (x + dx + rng.uniform(-0.7, 0.7), y + dy + rng.uniform(-0.7, 0.7))
                crown, trunk = rng.uniform(2.6, 3.8), rng.uniform(1.2, 2.0)
                add(TREE, tree, (0.6, 0.6, trunk), 0.0, side=np.array([0.36, 0.25, 0.17]))
                add(
                    TREE,
                    tree,
                    (crown, crown, crown),
                    trunk,
                    side=rng.uniform([0.12, 0.30, 0.1], [0.25, 0.42, 0.18]),
                )
        elif rng.random() < 0.55:
            add_building((x, y), tuple(rng.uniform(9.5, 12.5, 2)), int(rng.integers(3, 7)))
        else:
            split = rng.uniform(-1.0, 1.0)
            along_x = rng.random() < 0.5
            for sign in (-1, 1):
                shift, long = sign * 3.4 + split * 0.5, 5.4 - sign * split
                center, extent = ((x + shift, y), (long, 12.0)) if along_x else ((x, y + shift), (12.0, long))
                add_building(center, extent, int(rng.integers(2, 5)))

    for street in range(lots + 1):
        for lot in range(lots):
            for along_x in (False, True):
                along = (lot + 0.5) * LOT_PITCH - half + rng.uniform(-5, 5)
                across = street * LOT_PITCH - half + rng.choice([-2.6, 2.6])
                paint = PAINTS[rng.integers(len(PAINTS))]
                center, extent = ((along, across), (4.6, 2.0)) if along_x else ((across, along), (2.0, 4.6))
                if rng.random() < 0.6:
                    add(CAR, center, (*extent, 1.6), 0.0, side=paint)

    low, high, kind, facade, side, top = (np.array(column) for column in zip(*boxes, strict=True))
    return City(
        low=low.astype(np.float32),
        high=high.astype(np.float32),
        kind=kind,
        facade=facade,
        side=side.astype(np.float32),
        top=top.astype(np.float32),
        lots=lots,
        pitch=LOT_PITCH,
        is_green=is_park | (rng.random((lots, lots)) < 0.3),
        noise=rng.uniform(-1, 1, (64, 64)).astype(np.float32),
    )


# ------------------------------------------------------------------------------------------------- the flight


def plan_flight(num_views: int, half_size: float, rng: np.random.Generator) -> list[View]:
    """Fly oblique circles that look inwards, then a nadir grid to and fro; every leg in flying order."""
    num_nadir = num_views // 4
    reach = half_size - LOT_PITCH / 2  # to the centres of the outer lots
    # A view 45 degrees down looks at the ground FLIGHT_HEIGHT ahead: each circle watches one of these radii.
    watched = np.linspace(0, reach, max(2, 1 + round(reach / 40)))
    ends = np.cumsum(watched + FLIGHT_HEIGHT) / np.sum(watched + FLIGHT_HEIGHT)  # share views by length
    stops = np.concatenate([[0], np.round(ends * (num_views - num_nadir))]).astype(int)
    views = []
    for radius, count in zip(watched, np.diff(stops), strict=True):
        for angle in 2 * np.pi * np.arange(count) / max(count, 1):
            outward = np.array([np.cos(angle), np.sin(angle), 0])
            position = (radius + FLIGHT_HEIGHT) * outward + [0, 0, FLIGHT_HEIGHT]
            views.append(look_at(position, radius * outward, -outward, rng))

    columns = max(1, round(num_nadir**0.5))
    rows = -(-num_nadir // columns)
    for index in range(num_nadir):
        column, step = divmod(index, rows)
        row = step if column % 2 == 0 else rows - 1 - step
        east, north = reach * ((2 * column + 1) / columns - 1), reach * ((2 * row + 1) / rows - 1)
        position, below = np.array([east, north, FLIGHT_HEIGHT]), np.array([east, north, 0])
        views.append(look_at(position, below, np.array([0.0, 1, 0]), rng))
    return views


def look_at(position: Floats, target: Floats, up: Floats, rng: np.random.Generator) -> View:
    """Place a view from about `position` [3] to about `target` [3], the picture's upper edge towards `up` [3]."""
    position = position + rng.uniform(-2, 2, 3)
    forward = target + rng.uniform(-2, 2, 3) * [1, 1, 0] - position
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    return View(np.stack([right, np.cross(forward, right), forward]), position)


# ------------------------------------------------------------------------------------------------ ray casting


def slab(low: Floats, high: Floats, origin: Floats, inverse: Floats) -> tuple[Floats, Floats]:
    """Find where rays enter and leave a box, per axis (Kay and Kajiya 1986).

    Args:
        low, high, origin: [3, ...], broadcast against `inverse`.
        inverse: 1 / direction, [3, ...].

    Returns:
        Ray parameters [3, ...] of the nearer and the farther plane of each axis; a ray is inside the box from
        the largest of the near ones to the smallest of the far ones.
    """
    a, b = (low - origin) * inverse, (high - origin) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def screen_windows(city: City, camera: Camera, view: View) -> list[tuple[int, slice, slice]]:
    """Find the boxes that can be in the picture, each with the rows and columns that enclose its outline."""
    corners = np.stack([city.low, city.high])  # [2, B, 3]
    corners = np.stack([corners[pick, :, axis] for axis, pick in enumerate(np.indices((2, 2, 2)).reshape(3, 8))])
    corners = np.moveaxis(corners, 0, -1) - view.position  # [8, B, 3]
    x, y, z = np.moveaxis(corners @ view.rotation.T, -1, 0)  # [8, B] each
    in_front = z > 0.1
    limit = np.array([camera.width, camera.height])
    columns_rows = camera.project(np.stack([x, y, np.maximum(z, 0.1)]).reshape(3, -1)).reshape(2, 8, -1)
    first = np.clip(np.floor(columns_rows.min(1)).T, 0, limit).astype(int)  # [B, 2]
    last = np.clip(np.ceil(columns_rows.max(1)).T, 0, limit).astype(int)
    straddles = in_front.any(0) & ~in_front.all(0)  # the outline is unbounded: take the whole picture
    first[straddles], last[straddles] = 0, limit
    shown = in_front.any(0) & (first < last).all(1)
    return [(int(b), slice(first[b, 1], last[b, 1]), slice(first[b, 0], last[b, 0])) for b in np.flatnonzero(shown)]


def cast(city: City, origin: Floats, rays: Floats, windows: list[tuple[int, slice, slice]]) -> tuple[Floats, Ints]:
    """Find the first surface on each ray.

    Args:
        origin: [3] of all rays.
        rays: [3, ..., H, W] directions, pointing below the horizon.
        windows: the boxes to try, each with the part of H and W where it can be hit.

    Returns:
        Ray parameter [..., H, W] of the hit, and the box that is hit [..., H, W], -1 for the ground.
    """
    with np.errstate(divide="ignore"):
        inverse = 1 / rays
    distance = -origin[2] * inverse[2]
    hit = np.full(distance.shape, -1)
    column = (3, *(1,) * distance.ndim)
    for box, rows, columns in windows:
        at = (..., rows, columns)
        near, far = slab(
            city.low[box].reshape(column), city.high[box].reshape(column), origin.reshape(column), inverse[at]
        )
        enter, leave = near.max(0), far.min(0)
        closer = (enter < leave) & (enter > 0) & (enter < distance[at])
        distance[at][closer] = enter[closer]
        hit[at][closer] = box
    return distance, hit


def in_shadow(city: City, points: Floats) -> NDArray[np.bool_]:
    """Tell whether a box stands between points [3, M] and the sun, [M]."""
    shadow = np.zeros(points.shape[1], bool)
    if not shadow.size:
        return shadow
    # Moved along the sun's rays to the ground, only points within the bounds of a box's shadow can be in it.
    lean = (SUN[:2] / SUN[2]).astype(np.float32)
    ground = points[:2] - points[2] * lean[:, None]  # [2, M]
    from_base, from_top = city.low[:, 2:] * lean, city.high[:, 2:] * lean  # [B, 2]
    first = city.low[:, :2] - np.maximum(from_base, from_top)
    last = city.high[:, :2] - np.minimum(from_base, from_top)
    candidates = np.flatnonzero(((first < ground.max(1)) & (last > ground.min(1))).all(1))
    inverse = (1 / SUN).astype(np.float32)[:, None]
    for box in candidates:
        inside = ((ground > first[box, :, None]) & (ground < last[box, :, None])).all(0)
        some = np.flatnonzero(inside)
        near, far = slab(city.low[box, :, None], city.high[box, :, None], points[:, some], inverse)
        leave = far.min(0)
        # A point on the box's own sunlit face leaves it at once; float32 rounding is far below a centimetre.
        shadow[some] |= (near.max(0) < leave) & (leave > 0.01)
    return shadow


def shade(city: City, origin: Floats, rays: Floats, distance: Floats, hit: Ints) -> Floats:
    """Compute colours [3, M] in 0..1 of the surfaces that `cast` found: texture, Lambert's law, hard shadows.

    Args:
        origin: [3]; rays: [3, M]; distance, hit: [M].
    """
    points = origin[:, None] + rays * distance
    normal = np.zeros_like(points)
    normal[2] = 1
    color = np.empty_like(points)
    on_ground = hit < 0
    color[:, on_ground] = ground_color(city, points[:2, on_ground])

    on_box = np.flatnonzero(~on_ground)
    box, at = hit[on_box], points[:, on_box]
    near, _ = slab(city.low[box].T, city.high[box].T, origin[:, None], 1 / rays[:, on_box])
    axis = near.argmax(0)  # of the face that the ray enters through
    normal[2, on_box] = 0
    normal[axis, on_box] = -np.sign(rays[axis, on_box])
    on_top = axis == 2
    color[:, on_box[on_top]] = top_color(city, box[on_top], at[:, on_top])
    color[:, on_box[~on_top]] = side_color(city, box[~on_top], axis[~on_top], at[:, ~on_top])

    facing = np.maximum(0, SUN.astype(np.float32) @ normal)
    facing[in_shadow(city, points)] = 0
    ambient = 0.44 + 0.08 * normal[2]  # more of the sky above a level surface than beside a wall
    return np.clip(color * (ambient + 0.60 * facing), 0, 1)


def view_rays(camera: Camera, view: View, right: float, down: float) -> Floats:
    """Return the world's directions [3, H, W] of the rays through one place of each pixel."""
    columns, rows = np.meshgrid(np.arange(camera.width) + right, np.arange(camera.height) + down)
    return np.tensordot(view.rotation.T, camera.rays(columns, rows), 1).astype(np.float32)


def render(city: City, camera: Camera, view: View) -> NDArray[np.uint8]:
    """Render the picture [height, width, 3] of a view, averaged over `SUBPIXELS`."""
    windows = screen_windows(city, camera, view)
    origin = view.position.astype(np.float32)
    num_pixels = camera.height * camera.width
    total = np.zeros((3, num_pixels), np.float32)
    at_once = max(MOST_RAYS // num_pixels, 1)  # of small pictures all, since each call takes longer than what it does
    for first in range(0, len(SUBPIXELS), at_once):
        rays = np.stack([view_rays(camera, view, *each) for each in SUBPIXELS[first : first + at_once]], axis=1)
        distance, hit = cast(city, origin, rays, windows)  # [S, H, W] each
        colors = shade(city, origin, rays.reshape(3, -1), distance.ravel(), hit.ravel())  # [3, S H W]
        for color in np.moveaxis(colors.reshape(3, -1, num_pixels), 1, 0):
            total += color
    picture = np.round(total * (255 / len(SUBPIXELS))).astype(np.uint8)
    return picture.T.reshape(camera.height, camera.width, 3)


# --------------------------------------------------------------------------------------------------- textures
# Edges are ramps about as wide as a pixel seen from the flight, so that textures hold little that aliases.


def step_up(x: Floats, edge: Floats | float, ramp: float = 0.25) -> Floats:
    """Return 0 below `edge`, 1 above it, linear over `ramp` metres around it."""
    return np.clip((x - edge) / ramp + 0.5, 0, 1)


def bump(x: Floats, first: Floats | float, last: Floats | float, ramp: float = 0.25) -> Floats:
    """Return 1 between `first` and `last`, 0 outside, with ramps of `ramp` metres."""
    return np.minimum(step_up(x, first, ramp), 1 - step_up(x, last, ramp))


def mix(color: Floats, other: Floats, share: Floats) -> Floats:
    """Return `color` [3, M] with `share` [M] of it replaced by `other` [3] or [3, M]."""
    other = np.asarray(other, np.float32)
    return color + share * ((other[:, None] if other.ndim == 1 else other) - color)


def noise_at(city: City, x: Floats, y: Floats, wavelength: float) -> Floats:
    """Draw smooth value noise in -1..1 whose knots stand `wavelength` metres apart."""
    x, y = x / wavelength, y / wavelength
    column, row = np.floor(x), np.floor(y)
    u, v = x - column, y - row
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i, j = column.astype(int) % 64, row.astype(int) % 64
    i1, j1 = (i + 1) % 64, (j + 1) % 64
    table = city.noise
    return (table[i, j] * (1 - u) + table[i1, j] * u) * (1 - v) + (table[i, j1] * (1 - u) + table[i1, j1] * u) * v


def ground_color(city: City, points: Floats) -> Floats:
    """Paint streets with markings, sidewalks, lots of grass or paving, meadows around; [2, M] to [3, M]."""
    x, y = points
    half = city.half_size
    # The fine noise is turned against the axes, which hides its lattice.
    broad, fine = noise_at(city, x, y, 9.0), noise_at(city, 0.8 * x + 0.6 * y, 0.8 * y - 0.6 * x, 1.8)

    i, j = (np.clip((axis + half) // city.pitch, 0, city.lots - 1).astype(int) for axis in (x, y))
    is_green = (city.is_green[i, j] | (np.maximum(abs(x), abs(y)) > half)).astype(np.float32)
    slab_edge = 0.5 + 0.5 * np.cos(np.pi * x) * np.cos(np.pi * y)  # paving in a soft checker of 1 m
    grass = GRASS.astype(np.float32)[:, None] * (1 + 0.22 * broad + 0.15 * fine)
    paving = PAVING.astype(np.float32)[:, None] * (0.86 + 0.16 * slab_edge + 0.08 * broad)
    color = mix(paving, grass, is_green)

    # Signed distances to the nearest street axis, of streets along y (dx) and along x (dy).
    dx, dy = (a + half - city.pitch * np.clip(np.round((a + half) / city.pitch), 0, city.lots) for a in (x, y))
    edge = half + STREET_HALF_WIDTH + SIDEWALK_WIDTH
    in_block = np.minimum(1 - step_up(abs(x), edge), 1 - step_up(abs(y), edge))
    near = np.minimum(abs(dx), abs(dy))
    color = mix(
        color,
        CONCRETE.astype(np.float32)[:, None] * (1 + 0.06 * fine),
        in_block * (1 - step_up(near, STREET_HALF_WIDTH + SIDEWALK_WIDTH)),
    )
    road = in_block * (1 - step_up(near, STREET_HALF_WIDTH))
    color = mix(color, ASPHALT.astype(np.float32)[:, None] * (1 + 0.14 * broad + 0.12 * fine), road)
    for across, along in ((dx, dy), (dy, dx)):
        between = step_up(abs(along), 8.0)  # away from the crossing
        dash = bump(abs(across), -1.0, 0.22) * bump(along % 4.0, 1.0, 3.0) * between
        zebra = bump(abs(along), 4.6, 7.0) * bump((across + 0.4) % 1.6, 0.4, 1.2) * (abs(across) < 3.6)
        color = mix(color, MARKING, np.maximum(dash, zebra) * road)
    return color


def top_color(city: City, box: Ints, points: Floats) -> Floats:
    """Paint roofs with a parapet, crowns of trees, tops of cars and machines; boxes [M] and [3, M] to [3, M]."""
    x, y, _ = points
    kind = city.kind[box]
    color = city.top[box].T
    rim = np.minimum(points - city.low[box].T, city.high[box].T - points)[:2].min(0)  # metres from the roof's edge
    grain = np.where(kind == TREE, 0.35, 0.10) * noise_at(city, x, y, 1.2)
    patches = np.where(kind == BUILDING, 0.12, 0.0) * noise_at(city, x + 17, y, 4.0)
    color = color * (1 + grain + patches).astype(np.float32)
    parapet = (1 - step_up(rim, 0.6)) * (kind == BUILDING)
    color = mix(color, 0.5 + 0.45 * city.side[box].T, parapet)
    hatch = bump(rim, 0.35, 0.7) * (kind == MACHINE)
    return mix(color, GLASS, 0.8 * hatch)


def side_color(city: City, box: Ints, axis: Ints, points: Floats) -> Floats:
    """Paint facades, sides of trees and cars; boxes [M], axes of their normals [M] and [3, M] to [3, M]."""
    low, high = city.low[box].T, city.high[box].T
    kind, facade = city.kind[box], city.facade[box]
    here = np.arange(len(box))
    run = 1 - axis  # the level axis along the wall
    along, length = points[run, here] - low[run, here], high[run, here] - low[run, here]
    up, tall = points[2] - low[2], high[2] - low[2]
    weather = noise_at(city, along + 7.0 * box, up, 2.5)
    leaves = noise_at(city, along + 5.0 * box, up, 1.0)
    color = city.side[box].T * (1 + np.where(kind == TREE, 0.35 * leaves, 0.07 * weather)).astype(np.float32)

    # Whole bays fill a wall; a storey is 3 m, under a plain band of 1 m at the top.
    bays = np.maximum(1, np.round(length / 3.0))
    bay, storey = np.floor(along / length * bays), np.floor(up / 3.0)
    across, above = (along / length * bays - bay) * 3.0, up - 3.0 * storey  # metres within the bay and storey
    dice = city.noise[(bay.astype(int) * 7 + axis * 29 + box) % 64, (storey.astype(int) * 11 + box * 3) % 64]
    pane = mix(np.repeat(GLASS.astype(np.float32)[:, None], len(box), 1), BLIND, np.clip(1.6 * dice - 0.5, 0, 0.9))
    punched = bump(across, 0.7, 2.3) * bump(above, 0.9, 2.4)
    ribbon = bump(above, 1.0, 2.4) * bump(along, 0.5, length - 0.5)
    curtain = bump(across, 0.25, 2.75) * bump(above, 0.3, 2.8)
    window = np.choose(facade, [punched, ribbon, curtain]) * (up < tall - 1.0) * (kind == BUILDING)
    color = mix(color, pane, window)
    return mix(color, GLASS, bump(up, 0.9, 1.35) * (kind == CAR))


# ----------------------------------------------------------------------------------------------- sparse model


def sample_points(
    city: City, camera: Camera, views: list[View], count: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Draw points under random pixels of random views: positions [count, 3] and colours [count, 3] in 0..1."""
    owner = np.sort(rng.integers(len(views), size=count))
    columns, rows = rng.uniform(0, camera.width, count), rng.uniform(0, camera.height, count)
    points, colors = [], []
    for index in np.unique(owner):
        view, mine = views[index], owner == index
        rays = view.rotation.T @ camera.rays(columns[mine], rows[mine])
        everywhere = [(box, slice(None), slice(None)) for box, _, _ in screen_windows(city, camera, view)]
        distance, hit = cast(city, view.position, rays[:, None], everywhere)
        points.append((view.position[:, None] + rays * distance[0]).T)
        colors.append(shade(city, view.position, rays, distance[0], hit[0]).T)
    order = rng.permutation(count)  # identifiers do not tell which view a point was drawn from
    return np.concatenate(points)[order], np.concatenate(colors)[order]


def shoot_views(city: City, camera: Camera, views: list[View], points: Floats, files: list[Path]) -> list[Ints]:
    """Write the picture of each view to its file; returns which of the points [P, 3] each view sees."""

    def shoot(view: View, file: Path) -> Ints:
        picture = render(city, camera, view)
        if not cv2.imwrite(str(file), picture[..., ::-1]):
            raise OSError(f"writing {file.name} failed")
        return points_in_view(city, camera, view, points)

    with ThreadPoolExecutor() as pool:
        try:
            return list(tqdm(pool.map(shoot, views, files), "city block", len(views), unit="view"))
        except BaseException:  # Ctrl-C too: do not shoot the rest of the views first
            pool.shutdown(cancel_futures=True)
            raise


def points_in_view(city: City, camera: Camera, view: View, points: Floats) -> Ints:
    """Find the indices of the surface points [P, 3] that the view sees: in the picture and behind no box."""
    in_camera = view.rotation @ (points - view.position).T
    ahead = np.flatnonzero(in_camera[2] > 0.1)
    x, y = camera.project(in_camera[:, ahead])
    framed = ahead[(x >= 0) & (x < camera.width) & (y >= 0) & (y < camera.height)]
    rays = (points[framed] - view.position).T  # a ray reaches its point at distance 1
    everywhere = [(box, slice(None), slice(None)) for box, _, _ in screen_windows(city, camera, view)]
    distance, _ = cast(city, view.position, rays[:, None], everywhere)
    return framed[distance[0] > 1 - 1e-6]


def write_colmap(
    folder: Path,
    camera: Camera,
    views: list[View],
    names: list[str],
    points: Floats,
    noisy_points: Floats,
    colors: Floats,
    seen: list[Ints],
) -> None:
    """Write the binary COLMAP model (https://colmap.github.io/format.html); all identifiers start at 1.

    Args:
        points: [P, 3] where the features are in the pictures.
        noisy_points: [P, 3] where the model says they are.
        colors: [P, 3] in 0..1.
        seen: per view, the indices of the points that it sees.
    """
    with open(folder / "cameras.bin", "wb") as file:
        pinhole = 1
        file.write(struct.pack("<QIiQQ", 1, 1, pinhole, camera.width, camera.height))
        file.write(struct.pack("<4d", camera.focal, camera.focal, camera.width / 2, camera.height / 2))

    observation = np.dtype([("xy", "<f8", 2), ("point", "<u8")])
    errors, sightings = [], []  # sightings: one array [n, 3] of point, view, feature for each view
    with open(folder / "images.bin", "wb") as file:
        file.write(struct.pack("<Q", len(views)))
        for index, (view, name, visible) in enumerate(zip(views, names, seen, strict=True)):
            x, y, z, w = Rotation.from_matrix(view.rotation).as_quat()
            translation = -view.rotation @ view.position
            file.write(struct.pack("<I7dI", index + 1, w, x, y, z, *translation, 1))
            file.write(name.encode() + b"\0" + struct.pack("<Q", len(visible)))
            feature, reprojection = (
                camera.project(view.rotation @ (p[visible] - view.position).T) for p in (points, noisy_points)
            )
            features = np.empty(len(visible), observation)
            features["xy"], features["point"] = feature.T, visible + 1
            file.write(features.tobytes())
            errors.append(np.linalg.norm(feature - reprojection, axis=0))
            sightings.append(np.stack([visible, np.full_like(visible, index), np.arange(len(visible))], 1))

    tracks = np.concatenate(sightings)
    order = np.argsort(tracks[:, 0], kind="stable")
    counts = np.bincount(tracks[:, 0], minlength=len(points))
    error = np.bincount(tracks[:, 0], np.concatenate(errors), len(points)) / np.maximum(counts, 1)
    elements = (tracks[order, 1:] + [1, 0]).astype("<u4")  # image identifier and index of the feature in it
    ends = np.cumsum(counts)
    levels = np.round(colors * 255).astype(int)
    with open(folder / "points3D.bin", "wb") as file:
        file.write(struct.pack("<Q", len(points)))
        for index, end in enumerate(ends):
            file.write(struct.pack("<Q3d3B", index + 1, *noisy_points[index], *levels[index]))
            file.write(struct.pack("<dQ", error[index], counts[index]))
            file.write(elements[end - counts[index] : end].tobytes())


if __name__ == "__main__":
    with refusing():
        parse(write_city_block)
