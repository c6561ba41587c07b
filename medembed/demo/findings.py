"""Draw abnormalities on a bone: fracture lines, displaced fragments, implants and lesions."""

from dataclasses import dataclass, replace

import numpy as np

from medembed.demo.anatomy import Bone
from medembed.demo.bones import Array, Frame, tube

__all__ = ["KINDS", "Finding", "alter"]

KINDS = ("line", "displaced", "implant", "lesion")


@dataclass(frozen=True)
class Finding:
    """One abnormality on bone `bone`, `place` of its length along it, `strength` in 0..1."""

    kind: str
    strength: float
    bone: int
    place: float
    shape: tuple[float, float, float, float]  # four uniform draws that give the kind its form


def alter(finding: Finding, bone: Bone, frame: Frame, texture: Array) -> Array:
    """Return what a ray meets in `bone` with `finding` on it."""
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
    """Shift the bone sideways beyond the break; it finds back to its joint further on."""
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
    """Thin the bone out (lytic, perhaps with a dense rim) or make it denser (sclerotic)."""
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
