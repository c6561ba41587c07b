"""The learning rate of a step: a linear warm-up, then half a cosine."""

import math

__all__ = ["rate_at"]


def rate_at(step: int, n_steps: int, warm_up: float) -> float:
    """Give the learning rate of a step as a share of the highest one.

    It rises linearly (Goyal et al., arXiv 1706.02677) and falls as half a cosine (Loshchilov and
    Hutter, SGDR, ICLR 2017).

    Parameters
    ----------
    step : int
        From 0.
    n_steps : int
        Of the whole training.
    warm_up : float
        Share of the steps in which it rises.
    """
    n_rising = round(warm_up * n_steps)
    if step < n_rising:
        return (step + 1) / n_rising
    return 0.5 * (1 + math.cos(math.pi * (step - n_rising) / max(1, n_steps - n_rising)))
