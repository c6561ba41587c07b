"""Sweeps: cross-validate many heads on one cache and one manifest, and write one run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medembed.sweeps.ensembles import ensemble
    from medembed.sweeps.job import sweep

__all__ = ["ensemble", "sweep"]


def __getattr__(name: str) -> Any:
    # on demand: training processes import this package, and need little of what a whole job does
    if name == "ensemble":
        from medembed.sweeps.ensembles import ensemble

        return ensemble
    if name == "sweep":
        from medembed.sweeps.job import sweep

        return sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
