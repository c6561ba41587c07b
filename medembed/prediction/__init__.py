"""Apply a packaged model to images: probabilities, decisions, prediction sets, heat maps.

Names are resolved on first use, so that a module that needs one of them does not load the others'
libraries.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medembed.prediction.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from medembed.prediction import predictor

    return getattr(predictor, name)
