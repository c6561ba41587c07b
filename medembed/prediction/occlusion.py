"""Pooled vectors with a window of tokens occluded, for all windows, without a loop over them.

An occluded token becomes the image's mean token, which represents an unremarkable place in this
image. Each window's vector costs a few rows of sums and maxima, and no pass of the encoder.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from medembed.core.poolings import find_pooling

__all__ = ["WINDOW_SHARE", "occlude", "spread", "window_sides"]

WINDOW_SHARE = 3 / 16
"""Share of the grid's side. With trees on 16 x 16 tokens of the demo, windows of 3 to 5 hit a
finding about equally often, windows of 1 and 2 less often: 3 is the finest of them."""

Pool = Callable[[torch.Tensor], torch.Tensor]


def window_sides(grid: tuple[int, int]) -> tuple[int, int]:
    """Return the numbers of rows and columns of a window on a grid."""
    rows, columns = (max(1, round(WINDOW_SHARE * side)) for side in grid)
    return rows, columns


def occlude(
    tokens: np.ndarray, sides: tuple[int, int], poolings: Sequence[str], pool: Pool
) -> Iterator[np.ndarray]:
    """Yield the pooled vectors of an image with one window occluded, one row of windows at a time.

    Parameters
    ----------
    tokens : float32 array of shape (rows, columns, d)
    sides : tuple of int
        Rows and columns of a window; all windows lie entirely within the grid.
    poolings : sequence of str
        Poolings that are joined in a vector.
    pool : callable
        Pools tokens (n, rows * columns, d) to (n, all columns of `poolings`), as a tower does.
        Called for every window where a pooling is no `CellSummary` that is computed here.

    Yields
    ------
    float32 array of shape (columns - sides[1] + 1, all columns)
        For each of rows - sides[0] + 1 rows of windows, from the top; windows from the left.
    """
    made = [_occlude_at_once(name, tokens, sides) for name in poolings]
    if None not in made:
        for parts in zip(*(rows for rows in made if rows is not None), strict=True):
            yield np.concatenate(parts, axis=1, dtype=np.float32)
        return
    for top in range(len(tokens) - sides[0] + 1):
        yield _occlude_one_by_one(tokens, top, sides, pool)


def spread(drops: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Return each cell's mean drop over the windows that cover it.

    Parameters
    ----------
    drops : float array of shape (rows of windows, windows in each)
        The decrease of the logit when the window is occluded.
    sides : tuple of int
        Rows and columns of a window.

    Returns
    -------
    float64 array of shape (rows, columns) of the grid
    """
    grid = (drops.shape[0] + sides[0] - 1, drops.shape[1] + sides[1] - 1)
    total, count = np.zeros(grid), np.zeros(grid)
    for row in range(sides[0]):
        for column in range(sides[1]):
            part = (
                slice(row, row + drops.shape[0]),
                slice(column, column + drops.shape[1]),
            )
            total[part] += drops
            count[part] += 1
    return total / count / (sides[0] * sides[1])


def _occlude_one_by_one(
    tokens: np.ndarray, top: int, sides: tuple[int, int], pool: Pool
) -> np.ndarray:
    mean = tokens.mean(axis=(0, 1))
    vectors = []
    for left in range(tokens.shape[1] - sides[1] + 1):
        changed = tokens.copy()
        changed[top : top + sides[0], left : left + sides[1]] = mean
        flat = torch.from_numpy(changed.reshape(1, -1, tokens.shape[2]))
        with torch.no_grad():
            vectors.append(pool(flat)[0].cpu().numpy())
    return np.stack(vectors)


def _occlude_at_once(
    pooling: str, tokens: np.ndarray, sides: tuple[int, int]
) -> Iterator[np.ndarray] | None:
    """Return what `occlude` yields of one pooling; None where each window is to be pooled anew."""
    summary = find_pooling(pooling).summary
    if summary is None:
        return None
    if summary.statistic == "mean":
        return _occlude_cells(tokens, sides, summary.side)
    return _occlude_max(tokens, sides) if summary.side == 1 else None


def _occlude_cells(
    tokens: np.ndarray, sides: tuple[int, int], n_a_side: int
) -> Iterator[np.ndarray]:
    """Yield means over n_a_side x n_a_side cells, (windows, n_a_side² * d).

    The tokens that a window removes from a cell form a rectangle, whose sum comes from four corners
    of a table of running sums.
    """
    rows, columns, _ = tokens.shape
    mean = tokens.mean(axis=(0, 1), dtype=np.float64)
    missing = np.pad(np.cumsum(np.cumsum(mean - tokens, axis=0), axis=1), ((1, 0), (1, 0), (0, 0)))
    (tops, bottoms), (lefts, rights) = (_edges(side, n_a_side) for side in (rows, columns))
    sizes = np.outer(bottoms - tops, rights - lefts)[:, :, None]
    whole = _rectangles(missing, tops, bottoms, lefts, rights)
    plain = mean - whole / sizes
    starts = np.arange(columns - sides[1] + 1)
    for top in range(rows - sides[0] + 1):
        # The part of the window in each cell; empty if it does not end after its start.
        first, last = np.maximum(tops, top), np.minimum(bottoms, top + sides[0])
        vectors = []
        for left in starts:
            low, high = np.maximum(lefts, left), np.minimum(rights, left + sides[1])
            taken = _rectangles(missing, first, np.maximum(first, last), low, np.maximum(low, high))
            vectors.append((plain + taken / sizes).ravel())
        yield np.stack(vectors)


def _rectangles(
    sums: np.ndarray, tops: np.ndarray, bottoms: np.ndarray, lefts: np.ndarray, rights: np.ndarray
) -> np.ndarray:
    """Return the sums over rows tops[i] to bottoms[i] and columns lefts[j] to rights[j]."""
    below = sums[bottoms][:, rights] - sums[bottoms][:, lefts]
    above = sums[tops][:, rights] - sums[tops][:, lefts]
    return np.asarray(below - above)


def _edges(side: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the half-open row range of each cell, as in torch's adaptive pooling."""
    numbers = np.arange(n)
    return numbers * side // n, -(-(numbers + 1) * side // n)


def _occlude_max(tokens: np.ndarray, sides: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield maxima, (windows, d), over the rows above and below and the columns beside a window."""
    rows, columns, _ = tokens.shape
    mean = tokens.mean(axis=(0, 1))
    of_rows = tokens.max(axis=1)
    above, below = _running_maxima(of_rows)
    n = columns - sides[1] + 1
    for top in range(rows - sides[0] + 1):
        bottom = top + sides[0]
        left, right = _running_maxima(tokens[top:bottom].max(axis=0))
        beside = np.maximum(left[:n], right[sides[1] : sides[1] + n])
        yield np.maximum(np.maximum(above[top], below[bottom]), np.maximum(beside, mean))


def _running_maxima(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the maxima of the first k of values (n, d), and of all from k on, for k = 0 … n."""
    nothing = np.full((1, values.shape[1]), -np.inf, values.dtype)
    before = np.concatenate([nothing, np.maximum.accumulate(values)])
    after = np.concatenate([np.maximum.accumulate(values[::-1])[::-1], nothing])
    return before, after
