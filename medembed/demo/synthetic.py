"""Synthetic musculoskeletal radiographs by formula; nothing in them comes from a person.

A bone is a tapered tube: its attenuation is the chord of the outer wall less most of the chord of
the marrow. Abnormal films show a fracture line, a displaced fragment, an implant or a lesion. Soft
tissue adds a smooth background, and an exponential film curve, a gamma and noise make grey values.
Everything is a function of the seed, so equal calls give equal images.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from medembed.core.errors import MedembedError
from medembed.demo.anatomy import (
    REGIONS,
    Array,
    Bone,
    Frame,
    Skeleton,
    View,
    draw_skeleton,
    frame_bone,
    project,
    reach_of,
    tube,
)

__all__ = [
    "DEMO_SEEDS",
    "KINDS",
    "MASK_THRESHOLD",
    "PROJECTIONS",
    "TRAINING_SEEDS",
    "TRIAL_SEEDS",
    "Finding",
    "Rendered",
    "draw_pose",
    "render",
]

KINDS = ("line", "displaced", "implant", "lesion")


@dataclass(frozen=True)
class Finding:
    """One abnormality on bone `bone`, `place` of its length along it, `strength` in 0..1."""

    kind: str
    strength: float
    bone: int
    place: float
    shape: tuple[float, float, float, float]  # four uniform draws that shape the finding


def _alter(finding: Finding, bone: Bone, frame: Frame, texture: Array) -> Array:
    """Return the density that a ray passes in `bone` with `finding` on it."""
    if finding.kind == "displaced":
        return _displace(finding, bone, frame, texture)
    whole = tube(bone, frame, texture)
    if finding.kind == "line":
        return whole * (1 - _crack(finding, bone, frame))
    if finding.kind == "implant":
        return whole + _implant(finding, bone, frame)
    return _lesion(finding, bone, frame, whole)


def _crack(finding: Finding, bone: Bone, frame: Frame) -> Array:
    """Return the share of bone lost along a jagged oblique line, 0..1."""
    slope, jag, share, phase = finding.shape
    across = frame.across / np.float32(bone.width)
    wave = np.float32(2.2) * across + np.float32(3 * phase)
    ragged = np.abs(wave - np.floor(wave) - np.float32(0.5)) - np.float32(0.25)  # a zigzag
    at = _from_place(finding, frame)
    at -= np.float32(1.5 * (slope - 0.5)) * frame.across
    at -= np.float32((0.08 + 0.25 * jag) * bone.width) * ragged
    breadth = np.float32((1.4 + 2.0 * finding.strength) * frame.pixel)
    depth = np.float32(0.15 + 0.8 * finding.strength)
    crack: Array = depth * np.exp(-((at / breadth) ** 2))
    if share < 0.3:  # an incomplete fracture: one cortex only
        side = across if phase < 0.5 else -across
        crack = crack * np.clip(side * 3 + 1, 0, 1)
    return crack


def _displace(finding: Finding, bone: Bone, frame: Frame, texture: Array) -> Array:
    """Return the bone shifted sideways beyond the break; further on it meets its joint again."""
    slope, reach, gap, side = finding.shape
    at = _from_place(finding, frame)
    at -= np.float32(0.8 * (slope - 0.5)) * frame.across
    at = at if side < 0.5 else -at
    extent = np.float32((2.5 + 2.5 * reach) * bone.width)
    fade = np.clip(1 - at / extent, 0, 1)
    offset = np.float32((0.1 + 0.9 * finding.strength) * bone.width * (1 if gap < 0.5 else -1))
    moved = replace(frame, across=frame.across - np.where(at > 0, offset * fade * fade, 0))
    opening = np.float32((1.0 + 2.0 * finding.strength) * frame.pixel)
    lost = np.float32(0.15 + 0.7 * finding.strength) * np.exp(-((at / opening) ** 2))
    broken: Array = tube(bone, moved, texture) * (1 - lost)
    return broken


def _implant(finding: Finding, bone: Bone, frame: Frame) -> Array:
    """Return a plate with screws, a nail in the marrow, or crossed wires."""
    form, length, side, tilt = finding.shape
    at = _from_place(finding, frame)
    dense = np.float32(0.2 + 2.6 * finding.strength)
    half = np.float32((1.2 + 2.2 * length) * bone.width)
    soft = np.float32(frame.pixel)

    def bar(distance: Array, thick: float, span: Array) -> Array:
        edge = (np.float32(thick) - np.abs(distance)) / soft + np.float32(0.5)
        filled: Array = np.clip(edge, 0, 1) * (np.abs(span) < half)
        return filled

    if form < 0.4:
        edge = np.float32(bone.width * (1.05 if side < 0.5 else -1.05))
        metal = bar(frame.across - edge, 0.13 * bone.width, at)
        pitch = np.float32(0.75 * bone.width)
        nearest: Array = np.asarray(np.round(at / pitch), np.float32)
        screw: Array = at - pitch * nearest
        inside = np.abs(frame.across) < np.float32(bone.width)
        metal = np.maximum(metal, bar(screw, 0.09 * bone.width, at) * inside)
    elif form < 0.7:
        metal = bar(frame.across, (0.14 + 0.2 * tilt) * bone.width, at)
    else:
        lean = np.float32(0.25 + 0.5 * tilt)
        thick = max(0.07 * bone.width, 1.1 * frame.pixel)
        inside = np.abs(frame.across) < np.float32(1.25 * bone.width)
        metal = np.maximum(bar(at * lean - frame.across, thick, at), 0)
        metal = np.maximum(metal, bar(at * lean + frame.across, thick, at)) * inside
    added: Array = dense * metal
    return added


def _lesion(finding: Finding, bone: Bone, frame: Frame, whole: Array) -> Array:
    """Return the bone thinned out (lytic, perhaps with a dense rim) or made denser (sclerotic)."""
    form, breadth, aside, stretch = finding.shape
    radius = (0.55 + 0.45 * breadth) * bone.width
    at = _from_place(finding, frame)
    at = at / np.float32(radius * (0.9 + 0.7 * stretch))
    off = frame.across - np.float32((aside - 0.5) * 0.9 * bone.width)
    distance = np.sqrt(at**2 + (off / np.float32(radius)) ** 2)
    inside = np.clip((1 - distance) * 4 + np.float32(0.5), 0, 1)
    amount = np.float32(0.12 + 0.85 * finding.strength)
    if form > 0.65:
        sclerotic: Array = whole + np.float32(0.7) * amount * inside * (whole > 0)
        return sclerotic
    rim = np.clip(1 - np.abs(distance - 1) * 5, 0, 1) * np.float32(0.3 if form > 0.3 else 0.0)
    lytic: Array = whole * (1 + amount * (rim - inside))
    return lytic


def _from_place(finding: Finding, frame: Frame) -> Array:
    """Return the signed distance along the bone from the finding's place."""
    distance: Array = (frame.along - np.float32(finding.place)) * np.float32(frame.length)
    return distance


