"""Calm camera paths through a scene: level, and never turning faster than a viewer can follow.

A path is first a way without time: places, and at each where the camera looks, as a heading and a pitch about the
scene's vertical. So the horizon lies level in every frame, also where the camera looks straight down. Then it gets its
time: every part of the way takes as long as its turning and its length want, and the length of the video follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from scipy.ndimage import gaussian_filter1d, maximum_filter1d
from scipy.sparse.csgraph import dijkstra
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation, RotationSpline

from datasets.upright import PARALLEL, up_direction
from datasets.view_order import path, sample_of

Shape = Literal["flight", "orbit", "ellipse", "spiral"]
SHAPES: tuple[str, ...] = get_args(Shape)

FASTEST_TURN = 20.0  # degrees a second
FASTEST_PASSING = 0.35  # of the distance to what is seen, a second: what is there passes by 20 degrees a second
SHORTEST, LONGEST = 12.0, 60.0  # seconds that a way takes at least and at most; turning comes on top of that
KEYS = 8  # cameras that a flight passes, those in the middles of so many groups
MOST_CAMERAS = 800  # of which a way is found; more are thinned out evenly
SAMPLES = 3000  # of a way, between which nothing turns by more than a fraction of a degree
SMOOTHING = 0.03  # standard deviation of the window, as a share of the way
STEEPEST = np.deg2rad(70.0)  # beyond that a forward direction says little of the heading
STEEPEST_ORBIT = np.deg2rad(60.0)


@dataclass(frozen=True)
class Way:
    """Hold S places and viewing directions along a way, before it gets its time."""

    frame: np.ndarray  # [3, 3] rotation, whose rows are two level directions and up
    positions: np.ndarray  # [S, 3]
    headings: np.ndarray  # [S] radians about up, from the first level direction to the second, unwrapped
    pitches: np.ndarray  # [S] radians above the horizon

    def poses(self) -> np.ndarray:
        """Return level poses [S, 4, 4] in the OpenCV convention."""
        return level_poses(self.frame, self.positions, self.headings, self.pitches)

    def smoothed(self) -> Way:
        """Return the same way with its corners rounded; no value leaves the range that it had."""

        def smooth(values: np.ndarray) -> np.ndarray:
            return gaussian_filter1d(values, SMOOTHING * len(values), axis=0, mode="nearest")

        return Way(self.frame, smooth(self.positions), smooth(self.headings), smooth(self.pitches))

    def at(self, places: np.ndarray) -> Way:
        """Return the way at F places [F] on it, counted in samples from 0."""
        samples = np.arange(len(self.headings))

        def along(values: np.ndarray) -> np.ndarray:
            return np.interp(places, samples, values)

        positions = np.stack([along(column) for column in self.positions.T], axis=1)
        return Way(self.frame, positions, along(self.headings), along(self.pitches))


def level_poses(frame: np.ndarray, positions: np.ndarray, headings: np.ndarray, pitches: np.ndarray) -> np.ndarray:
    """Return poses [S, 4, 4] of cameras whose right-hand side is level; arguments as the fields of `Way`."""
    sine, cosine = np.sin(headings), np.cos(headings)
    right = np.stack([sine, -cosine, np.zeros_like(sine)], axis=1)  # [S, 3]
    ahead = np.stack([cosine, sine, np.zeros_like(sine)], axis=1)
    up = np.array([0.0, 0.0, 1.0])
    forward = np.cos(pitches)[:, None] * ahead + np.sin(pitches)[:, None] * up
    down = np.cross(forward, right)
    poses = np.tile(np.eye(4), (len(positions), 1, 1))
    poses[:, :3, :3] = frame.T @ np.stack([right, down, forward], axis=2)
    poses[:, :3, 3] = positions
    return poses


def trajectory(
    shape: str, camtoworlds: np.ndarray, points: np.ndarray, *, frames_per_second: float, seconds: float = 0.0
) -> np.ndarray:
    """Lay a path through a scene.

    Args:
        shape: "flight" passes the cameras, and looks where they look; "orbit" circles around what they look at;
            "ellipse" does so on an ellipse as long and as wide as the cameras' places; "spiral" circles twice, rises
            and comes nearer.
        camtoworlds: [n, 4, 4] rigid poses, in the OpenCV convention.
        points: [P, 3] points of the scene; may be empty.
        frames_per_second: Of the video.
        seconds: How long it shall be; 0: as long as the path wants. Of a path that cannot be flown calmly in so short a
            time its beginning is.

    Returns:
        [F, 4, 4] rigid poses, a frame each. From one to the next no camera turns faster than 20 degrees a second, and
        none rolls.
    """
    frame = level_frame(up_direction(camtoworlds, points))
    makers: dict[str, Callable[..., Way]] = {"flight": flight, "orbit": orbit, "ellipse": ellipse, "spiral": spiral}
    way = makers[shape](frame, camtoworlds, points)
    length = float(np.linalg.norm(np.diff(way.positions, axis=0), axis=1).sum())
    distance = seen_distance(camtoworlds, points)
    crossing = float(np.clip(length / (FASTEST_PASSING * distance), SHORTEST, LONGEST)) if distance > 0 else SHORTEST
    return way.at(timed(way, frames_per_second, crossing, seconds)).poses()


def level_frame(up: np.ndarray) -> np.ndarray:
    """Return a rotation [3, 3] whose last row is up [3]."""
    side = np.eye(3)[np.abs(up).argmin()]
    first = side - (side @ up) * up
    first = first / np.linalg.norm(first)
    return np.stack([first, np.cross(up, first), up])


# ---------------------------------------------------------------------------------------------------------- time


def seen_distance(camtoworlds: np.ndarray, points: np.ndarray) -> float:
    """Return how far away is what cameras see: the median camera's median distance of points; 0 where they see none."""
    few = camtoworlds[:: len(camtoworlds) // 50 + 1]
    positions, forwards = few[:, :3, 3], few[:, :3, 2]
    points = sample_of(points, 2000)
    medians = []
    for position, forward in zip(positions, forwards, strict=True):
        offsets = points - position
        depths, distances = offsets @ forward, np.linalg.norm(offsets, axis=1)
        in_view = depths > 0.85 * distances  # 32 degrees around the middle of the picture
        if in_view.any():
            medians.append(float(np.median(distances[in_view])))
    return float(np.median(medians)) if medians else 0.0


def timed(way: Way, frames_per_second: float, crossing: float, seconds: float = 0.0) -> np.ndarray:
    """Return at which places of a way, in samples, the frames of a video are.

    Where the time is given the speed follows from it; turning keeps its limit in any case.

    Args:
        way: With as many samples as it needs to be smooth.
        frames_per_second: Of the video.
        crossing: Seconds that the way takes where nothing turns; turning comes on top.
        seconds: Length of the video, in place of that; 0: as it comes.
    """
    moved = np.linalg.norm(np.diff(way.positions, axis=0), axis=1)  # [S - 1]
    turned = np.hypot(np.diff(way.headings), np.diff(way.pitches))  # their axes are perpendicular
    turning = np.rad2deg(turned) / (0.99 * FASTEST_TURN)  # seconds; a hundredth is left for frames between samples
    straight = moved / moved.sum() if moved.sum() > 0 else np.full(len(moved), 1.0 / len(moved))

    def pace(crossing_seconds: float) -> np.ndarray:
        """Return seconds for each part of the way, evened out; never fewer than turning wants."""
        wanted = np.hypot(turning, crossing_seconds * straight)
        width = max(int(SMOOTHING * len(wanted)), 1)
        # The window's truncation is 2 widths, so it sees nothing below the value in its middle.
        evened = gaussian_filter1d(maximum_filter1d(wanted, 4 * width + 1, mode="nearest"), width, truncate=2.0)
        return np.maximum(evened, wanted)

    if seconds:
        low, high = 0.0, seconds
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if pace(middle).sum() < seconds else (low, middle)
        times = np.concatenate([[0.0], np.cumsum(pace(low))])
    else:
        times = np.concatenate([[0.0], np.cumsum(pace(crossing))])
    count = max(round((seconds or times[-1]) * frames_per_second), 1)
    moments = np.arange(count) / frames_per_second
    return np.interp(moments, times, np.arange(len(times)))


# ---------------------------------------------------------------------------------------------------------- ways


def flight(frame: np.ndarray, camtoworlds: np.ndarray, points: np.ndarray) -> Way:
    """Pass cameras all over the scene on a short way, which goes from camera to camera and so where one can be."""
    thinned = np.unique(np.linspace(0, len(camtoworlds) - 1, MOST_CAMERAS).round().astype(int))
    camtoworlds = camtoworlds[thinned]
    positions, forwards = camtoworlds[:, :3, 3], camtoworlds[:, :3, 2]
    size = float(np.linalg.norm(positions - np.median(positions, axis=0), axis=1).mean()) or 1.0
    features = np.concatenate([positions / size, forwards], axis=1)  # [n, 6]
    apart = cdist(features, features)  # [n, n]
    keys = _spread_keys(features)
    # Squares make many short hops cheaper than one long one; what stands at one place is a hop, too.
    hops = apart**2 + 1e-9
    costs, before = dijkstra(hops, directed=False, indices=keys, return_predecessors=True)  # each [keys, n]
    between = costs[:, keys]
    similarity = np.round(1e6 * (between.max() - between) / (between.max() or 1.0)).astype(np.int64)
    starts = [_rotated_path(similarity, first) for first in range(len(keys))]
    order = min(starts, key=lambda tour: between[tour[:-1], tour[1:]].sum())
    passed = [int(keys[order[0]])]
    for start, end in pairwise(order):
        back, leg = int(keys[end]), []
        while back != keys[start]:
            leg.append(back)
            back = int(before[start, back])
        passed += leg[::-1]
    headings, pitches = directions(frame, camtoworlds[passed])
    return _evenly(frame, positions[passed], headings, pitches, size).smoothed()


def _rotated_path(similarity: np.ndarray, first: int) -> np.ndarray:
    """Return a short tour of keys that begins with one of them."""
    turned = np.roll(np.arange(len(similarity)), -first)
    return turned[path(similarity[np.ix_(turned, turned)])]


def _spread_keys(features: np.ndarray) -> np.ndarray:
    """Return the cameras nearest to the middles of KEYS groups of alike ones, [k] ascending (Lloyd's k-means)."""
    chosen = [int(np.linalg.norm(features - np.median(features, axis=0), axis=1).argmin())]
    while len(chosen) < min(KEYS, len(features)):  # the farthest one begins the next group
        chosen.append(int(cdist(features, features[chosen]).min(axis=1).argmax()))
    middles = features[chosen]
    for _ in range(20):
        group = cdist(features, middles).argmin(axis=1)
        middles = np.stack([features[group == k].mean(axis=0) if (group == k).any() else middles[k]
                            for k in range(len(middles))])  # fmt: skip
    return np.unique(cdist(middles, features).argmin(axis=1))


def directions(frame: np.ndarray, camtoworlds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return headings (unwrapped) and pitches [n] of cameras in their order, in radians.

    One that looks steeply down, or up, has a heading that means little: it takes that of the others around it in the
    order. Where all do, the heading is that of the first one's upper edge.
    """
    forwards = camtoworlds[:, :3, 2] @ frame.T  # [n, 3]
    pitches = np.arcsin(np.clip(forwards[:, 2], -1.0, 1.0))
    sure = np.flatnonzero(np.abs(pitches) < STEEPEST)
    if len(sure) == 0:
        right = camtoworlds[0, :3, 0] @ frame.T  # heading is up x right
        return np.full(len(forwards), np.arctan2(right[0], -right[1])), pitches
    headings = np.unwrap(np.arctan2(forwards[sure, 1], forwards[sure, 0]))
    return np.interp(np.arange(len(forwards)), sure, headings), pitches


def _evenly(frame: np.ndarray, positions: np.ndarray, headings: np.ndarray, pitches: np.ndarray, size: float) -> Way:
    """Return the way through some cameras in SAMPLES, each as far from the next in place and direction together."""
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1) / size + np.hypot(np.diff(headings), np.diff(pitches))
    reached = np.concatenate([[0.0], np.cumsum(steps + 1e-9)])
    places = np.interp(np.linspace(0.0, reached[-1], SAMPLES), reached, np.arange(len(reached)))
    return Way(frame, positions, headings, pitches).at(places)


@dataclass(frozen=True)
class Surroundings:
    """Hold what cameras look at and how they stand around it."""

    focus: np.ndarray  # [3]
    offsets: np.ndarray  # [n, 3] of the cameras from the focus, in level coordinates
    looks_out: bool  # cameras look away from the middle, as in a room
    elevation: float  # radians: how high the middle camera stands above the horizon of the focus
    distance: float  # of the middle camera

    @staticmethod
    def of(frame: np.ndarray, camtoworlds: np.ndarray, points: np.ndarray) -> Surroundings:
        """Find what the cameras look at, and their distance and elevation from it.

        That is the point nearest to all viewing directions. Cameras that look in parallel have none, or one behind
        them; how far along they look is then what the points say.
        """
        positions, forwards = camtoworlds[:, :3, 3], camtoworlds[:, :3, 2]
        ahead = forwards.mean(axis=0)
        in_parallel = np.linalg.norm(ahead) > PARALLEL
        if in_parallel:
            ahead = ahead / np.linalg.norm(ahead)
            middle = positions.mean(axis=0)
            depth = float(np.median((points - middle) @ ahead)) if len(points) else 1.0
            focus = middle + (depth if depth > 0 else 1.0) * ahead
        else:
            across = np.eye(3) - forwards[:, :, None] * forwards[:, None, :]  # [n, 3, 3]
            middle = positions.mean(axis=0)
            towards = np.einsum("nij,nj->i", across, positions - middle)
            focus = middle + np.linalg.lstsq(across.sum(axis=0), towards)[0]  # of two that face each other: between
        offsets = positions - focus
        distances = np.linalg.norm(offsets, axis=1)
        cosines = -(offsets * forwards).sum(axis=1) / np.maximum(distances, 1e-12)
        level = offsets @ frame.T
        seen_from = -ahead[None] @ frame.T if in_parallel else level  # of a wide survey few stand above its middle
        elevations = np.arctan2(seen_from[:, 2], np.linalg.norm(seen_from[:, :2], axis=1))
        return Surroundings(
            focus=focus,
            offsets=level,
            looks_out=bool(not in_parallel and np.median(cosines) < 0.5),
            elevation=float(np.clip(np.median(elevations), -STEEPEST_ORBIT, STEEPEST_ORBIT)),
            distance=float(np.median(distances)),
        )


def middle_of(frame: np.ndarray, camtoworlds: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return what cameras look at [3], or in a room, where they look out, the middle of their places."""
    return Surroundings.of(frame, camtoworlds, points).focus


def orbit(frame: np.ndarray, camtoworlds: np.ndarray, points: np.ndarray) -> Way:
    """Circle once around what the cameras look at; in a room, where they look out, around their middle, looking out."""
    around = Surroundings.of(frame, camtoworlds, points)
    angles = np.linspace(0.0, 2 * np.pi, SAMPLES)
    elevation, distance = around.elevation, around.distance
    return _around(frame, around, angles, np.full(SAMPLES, elevation), np.full((SAMPLES, 2), distance))


def ellipse(frame: np.ndarray, camtoworlds: np.ndarray, points: np.ndarray) -> Way:
    """Go round once on an ellipse, as long and as wide as the cameras' places are spread, at their middle height."""
    around = Surroundings.of(frame, camtoworlds, points)
    level = around.offsets[:, :2]
    _, axes = np.linalg.eigh(level.T @ level)  # columns, the longer axis last
    turn = np.eye(3)
    turn[:2, :2] = axes[:, ::-1].T  # rows: the longer axis, the shorter one
    turn[1] *= np.linalg.det(turn)
    spread = np.sqrt(2.0 * np.mean((level @ turn[:2, :2].T) ** 2, axis=0))  # a circle's radius, for cameras on a circle
    spread = np.maximum(spread, 0.3 * spread.max())  # no line to and fro
    turned = Surroundings.of(turn @ frame, camtoworlds, points)
    angles = np.linspace(0.0, 2 * np.pi, SAMPLES)
    radii = spread / np.cos(around.elevation)
    return _around(turn @ frame, turned, angles, np.full(SAMPLES, around.elevation), np.tile(radii, (SAMPLES, 1)))


def spiral(frame: np.ndarray, camtoworlds: np.ndarray, points: np.ndarray) -> Way:
    """Circle twice, from a tenth of a turn below the cameras' elevation to as much above it, and a quarter nearer."""
    around = Surroundings.of(frame, camtoworlds, points)
    risen = np.linspace(-1.0, 1.0, SAMPLES)
    elevations = np.clip(around.elevation + 0.1 * np.pi * risen, -STEEPEST_ORBIT, STEEPEST_ORBIT)
    if around.elevation > 0:
        elevations = np.maximum(elevations, 0.3 * around.elevation)  # the ground stays below
    distances = around.distance * (1.125 - 0.125 * risen)
    return _around(frame, around, 2 * np.pi * (risen + 1.0), elevations, np.stack([distances, distances], axis=1))


def _around(
    frame: np.ndarray, around: Surroundings, angles: np.ndarray, elevations: np.ndarray, radii: np.ndarray
) -> Way:
    """Return the way on these angles, elevations [S] and radii [S, 2] about the focus, looking at it or away."""
    offsets = np.stack(
        [
            radii[:, 0] * np.cos(elevations) * np.cos(angles),
            radii[:, 1] * np.cos(elevations) * np.sin(angles),
            radii.max(axis=1) * np.sin(elevations),
        ],
        axis=1,
    )
    forwards = offsets if around.looks_out else -offsets
    headings = np.unwrap(np.arctan2(forwards[:, 1], forwards[:, 0]))
    pitches = np.arctan2(forwards[:, 2], np.linalg.norm(forwards[:, :2], axis=1))
    return Way(frame, around.focus + offsets @ frame, headings, pitches)


# ------------------------------------------------------------------------------------------------- given poses


def through(keys: np.ndarray, *, frames_per_second: float, seconds: float = 0.0) -> np.ndarray:
    """Lay a smooth path through given poses, at about even speed; they are met as they are, with their roll.

    Args:
        keys: [M, 4, 4] rigid poses.
        frames_per_second: Of the video.
        seconds: How long it shall be; 0: as short as turning by at most 20 degrees a second allows, and at least a
            second for each pose.

    Returns:
        [F, 4, 4] rigid poses.
    """
    steps = np.linalg.norm(np.diff(keys[:, :3, 3], axis=0), axis=1)
    # Time goes with the distance between keys, and passes where two stand at one place too.
    pace = steps + 0.1 * (steps.mean() if len(steps) else 0.0) + 1e-9
    times = np.concatenate([[0.0], np.cumsum(pace) / pace.sum()])
    if not seconds:
        tried = _splined(keys, times, np.linspace(0.0, 1.0, SAMPLES))
        seconds = max(len(keys) - 1.0, fastest_turn(tried, SAMPLES - 1.0) / (0.99 * FASTEST_TURN))
    count = max(round(seconds * frames_per_second), 1)
    return _splined(keys, times, np.linspace(0.0, 1.0, count))


def _splined(keys: np.ndarray, times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    from scipy.interpolate import CubicSpline  # here, since it takes a tenth of a second and few runs make a video

    frames = np.tile(np.eye(4), (len(moments), 1, 1))
    if len(keys) == 1:
        return frames @ keys[0]
    frames[:, :3, 3] = CubicSpline(times, keys[:, :3, 3])(moments)
    frames[:, :3, :3] = RotationSpline(times, Rotation.from_matrix(keys[:, :3, :3]))(moments).as_matrix()
    return frames


def fastest_turn(poses: np.ndarray, frames_per_second: float) -> float:
    """Return the degrees a second at which a path [F, 4, 4] turns where it turns fastest."""
    if len(poses) < 2:
        return 0.0
    turns = poses[:-1, :3, :3].transpose(0, 2, 1) @ poses[1:, :3, :3]
    return float(np.rad2deg(Rotation.from_matrix(turns).magnitude().max()) * frames_per_second)
