"""The statistics of a film against numpy and scipy, whatever its size."""

import numpy as np
import pytest
from scipy.ndimage import laplace

from medembed.core.poolings import IMAGE_STATISTICS, find_pooling
from medembed.images.statistics import STATISTICS, measure_image


@pytest.mark.parametrize("shape", [(700, 530), (33, 1200), (64, 64), (3, 3)])
def test_statistics_are_those_of_numpy_and_scipy(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(shape))
    pixels = generator.integers(0, 256, shape, dtype=np.uint8)
    found = dict(zip(STATISTICS, measure_image(pixels), strict=True))
    width = max(1, min(shape) // 32)
    is_border = np.ones(shape, bool)
    is_border[width:-width, width:-width] = False
    edges = laplace(pixels.astype(np.float64))[1:-1, 1:-1]
    expected = {
        "mean": pixels.mean(),
        "spread": pixels.std(),
        "size": np.log2(pixels.size),
        "aspect": np.log2(shape[1] / shape[0]),
        "sharpness": np.log2(1 + edges.var()),
        "border_mean": pixels[is_border].mean(),
        "border_spread": pixels[is_border].std(),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_film_of_one_row_is_measured() -> None:
    found = measure_image(np.full((1, 40), 7, np.uint8))
    assert found.tolist() == pytest.approx([7, 0, np.log2(40), np.log2(40), 0, 7, 0])


def test_the_pooling_has_the_shape_of_the_statistics() -> None:
    assert find_pooling(IMAGE_STATISTICS).shape(1152) == (len(STATISTICS),)
