"""Images are varied a little, each in its own way, the same in every batch and every process."""

import math

import numpy as np
import pytest
import torch

from medembed.finetuning.batches import (
    BRIGHTNESS,
    CONTRAST,
    ROTATION,
    SCALE,
    SHIFT,
    augment,
    draw_variations,
)

NOTHING = np.array([0, 0, 0, 1, 0, 1, 1], np.float32)


def vary(pixels: np.ndarray, **changes: float) -> np.ndarray:
    names = ("angle", "right", "down", "size", "brightness", "contrast", "mirrored")
    variation = NOTHING.copy()
    for name, value in changes.items():
        variation[names.index(name)] = value
    found: np.ndarray = augment(torch.from_numpy(pixels[None]), variation[None])[0].numpy()
    return found


def square(height: int = 64, width: int = 64, top: int = 20, left: int = 30) -> np.ndarray:
    pixels = np.zeros((height, width), np.uint8)
    pixels[top : top + 8, left : left + 8] = 200
    return pixels


def centre(pixels: np.ndarray) -> tuple[float, float]:
    rows, columns = np.indices(pixels.shape)
    total = pixels.sum(dtype=float)
    return float((rows * pixels).sum() / total), float((columns * pixels).sum() / total)


def test_nothing_changes_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (33, 48), dtype=np.uint8)
    assert np.array_equal(vary(pixels), pixels)


@pytest.mark.parametrize("shape", [(64, 64), (64, 96)])
def test_each_variation_does_what_it_says(shape: tuple[int, int]) -> None:
    height, width = shape
    pixels = square(height, width)
    row, column = centre(pixels)
    assert centre(vary(pixels, right=0.125)) == pytest.approx((row, column + width / 8), abs=0.1)
    assert centre(vary(pixels, down=0.125)) == pytest.approx((row + height / 8, column), abs=0.1)
    middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
    mirrored = centre(vary(pixels, mirrored=-1))
    assert mirrored == pytest.approx((row, 2 * middle_column - column), abs=0.1)
    larger = centre(vary(pixels, size=1.1))
    wanted = (middle_row + 1.1 * (row - middle_row), middle_column + 1.1 * (column - middle_column))
    assert larger == pytest.approx(wanted, abs=0.2)
    angle = math.radians(10)
    turned = centre(vary(pixels, angle=angle))
    y, x = row - middle_row, column - middle_column
    # An angle of pixels, whatever the image's sides: lengths stay.
    assert math.hypot(turned[0] - middle_row, turned[1] - middle_column) == pytest.approx(
        math.hypot(y, x), abs=0.2
    )
    cross = y * (turned[1] - middle_column) - x * (turned[0] - middle_row)
    assert abs(cross) / math.hypot(y, x) ** 2 == pytest.approx(math.sin(angle), abs=0.03)


def test_what_comes_in_from_outside_is_black() -> None:
    white = np.full((32, 32), 255, np.uint8)
    assert vary(white, right=0.25, brightness=0.1)[:, :7].max() == 0


def test_brightness_and_contrast_keep_to_grey_levels() -> None:
    pixels = np.random.default_rng(0).integers(60, 200, (32, 32), dtype=np.uint8)
    brighter = vary(pixels, brightness=0.1)
    assert np.abs(brighter.astype(int) - np.minimum(255, pixels + 25.5)).max() <= 1
    starker = vary(pixels, contrast=1.5)
    assert starker.std() > 1.3 * pixels.std()
    assert abs(float(starker.mean()) - float(pixels.mean())) < 2


def test_variations_follow_from_seed_epoch_and_image_alone() -> None:
    codes = [3, 5, 2**60 - 1]
    drawn = draw_variations(codes, seed=1, epoch=2, flips=False)
    assert np.array_equal(draw_variations(codes[1:], seed=1, epoch=2, flips=False), drawn[1:])
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert (draw_variations(codes, flips=False, **other) != drawn)[:, :6].all()


def test_variations_keep_to_their_ranges_and_mirror_only_where_asked() -> None:
    drawn = draw_variations(range(2000), seed=0, epoch=1, flips=False)
    for column, (low, high) in enumerate(
        [
            (-math.radians(ROTATION), math.radians(ROTATION)),
            (-SHIFT, SHIFT),
            (-SHIFT, SHIFT),
            (1 - SCALE, 1 + SCALE),
            (-BRIGHTNESS, BRIGHTNESS),
            (1 - CONTRAST, 1 + CONTRAST),
        ]
    ):
        assert low - 1e-6 <= drawn[:, column].min() < low + 0.01 * (high - low)
        assert high + 1e-6 >= drawn[:, column].max() > high - 0.01 * (high - low)
    assert (drawn[:, 6] == 1).all()
    mirrored = draw_variations(range(2000), seed=0, epoch=1, flips=True)[:, 6]
    assert set(mirrored) == {-1.0, 1.0}
    assert abs(mirrored.mean()) < 0.1