PROJECTIONS = ("frontal", "lateral", "oblique")

# Disjoint on purpose: the demo never shows an image that its encoder was trained or measured on.
TRAINING_SEEDS = range(2**31)
TRIAL_SEEDS = range(2**31, 2**32)
DEMO_SEEDS = range(2**32, 2**62)

# Grey levels (of 1) by which a pixel must differ from its normal twin to belong to the finding.
MASK_THRESHOLD = 6 / 255
_TURNS = (0.0, 1.05, 0.6)  # radians about the long axis, by projection
_ANATOMY, _POSE, _FINDING, _FILM = range(4)  # one random stream each, so a twin shares the others


@dataclass(frozen=True)
class Rendered:
    """One image: `pixels` uint8 (size, size), 0 black; `mask` bool (size, size), the finding."""

    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_]


def render(
    seed: int,
    region: str,
    abnormality: str | None = None,
    severity: float = 1.0,
    *,
    projection: int = 0,
    size: int = 256,
) -> Rendered:
    """Render one view.

    Parameters
    ----------
    seed
        Determines the anatomy and the finding's place; views of one study share it.
    region
        One of `medembed.demo.anatomy.REGIONS`.
    abnormality
        One of `KINDS`, or None for the normal twin: same anatomy, pose and noise.
    severity
        From 0 (barely visible) to 1 (obvious). Some projections show a finding less.
    projection
        Index into `PROJECTIONS`; also varies pose, exposure and noise.
    size
        Side in pixels; the texture is drawn for 256.

    Raises
    ------
    MedembedError
        There is no such region or abnormality.
    """
    _check(region, abnormality)
    skeleton, view = draw_pose(seed, region, projection)
    finding = None
    if abnormality is not None:
        finding = _draw_finding(seed, skeleton, abnormality, severity, view)
    film = _generator(seed, _FILM, projection)
    exposure, contrast, gamma, noise, haze = film.uniform(
        (0.85, 0.85, 0.75, 0.006, 0.0), (1.25, 1.15, 1.3, 0.016, 0.05)
    )
    texture = _draw_texture(film, size)
    attenuation = _soft_tissue(skeleton, view, film, size)
    changed = _add_bones(attenuation, skeleton, view, finding, texture, contrast)
    window = _draw_window(film, size)
    marker = _draw_marker(film, size)
    grain = film.standard_normal((size, size), np.float32) * np.float32(noise)

    def develop(thickness: Array, box: tuple[slice, slice]) -> Array:
        grey = 1 - np.exp(-np.float32(exposure) * thickness)
        grey = np.float32(haze) + np.float32(1 - haze) * grey ** np.float32(gamma)
        seen: Array = np.maximum(grey * window[box], marker[box])
        return seen

    whole = (slice(None), slice(None))
    grey = develop(attenuation, whole)
    mask = np.zeros((size, size), np.bool_)
    if changed is not None:
        box, normal = changed
        mask[box] = np.abs(grey[box] - develop(normal, box)) > MASK_THRESHOLD
    pixels = np.clip((grey + grain) * 255 + 0.5, 0, 255).astype(np.uint8)
    return Rendered(pixels, mask)


