"""The small files of a checkpoint's directory: whether they are there, and what they say."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medembed.core.errors import EncoderError
from medembed.core.files import open_plain, read_plain

__all__ = [
    "ADAPTER_FILE",
    "CONFIG_FILE",
    "check_config",
    "checkpoint_name",
    "explain_adapter",
    "holds_file",
    "is_snapshot",
    "read_json",
    "refuse_adapter",
]

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# An index of a model of 700 GB has 10 MB.
_MOST_JSON_BYTES = 64 << 20


def is_snapshot(directory: Path) -> bool:
    """Whether it is a snapshot in the hub's cache, of one commit."""
    return directory.parent.name == "snapshots" and directory.parent.parent.name.startswith(
        "models--"
    )


def checkpoint_name(directory: Path) -> str:
    """Name a checkpoint's directory to a user: its own name, or the repository it is of.

    Examples
    --------
    >>> checkpoint_name(Path("hub/models--google--medgemma-4b-pt/snapshots/0123abc"))
    'google/medgemma-4b-pt'
    """
    if is_snapshot(directory):
        storage = directory.parent.parent.name
        return storage.removeprefix("models--").replace("--", "/")
    return directory.name


def holds_file(path: Path) -> bool:
    """Whether a checkpoint's directory holds this file.

    Raises
    ------
    EncoderError
        Something of this name is there and cannot be read: no plain file, or not readable.
    """
    try:
        open_plain(path).close()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    return True


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Raises
    ------
    EncoderError
        Missing, no plain file, unreadable, too large or not JSON.
    """
    try:
        return json.loads(read_plain(path, max_bytes=_MOST_JSON_BYTES).decode())
    except FileNotFoundError as error:
        raise EncoderError(
            f"{checkpoint_name(path.parent)} holds no {path.name}: it is not a checkpoint "
            "directory."
        ) from error
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse a `config.json` that sends transformers to another file for what it should say.

    Raises
    ------
    EncoderError
        It names another config for some releases (`configuration_files`), or its own file of
        weights (`transformers_weights`).
    """
    for key, what in (("configuration_files", "configs"), ("transformers_weights", "weights")):
        if config.get(key):
            raise EncoderError(
                f"config.json of {source} names other {what} in {key}, which medembed does not "
                f"follow. Give the files their usual names, and take {key} out."
            )


def refuse_adapter(directory: Path) -> None:
    """Refuse a directory with an adapter of PEFT, alone or beside a model.

    transformers puts an adapter that it finds onto the model, where PEFT is installed; whoever
    read the model alone would embed with another encoder in silence.

    Raises
    ------
    EncoderError
        There is one.
    """
    has_config = os.path.lexists(directory / CONFIG_FILE)
    is_told = os.path.lexists(directory / ADAPTER_FILE)
    is_alone = not has_config and any(os.path.lexists(directory / n) for n in _ADAPTER_WEIGHTS)
    if is_told or is_alone:
        raise explain_adapter(checkpoint_name(directory), alone=not has_config)


def explain_adapter(source: str, *, alone: bool) -> EncoderError:
    """Say that adapters of PEFT are not read, and the way out."""
    merge = "Merge it into its model with PEFT (merge_and_unload), save that, and give it here"
    if alone:
        return EncoderError(
            f"{source} is an adapter of PEFT ({ADAPTER_FILE}) without the model that it changes. "
            f"{merge}."
        )
    return EncoderError(
        f"{source} holds a model and an adapter of PEFT ({ADAPTER_FILE}): with the adapter it is "
        f"another encoder. {merge}; or remove {ADAPTER_FILE} to read the model alone."
    )


def _unreadable(path: Path, reason: str) -> EncoderError:
    name = checkpoint_name(path.parent)
    return EncoderError(f"{path.name} of {name} cannot be read: {reason.rstrip('.')}.")
