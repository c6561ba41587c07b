"""The bones and soft tissue of seven synthetic regions, and how much of a bone a ray meets.

Coordinates are those of an image whose half side is 1: x to the right, y down, z towards the
detector. The shapes are plausible, not anatomical; nothing here is measured on people.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "REGIONS",
    "Array",
    "Bone",
    "Frame",
    "Point",
    "Skeleton",
    "View",
    "draw_skeleton",
    "frame_bone",
    "project",
    "reach_of",
    "tube",
]

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Bone:
    """One tapered capsule.

    `width` is the half-width at mid-shaft, `flare` how much wider the two ends are (0.5 = half
    again), `marrow` the share of the half-width that is marrow at mid-shaft, `bow` the sideways
    bend at mid-shaft, `flesh` the half-width of the bone's own soft tissue (0 = none), `breakable`
    whether findings are placed on the bone.
    """

    start: Point
    end: Point
    width: float
    flare: tuple[float, float] = (0.3, 0.3)
    marrow: float = 0.62
    bow: float = 0.0
    flesh: float = 0.0
    breakable: bool = True


@dataclass(frozen=True)
class Skeleton:
    """All bones of one study; `flesh` are soft-tissue capsules without a bone of their own."""

    bones: tuple[Bone, ...]
    flesh: tuple[Bone, ...] = ()


@dataclass(frozen=True)
class View:
    """How a skeleton is placed on the detector.

    `turn` about the long axis and `tilt` in the image plane are in radians; `mirrored` exchanges
    left and right.
    """

    turn: float
    tilt: float
    zoom: float
    shift: tuple[float, float]
    mirrored: bool


def project(bone: Bone, view: View) -> Bone:
    """Return the projection of `bone` in `view`: flat (z = 0), in image coordinates."""
    start, end = _project_point(bone.start, view), _project_point(bone.end, view)
    sign = -1.0 if view.mirrored else 1.0
    return replace(
        bone,
        start=start,
        end=end,
        width=bone.width * view.zoom,
        flesh=bone.flesh * view.zoom,
        bow=sign * bone.bow * view.zoom * float(np.cos(view.turn)),
    )


def _project_point(point: Point, view: View) -> Point:
    x, y, z = point
    x = x * float(np.cos(view.turn)) + z * float(np.sin(view.turn))
    x = -x if view.mirrored else x
    cos, sin = float(np.cos(view.tilt)), float(np.sin(view.tilt))
    flat = (x * cos - y * sin, x * sin + y * cos)
    return (flat[0] * view.zoom + view.shift[0], flat[1] * view.zoom + view.shift[1], 0.0)


def draw_skeleton(region: str, generator: np.random.Generator) -> Skeleton:
    """Draw the individual proportions of one study of `region`, one of `REGIONS`."""
    skeleton = _TEMPLATES[region](generator)
    bones = tuple(_vary(bone, generator) for bone in skeleton.bones)
    return Skeleton(bones, skeleton.flesh)


def _vary(bone: Bone, generator: np.random.Generator) -> Bone:
    width, marrow, flare = generator.uniform(-1, 1, 3)
    return replace(
        bone,
        width=bone.width * (1 + 0.1 * width),
        marrow=bone.marrow + 0.08 * marrow,
        flare=(bone.flare[0] * (1 + 0.2 * flare), bone.flare[1] * (1 + 0.2 * flare)),
    )


def _turn(origin: Point, length: float, angle: float, depth: float = 0.0) -> Point:
    """Return the point `length` away from `origin`; angle 0 points up, positive to the right."""
    dx, dy = length * float(np.sin(angle)), -length * float(np.cos(angle))
    return (origin[0] + dx, origin[1] + dy, origin[2] + depth)


def _elbow(generator: np.random.Generator) -> Skeleton:
    bend = float(generator.uniform(-0.5, 0.2))
    down = np.pi - bend
    radial, ulnar = (-0.13, 0.1, 0.08), (0.1, 0.0, -0.1)
    return Skeleton(
        (
            Bone((0.0, -1.3, 0.0), (0.0, -0.02, 0.0), 0.145, (0.1, 0.75), flesh=0.36),
            Bone(radial, _turn(radial, 1.4, down, 0.05), 0.09, (0.45, 0.2), flesh=0.27),
            Bone(ulnar, _turn(ulnar, 1.4, down), 0.1, (0.5, 0.1), flesh=0.27),
        )
    )


def _finger(generator: np.random.Generator) -> Skeleton:
    lengths = generator.uniform((0.6, 0.45, 0.3), (0.72, 0.55, 0.38))
    joint: Point = (0.0, 0.72, 0.0)
    bones = [Bone((0.0, 1.5, 0.0), (0.0, 0.78, 0.0), 0.16, (0.2, 0.5), flesh=0.3)]
    angle = 0.0
    for length, width in zip(lengths, (0.14, 0.12, 0.095), strict=True):
        angle += float(generator.uniform(-0.12, 0.12))
        end = _turn(joint, float(length) - 0.06, angle)
        bones.append(Bone(joint, end, width, (0.4, 0.3), 0.6, flesh=width + 0.12))
        joint = _turn(joint, float(length), angle)
    neighbour = float(generator.choice((-0.75, 0.75)))
    bones += [
        Bone((neighbour, 1.4, 0.1), (neighbour, 0.75, 0.1), 0.15, (0.2, 0.4), flesh=0.26),
        Bone((neighbour, 0.68, 0.1), (neighbour, 0.1, 0.1), 0.13, (0.4, 0.3), flesh=0.23),
    ]
    return Skeleton(tuple(bones))


def _forearm(generator: np.random.Generator) -> Skeleton:
    bow = float(generator.uniform(0.02, 0.07))
    return Skeleton(
        (
            Bone((-0.12, -1.15, 0.1), (-0.17, 0.95, 0.1), 0.1, (0.2, 0.7), bow=-bow, flesh=0.3),
            Bone((0.14, -1.2, -0.1), (0.15, 0.9, -0.1), 0.095, (0.6, 0.15), bow=bow / 3, flesh=0.3),
        ),
        (Bone((0.0, -1.2, 0.0), (0.0, 0.1, 0.0), 0.1, flesh=0.46),),
    )


def _hand(generator: np.random.Generator) -> Skeleton:
    bones = [
        Bone((-0.14, 1.3, 0.0), (-0.12, 0.93, 0.0), 0.12, (0.0, 0.5), flesh=0.28),
        Bone((0.16, 1.3, 0.0), (0.15, 0.95, 0.0), 0.08, (0.0, 0.3), flesh=0.22),
        *_carpals(0.76, 0.62, generator),
    ]
    spread = float(generator.uniform(0.95, 1.3))
    for ray, (x, palm, finger) in enumerate(
        ((-0.24, 0.36, 0.34), (-0.15, 0.52, 0.36), (-0.04, 0.52, 0.4), (0.08, 0.47, 0.37))
    ):
        angle = spread * (-0.62, -0.2, -0.02, 0.15)[ray]
        bones += _ray((x, 0.6, 0.03 * ray), angle, palm, finger, n=2 if ray == 0 else 3)
    bones += _ray((0.18, 0.62, 0.15), spread * 0.33, 0.42, 0.29, n=3)
    return Skeleton(tuple(bones), (Bone((0.0, 0.55, 0.0), (0.02, 0.15, 0.0), 0.1, flesh=0.33),))


def _ray(base: Point, angle: float, palm: float, finger: float, n: int) -> list[Bone]:
    """Return one metacarpal and its `n` phalanges in a row."""
    end = _turn(base, palm, angle)
    bones = [Bone(base, end, 0.066, (0.35, 0.35), 0.58, flesh=0.11)]
    length = finger
    for i in range(n):
        start = _turn(end, 0.045, angle)
        end = _turn(start, length - 0.045, angle)
        width = 0.06 - 0.006 * i
        bones.append(Bone(start, end, width, (0.35, 0.25), 0.58, flesh=0.1, breakable=i == 0))
        length *= 0.66
    return bones


def _carpals(lower: float, upper: float, generator: np.random.Generator) -> list[Bone]:
    bones = []
    for y, xs in ((lower, (-0.21, -0.07, 0.07, 0.19)), (upper, (-0.22, -0.09, 0.05, 0.18))):
        for x in xs:
            dx, dy, z = generator.uniform(-0.015, 0.015, 3)
            start = (x + dx - 0.02, y + dy + 0.02, 3 * z)
            end = (x + dx + 0.02, y + dy - 0.025, 3 * z)
            bones.append(Bone(start, end, 0.068, (0.0, 0.0), 0.9, breakable=False))
    return bones


def _humerus(generator: np.random.Generator) -> Skeleton:
    bow = float(generator.uniform(-0.04, 0.04))
    return Skeleton(
        (
            Bone((0.03, -1.0, 0.0), (0.0, 0.95, 0.0), 0.15, (0.75, 0.5), 0.64, bow, flesh=0.4),
            Bone((0.65, -1.05, 0.1), (0.42, -0.8, 0.1), 0.16, (0.2, 0.0), 0.85, breakable=False),
        ),
        (Bone((0.05, -1.0, 0.0), (0.0, 0.3, 0.0), 0.1, flesh=0.52),),
    )


def _shoulder(generator: np.random.Generator) -> Skeleton:
    swing = float(generator.uniform(-0.35, 0.05))
    head: Point = (-0.22, -0.2, 0.0)
    ribs = [
        Bone((0.3, y, 0.1), (1.3, y - 0.25, 0.1), 0.05, (0, 0), 0.7, 0.12, breakable=False)
        for y in (0.1, 0.38, 0.66, 0.94)
    ]
    return Skeleton(
        (
            Bone(head, _turn(head, 1.5, np.pi - swing), 0.17, (0.75, 0.0), 0.66, flesh=0.36),
            Bone((0.98, -0.62, 0.1), (-0.12, -0.58, 0.1), 0.09, (0.3, 0.2), bow=0.05, flesh=0.2),
            Bone((0.2, -0.3, -0.1), (0.42, 0.72, -0.1), 0.13, (0.5, 0.0), 0.86),
            Bone((0.15, -0.3, -0.1), (0.85, -0.35, -0.1), 0.07, (0.3, 0.0), 0.75, breakable=False),
            *ribs,
        ),
        (Bone((0.75, -0.3, 0.0), (0.85, 1.2, 0.0), 0.1, flesh=0.75),),
    )


def _wrist(generator: np.random.Generator) -> Skeleton:
    carpals = [
        replace(bone, width=0.125, start=_grow(bone.start), end=_grow(bone.end))
        for bone in _carpals(0.0, -0.13, generator)
    ]
    palm = [
        Bone((x, -0.42, z), (1.45 * x, -1.3, z), 0.085, (0.5, 0.2), 0.58, flesh=0.2)
        for x, z in ((-0.38, 0.2), (-0.2, 0.05), (0.0, 0.0), (0.19, -0.02), (0.36, -0.1))
    ]
    return Skeleton(
        (
            Bone((-0.2, 1.4, 0.08), (-0.16, 0.28, 0.08), 0.145, (0.0, 0.85), 0.66, flesh=0.34),
            Bone((0.24, 1.4, -0.08), (0.27, 0.3, -0.08), 0.1, (0.0, 0.55), 0.62, flesh=0.28),
            *carpals,
            *palm,
        ),
        (Bone((0.0, 0.2, 0.0), (0.0, -0.9, 0.0), 0.1, flesh=0.5),),
    )


def _grow(point: Point) -> Point:
    return (point[0] * 1.75, point[1] * 1.9 + 0.02, point[2])


_TEMPLATES: dict[str, Callable[[np.random.Generator], Skeleton]] = {
    "elbow": _elbow,
    "finger": _finger,
    "forearm": _forearm,
    "hand": _hand,
    "humerus": _humerus,
    "shoulder": _shoulder,
    "wrist": _wrist,
}
REGIONS = tuple(_TEMPLATES)


Array = NDArray[np.float32]


@dataclass(frozen=True)
class Frame:
    """The part of the image around one bone.

    `box` is its place in the image; `along` runs from 0 at the bone's start to 1 at its end,
    `across` is the signed distance from the axis; `across`, `length` (of the axis) and `pixel` are
    in half image sides.
    """

    box: tuple[slice, slice]
    along: Array
    across: Array
    length: float
    pixel: float


def reach_of(bone: Bone) -> float:
    """Return how far a projected bone extends from its axis, in half image sides."""
    return bone.width * (1.3 + max(bone.flare)) + abs(bone.bow)


def frame_bone(bone: Bone, size: int, reach: float) -> Frame | None:
    """Return the pixels within `reach` of a projected bone, None if all lie outside."""
    ends = np.array((bone.start[:2], bone.end[:2]))
    low = np.floor((ends.min(0) - reach + 1) * size / 2).astype(int).clip(0, size)
    high = np.ceil((ends.max(0) + reach + 1) * size / 2).astype(int).clip(0, size)
    if np.any(high <= low):
        return None
    pixel = 2 / size
    x = (np.arange(low[0], high[0], dtype=np.float32) + np.float32(0.5)) * np.float32(pixel) - 1
    y = (np.arange(low[1], high[1], dtype=np.float32) + np.float32(0.5)) * np.float32(pixel) - 1
    axis = ends[1] - ends[0]
    length = max(float(np.sqrt(np.sum(axis**2))), 1e-3)
    dx, dy = (np.float32(value / length) for value in axis)
    x, y = x - np.float32(ends[0, 0]), y - np.float32(ends[0, 1])
    along: Array = (x * dx)[None, :] + (y * dy)[:, None]
    across: Array = (y * dx)[:, None] - (x * dy)[None, :]
    along = along / np.float32(length)
    if bone.bow:
        across -= np.float32(4 * bone.bow) * along * (1 - along)
    box = (slice(low[1], high[1]), slice(low[0], high[0]))
    return Frame(box, along, across, length, pixel)


def _half_width(bone: Bone, along: Array) -> Array:
    near, far = np.maximum(1 - along * 4, 0), np.maximum(along * 4 - 3, 0)
    near, far = np.minimum(near, 1.25), np.minimum(far, 1.25)
    flare = np.float32(bone.flare[0]) * near * near + np.float32(bone.flare[1]) * far * far
    width: Array = np.float32(bone.width) * (1 + flare)
    return width


def tube(bone: Bone, frame: Frame, texture: Array) -> Array:
    """Return the density that a ray passes in `bone`: cortex is dense, marrow mostly not."""
    along, width = frame.along, _half_width(bone, frame.along)
    beyond = np.maximum(np.abs(along - np.float32(0.5)) - np.float32(0.5), 0)
    beyond *= np.float32(1.7 * frame.length)
    radius = (frame.across**2 + beyond**2) / (width * width)
    middle = (2 * along - 1) ** 2
    marrow = np.float32(bone.marrow) + np.float32(0.92 - bone.marrow) * np.minimum(middle**2, 1)
    outer = np.sqrt(np.maximum(1 - radius, 0))
    inner = np.sqrt(np.maximum(marrow * marrow - radius, 0))
    met: Array = outer - inner * (np.float32(0.66) + np.float32(0.1) * texture[frame.box])
    return met