def draw_pose(seed: int, region: str, projection: int = 0) -> tuple[Skeleton, View]:
    """Return the anatomy behind an image of `render`, and its pose on the detector."""
    return draw_skeleton(region, _generator(seed, _ANATOMY)), _draw_view(seed, projection)


def _check(region: str, abnormality: str | None) -> None:
    if region not in REGIONS:
        raise MedembedError(f"no synthetic region {region!r}; there are {', '.join(REGIONS)}.")
    if abnormality is not None and abnormality not in KINDS:
        raise MedembedError(
            f"no synthetic abnormality {abnormality!r}; there are {', '.join(KINDS)}, and None."
        )


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng((seed, *stream))


def _draw_view(seed: int, projection: int) -> View:
    draw = _generator(seed, _POSE, 1 + projection).uniform(-1, 1, 5)
    return View(
        turn=_TURNS[projection] + 0.15 * draw[0],
        tilt=0.22 * draw[1],
        zoom=1 + 0.1 * draw[2],
        shift=(0.08 * draw[3], 0.08 * draw[4]),
        mirrored=bool(_generator(seed, _POSE).random() < 0.5),
    )


def _draw_finding(seed: int, skeleton: Skeleton, kind: str, severity: float, view: View) -> Finding:
    generator = _generator(seed, _FINDING)
    towards, *shape = (float(x) for x in generator.random(5))
    # The plane of a finding is rarely seen edge-on in every projection.
    seen = 0.55 + 0.45 * abs(float(np.cos(view.turn - np.pi * towards)))
    strength = severity if kind == "implant" else severity * seen
    bone, place = _place(skeleton, generator)
    return Finding(kind, strength, bone, place, (shape[0], shape[1], shape[2], shape[3]))


def _place(skeleton: Skeleton, generator: np.random.Generator) -> tuple[int, float]:
    """Choose a bone and a place along it that lies well inside the image."""
    candidates = [i for i, bone in enumerate(skeleton.bones) if bone.breakable]
    for _ in range(100):
        bone, place = int(generator.choice(candidates)), float(generator.uniform(0.12, 0.88))
        start, end = (
            np.array(p[:2]) for p in (skeleton.bones[bone].start, skeleton.bones[bone].end)
        )
        if np.all(np.abs(start + place * (end - start)) < 0.72):
            break
    return bone, place


