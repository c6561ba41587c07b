"""Fine-tuning: the last blocks of an encoder train together with a head, depth by depth.

Names are resolved on first use: the training itself does not need the libraries of a run's tables
and of swept heads.
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
