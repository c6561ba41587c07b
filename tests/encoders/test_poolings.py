"""The oracle is arithmetic by numpy in float64."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medembed.core import poolings
from medembed.core.errors import EncoderError
from medembed.core.poolings import POOLINGS, Pooling, find_pooling, refuse_unknown
from medembed.encoders.features import Features, pool, token_poolings


def random_features(
    grid: tuple[int, int], width: int = 3, n: int = 2, dtype: torch.dtype = torch.float32
) -> Features:
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    tokens = torch.randn(n, grid[0] * grid[1], width, generator=generator).to(dtype)
    return Features(tokens, grid)


def cells_of(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Average each cell from floor(i * side / 4) to ceil((i + 1) * side / 4), in float64."""
    image = tokens.astype(np.float64).reshape(len(tokens), *grid, -1)
    edges = [[(i * side // 4, -(-(i + 1) * side // 4)) for i in range(4)] for side in grid]
    cells = [
        image[:, top:bottom, left:right].mean(axis=(1, 2))
        for top, bottom in edges[0]
        for left, right in edges[1]
    ]
    return np.stack(cells, axis=1)


@given(grid=st.tuples(st.integers(4, 19), st.integers(4, 19)))
@settings(max_examples=40, deadline=None)
def test_poolings_are_what_their_names_say(grid: tuple[int, int]) -> None:
    features = random_features(grid)
    pooled = pool(features, ["mean", "max", "grid4"])
    tokens = features.tokens.numpy()
    assert np.allclose(pooled["mean"], tokens.astype(np.float64).mean(axis=1), atol=1e-6)
    assert np.array_equal(pooled["max"], tokens.max(axis=1))
    assert pooled["grid4"].shape == (2, 16, 3)
    assert np.allclose(pooled["grid4"], cells_of(tokens, grid), atol=1e-6)


def test_grid4_keeps_the_places_of_an_image_row_by_row() -> None:
    rows, columns = np.indices((64, 32))
    tokens = np.stack([rows // 16, columns // 8], axis=-1).reshape(1, -1, 2).astype(np.float32)
    cells = pool(Features(torch.from_numpy(tokens), (64, 32)), ["grid4"])["grid4"][0]
    assert cells.tolist() == [[i, j] for i in range(4) for j in range(4)]


def test_grid4_is_offered_only_where_a_cell_is_at_least_a_token() -> None:
    assert token_poolings(7, (4, 5)) == {"mean": (7,), "max": (7,), "grid4": (16, 7)}
    assert token_poolings(7, (3, 9)) == {"mean": (7,), "max": (7,)}


@pytest.mark.parametrize("name", ["mean", "grid4", "projector"])
def test_sums_are_taken_in_fp32(name: str) -> None:
    """A thousand times 1 + 1/128 in bfloat16 would come out as its neighbour."""
    tokens = torch.full((1, 32 * 32, 2), 1 + 1 / 128, dtype=torch.bfloat16)
    tokens[:, ::2] = 1
    pooled = pool(Features(tokens, (32, 32), {"projector": tokens}), [name])[name]
    assert pooled.dtype == torch.float32
    assert torch.allclose(pooled, torch.tensor(1 + 1 / 256), atol=1e-6)


def test_a_towers_own_vectors_are_given_as_they_are() -> None:
    own = {"cls": torch.tensor([[1.5, -2.0]]), "pooler": torch.tensor([[3.0]])}
    features = Features(torch.zeros(1, 16, 2), (4, 4), own)
    pooled = pool(features, ["pooler", "cls"])
    assert list(pooled) == ["pooler", "cls"]
    assert torch.equal(pooled["cls"], own["cls"])
    assert torch.equal(pooled["pooler"], own["pooler"])
    with pytest.raises(KeyError, match="median"):
        pool(features, ["median"])


def test_nobody_but_encoders_names_a_pooling() -> None:
    """But for `mean` and `max`, which are words for other things too."""
    names = set(POOLINGS) - {"mean", "max"}
    package = Path(poolings.__file__).parents[1]
    users = {
        path.relative_to(package).as_posix()
        for folder in package.iterdir()
        if folder.name != "encoders"
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    }
    # words have one partner among the poolings; a part of transformers' models has its name
    words = {"core/prompts.py", "extraction/prompts.py", "heads/words.py"}
    assert users == {"core/poolings.py", "finetuning/blocks.py", *words}


def test_a_name_without_an_entry_is_an_encoders_own_vector() -> None:
    own = find_pooling("embedding")
    assert own == Pooling("embedding")
    assert own.shape(7) == (7,)
    with pytest.raises(EncoderError, match="embedding is unknown"):
        refuse_unknown(["mean", "embedding"])
