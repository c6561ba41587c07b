"""Closed-form confidence limits of shares, AUROC and values in (0, 1), and MOVER.

The method for each score was chosen by simulation, see `bench/coverage.py`.
"""

from collections.abc import Callable, Sequence
from math import inf, isfinite, nan, sqrt

from scipy.special import betaincinv, expit, logit, ndtri, stdtrit

__all__ = [
    "RULE_OF_FIVE",
    "Bounds",
    "auroc_variance",
    "bound_auroc",
    "bound_on_logit",
    "bound_ratio",
    "bound_share",
    "clopper_pearson",
    "combine",
    "quantile",
    "wilson",
]

Bounds = tuple[float, float]
#: With fewer of either kind, in effective counts, a share has Clopper and Pearson's limits: below,
#: Wilson's limits cover too rarely; above, Clopper and Pearson's cover too often.
RULE_OF_FIVE = 5.0
_N_HALVINGS = 60


def quantile(confidence: float, freedom: float = inf) -> float:
    """Return the two-sided quantile of Student's t, by default of the normal distribution."""
    tail = (1 + confidence) / 2
    return float(ndtri(tail) if freedom == inf else stdtrit(freedom, tail))


def wilson(share: float, n: float, reach: float) -> Bounds:
    """Return Wilson's limits of a share of n trials (JASA 22, 1927); n need not be whole.

    `reach` is the quantile, 1.96 for 95 %.
    """
    squared = reach * reach / n
    centre = share + squared / 2
    half = sqrt(max(share * (1 - share) * squared + squared * squared / 4, 0.0))
    low, high = (centre - half) / (1 + squared), (centre + half) / (1 + squared)
    # rounding leaves 1e-17 where the limit is 0
    return (0.0 if share <= 0 else low), (1.0 if share >= 1 else high)


def clopper_pearson(share: float, n: float, confidence: float) -> Bounds:
    """Return Clopper and Pearson's limits (Biometrika 26, 1934) from the beta distribution.

    With an effective n these are Korn and Graubard's limits (Survey Methodology 24, 1998).
    """
    hits, tail = share * n, (1 - confidence) / 2
    low = float(betaincinv(hits, n - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return low, high


def bound_share(share: float, n: float, confidence: float, freedom: float = inf) -> Bounds:
    """Return limits of a share: Clopper and Pearson's below `RULE_OF_FIVE`, else Wilson's."""
    if min(share, 1 - share) * n < RULE_OF_FIVE:
        return clopper_pearson(share, n, confidence)
    return wilson(share, n, quantile(confidence, freedom))


def auroc_variance(auroc: float, n_abnormal: float, n_normal: float) -> float:
    """Return the variance of an AUROC on independent rows under exponential scores.

    The variance of Hanley and McNeil (Radiology 143, 1982), as symmetrised between the classes by
    Newcombe (Statistics in Medicine 25, 2006, method 5).
    """
    half = (n_abnormal + n_normal) / 2 - 1
    factor = 1 + half * (1 - auroc) / (2 - auroc) + half * auroc / (1 + auroc)
    return auroc * (1 - auroc) * factor / (n_abnormal * n_normal)


def bound_auroc(
    auroc: float, n_abnormal: float, n_normal: float, ratio: float, reach: float
) -> Bounds:
    """Return the range of AUROCs within `reach` standard errors of the estimate.

    The standard error is evaluated at each candidate AUROC, ``sqrt(ratio * auroc_variance)``, so
    that the limits stay in [0, 1] and the interval has a width at 0 and 1 (Newcombe 2006).
    """

    def inside(value: float) -> bool:
        spread = ratio * auroc_variance(value, n_abnormal, n_normal)
        return (auroc - value) ** 2 <= reach * reach * spread

    return _edge(inside, auroc, 0.0), _edge(inside, auroc, 1.0)


def bound_on_logit(value: float, error: float, reach: float) -> Bounds:
    """Return delta-method limits of a value in (0, 1), symmetric in its log-odds.

    NaN at 0 and 1, which have no log-odds, and without a standard error.
    """
    if not (0 < value < 1 and error > 0 and isfinite(reach)):
        return nan, nan
    half = reach * error / (value * (1 - value))
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))


def bound_ratio(above: float, below: float, ends_above: Bounds, ends_below: Bounds) -> Bounds:
    """Return MOVER limits of ``above / below`` from the non-negative limits of both.

    Donner and Zou, Statistical Methods in Medical Research 21, 2012, in a form without
    cancellation. Both limits are 0 or more; the upper one is infinite if `below` may be 0.
    """
    product = above * below
    (low, high), (least, most) = ends_above, ends_below
    of_low, of_most = low * (2 * above - low), most * (2 * below - most)
    of_high, of_least = high * (2 * above - high), least * (2 * below - least)
    # rounding leaves -1e-17 where a root is 0
    start = product + sqrt(max(product * product - of_low * of_most, 0.0))
    end = product + sqrt(max(product * product - of_high * of_least, 0.0))
    return (of_low / start if start > 0 else 0.0), (end / of_least if of_least > 0 else inf)


def combine(value: float, parts: Sequence[Bounds]) -> Bounds:
    """Return MOVER limits of a value from the effects of its independent parts.

    Parameters
    ----------
    value : float
    parts : sequence of (float, float)
        The value with one part at its lower and at its upper limit, in either direction.

    Notes
    -----
    The method of variance estimates recovery (Zou and Donner, Statistics in Medicine 27, 2008;
    Donner and Zou, Statistical Methods in Medical Research 21, 2012): squared distances to the
    parts' own limits are added, separately for each side.
    """
    down = sum(min(0.0, *(end - value for end in part)) ** 2 for part in parts)
    up = sum(max(0.0, *(end - value for end in part)) ** 2 for part in parts)
    return value - sqrt(down), value + sqrt(up)


def _edge(inside: Callable[[float], bool], start: float, end: float) -> float:
    """Return the point between `start`, where `inside` holds, and `end` where it ceases to.

    Accurate to 1e-15. At `end` itself the variance is 0, so only `end` is inside there.
    """
    if start == end:
        return end
    held, lost = start, end
    for _ in range(_N_HALVINGS):
        middle = (held + lost) / 2
        held, lost = (middle, lost) if inside(middle) else (held, middle)
    return held
