"""timm, open_clip and torchvision for tests, from a folder of their own.

All import torchvision, whose build on PyPI does not load beside a torch for CPUs (`operator
torchvision::nms does not exist`). With an empty module in the place of its operators' shapes its
Python half loads. It is not on the path of other tests: transformers would import it, too.
"""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils

FOLDER = Path(sys.prefix) / "vision"


def import_timm() -> Any:
    """Return timm; skip the module where it was not installed."""
    if not (FOLDER / "timm").is_dir():
        pytest.skip(
            f"timm and torchvision are not in {FOLDER}: make setup", allow_module_level=True
        )
    transformers.utils.is_torchvision_available()  # keeps what it finds: none
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if not torch.cuda.is_available():
        shapes = "torchvision._meta_registrations"
        sys.modules.setdefault(shapes, types.ModuleType(shapes))
    import timm

    return timm


def import_open_clip() -> Any:
    """Return open_clip; skip the module where it was not installed."""
    import_timm()
    if not (FOLDER / "open_clip").is_dir():
        pytest.skip(f"open_clip is not in {FOLDER}: make setup", allow_module_level=True)
    import open_clip

    return open_clip