def _add_bones(
    attenuation: Array,
    skeleton: Skeleton,
    view: View,
    finding: Finding | None,
    texture: Array,
    contrast: float,
) -> tuple[tuple[slice, slice], Array] | None:
    """Add all bones in place; return the box and normal content around the finding, if any."""
    size = len(attenuation)
    projected = [project(bone, view) for bone in skeleton.bones]
    thickest = max(bone.width for bone in projected if bone.breakable)
    changed: tuple[Frame, Array] | None = None
    for index, bone in enumerate(projected):
        here = finding is not None and index == finding.bone
        frame = frame_bone(bone, size, reach_of(bone))
        if frame is None:
            continue
        density = np.float32(contrast * (bone.width / thickest) ** 0.5)
        normal = density * tube(bone, frame, texture)
        attenuation[frame.box] += normal
        if here and finding is not None:
            altered = density * _alter(finding, bone, frame, texture)
            changed = (frame, altered - normal)
    if changed is None:
        return None
    frame, difference = changed
    before = attenuation[frame.box].copy()
    attenuation[frame.box] += difference
    return frame.box, before


@lru_cache(maxsize=16)
def _upsampling(n: int, size: int) -> Array:
    """Return the (size, n) matrix that interpolates n samples linearly to size pixels."""
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    weights = np.maximum(1 - np.abs(at[:, None] - np.arange(n)[None, :]), 0)
    return np.asarray(weights, np.float32)


def _upsample(coarse: Array, size: int) -> Array:
    matrix = _upsampling(len(coarse), size)
    return np.asarray(matrix @ coarse @ matrix.T, np.float32)


def _draw_texture(generator: np.random.Generator, size: int) -> Array:
    """Return trabecular texture, about standard normal, with a grain of two pixels."""
    return _upsample(generator.standard_normal((128, 128), np.float32), size)


def _soft_tissue(
    skeleton: Skeleton, view: View, generator: np.random.Generator, size: int
) -> Array:
    coarse = 128
    thickness = np.zeros((coarse, coarse), np.float32)
    for part in (*skeleton.bones, *skeleton.flesh):
        if not part.flesh:
            continue
        body = project(part, view)
        frame = frame_bone(body, coarse, body.flesh + abs(body.bow))
        if frame is None:
            continue
        beyond = np.maximum(np.abs(frame.along - np.float32(0.5)) - np.float32(0.5), 0)
        radius = frame.across**2 + (beyond * np.float32(frame.length)) ** 2
        chord = np.sqrt(np.maximum(1 - radius / np.float32(body.flesh**2), 0))
        thickness[frame.box] = np.maximum(thickness[frame.box], chord)
    level, mottle = generator.uniform((0.22, 0.05), (0.42, 0.16))
    cloud = _upsample(generator.standard_normal((10, 10), np.float32), coarse)
    return _upsample(np.float32(level) * thickness * (1 + np.float32(mottle) * cloud), size)


def _draw_window(generator: np.random.Generator, size: int) -> Array:
    """Return the collimated field: 1 inside, nearly 0 in borders of up to 9 % on some sides."""
    window = np.full((size, size), 0.04, np.float32)
    borders = generator.uniform(0, 0.09, 4) * (generator.random(4) < 0.4) * size
    top, bottom, left, right = (int(b) for b in borders)
    window[top : size - bottom, left : size - right] = 1
    return window


_GLYPHS = {"L": ("#  ", "#  ", "#  ", "#  ", "###"), "R": ("## ", "# #", "## ", "# #", "# #")}


def _draw_marker(generator: np.random.Generator, size: int) -> Array:
    """Return a side marker, a letter in a frame near a corner, on black; often there is none."""
    marker = np.zeros((size, size), np.float32)
    present, side, top, left, bright = generator.random(5)
    cell = int(generator.integers(2, 5)) * size // 256
    rows = _GLYPHS["L" if side < 0.5 else "R"]
    letter = np.array([[c == "#" for c in row] for row in rows], np.float32)
    stamp = np.pad(np.pad(letter, 1), 1, constant_values=1)
    stamp = np.repeat(np.repeat(stamp, cell, 0), cell, 1) * np.float32(0.65 + 0.3 * bright)
    if present < 0.7:
        height, width = stamp.shape
        y = int(size * (0.1 if top < 0.5 else 0.9)) - (0 if top < 0.5 else height)
        x = int(size * (0.1 if left < 0.5 else 0.9)) - (0 if left < 0.5 else width)
        marker[y : y + height, x : x + width] = stamp
    return marker
