"""The learning rate of a step: a linear warm-up, then half a cosine."""

import math

__all__ = ["rate_at"]


def rate_at(step: int, n_steps: int, warm_up: float) -> float:
    """Return the learning rate of a step as a share of the highest one.

    The rate rises linearly (Goyal et al., arXiv 1706.02677) and falls along half a cosine
    (Loshchilov and Hutter, SGDR, ICLR 2017).

    Parameters
    ----------
    step : int
        The step, counted from 0.
    n_steps : int
        Number of steps of the whole training.
    warm_up : float
        Share of the steps in which the rate rises.
    """
    n_rising = round(warm_up * n_steps)
    if step < n_rising:
        return (step + 1) / n_rising
    return 0.5 * (1 + math.cos(math.pi * (step - n_rising) / max(1, n_steps - n_rising)))
