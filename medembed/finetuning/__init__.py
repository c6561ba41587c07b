"""Fine-tuning: the last blocks of an encoder train together with a head, depth by depth."""

from medembed.finetuning.job import finetune
from medembed.finetuning.recipe import Recipe

__all__ = ["Recipe", "finetune"]
