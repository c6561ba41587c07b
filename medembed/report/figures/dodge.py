"""Places on an axis where several heads, and several runs of one, stand side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Slots"]

WIDEST, ALL = 0.035, 0.14
"""Shares of the axis: between two heads at one place, and for all that stand there."""
FULLEST = 0.5
"""Share of the way to the next place that all heads together may take."""
MARGIN = 0.09
"""Share of the axis left free at either end."""


@dataclass(frozen=True)
class Slots:
    """Where the points of `n_heads` heads stand around each of `values`.

    Attributes
    ----------
    values : sequence of float
        Rising, at least one; above 0 where the axis is logarithmic.
    n_heads : int
    is_log : bool
        Whether the axis is logarithmic.
    """

    values: Sequence[float]
    n_heads: int
    is_log: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the axis."""
        low, high = self._margins()
        return self._backward(low), self._backward(high)

    def share(self, value: float) -> float:
        """Return where a value stands, 0 and 1 being the ends of the axis."""
        low, high = self._margins()
        return (self._forward(value) - low) / (high - low)

    def place(self, value: float, head: int, k: int = 0, n: int = 1) -> float:
        """Return where the k-th of a head's n points at a value is drawn."""
        from_middle = head - (self.n_heads - 1) / 2 + 0.7 * (k - (n - 1) / 2) / n
        return self._backward(self._forward(value) + self._width(value) * from_middle)

    def _width(self, value: float) -> float:
        """Return how far two heads stand apart at a value, in units of the axis."""
        low, high = self._margins()
        gaps = [abs(self._forward(value) - self._forward(other)) for other in self.values]
        nearest = min((gap for gap in gaps if gap), default=high - low)
        free = min(ALL * (high - low), FULLEST * nearest)
        return min(WIDEST * (high - low), free / self.n_heads)

    def _margins(self) -> tuple[float, float]:
        low, high = self._forward(self.values[0]), self._forward(self.values[-1])
        margin = MARGIN * (high - low) or 1.0
        return low - margin, high + margin

    def _forward(self, value: float) -> float:
        return math.log10(value) if self.is_log else float(value)

    def _backward(self, place: float) -> float:
        return 10.0**place if self.is_log else place
