"""What a packaged model says of images it is handed: probabilities, decisions, sets, heat maps.

Names are looked up when they are first used, so that a room of this house that needs one of them
does not load the others' libraries.
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
