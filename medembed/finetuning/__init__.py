"""Fine-tuning: the last blocks of an encoder train together with a head, depth by depth.

Names are looked up when they are first used: the training itself needs no library that a run's
tables and its swept heads need.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medembed.finetuning.hyperparameters import Hyperparameters
    from medembed.finetuning.job import finetune

__all__ = ["Hyperparameters", "finetune"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from medembed.finetuning import hyperparameters, job

    return getattr(job if name == "finetune" else hyperparameters, name)
