"""Where a checkpoint keeps its vision tower: which files, under which names."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medembed.errors import EncoderError

__all__ = [
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "canonical_name",
    "match_tensors",
    "read_json",
    "tower_shards",
    "weight_files",
    "weight_map_of",
]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# transformers 4.x wrote vision_tower.vision_model.…, 5.x writes vision_tower.…, a bare state dict
# has model.vision_tower.…; SigLIP itself has vision_model.… or, alone and since 5.x, no prefix.
_TOWER = re.compile(
    r"^(?:(?:model\.)?vision_tower\.(?:vision_model\.)?|vision_model\.)?"
    r"((?:embeddings|encoder|post_layernorm|head)\..+)$"
)
# A constant (0, 1, 2, …) that early releases of transformers saved with the weights.
_CONSTANTS = {"embeddings.position_ids"}


def canonical_name(stored: str) -> str | None:
    """Strip the prefix from a vision tower's tensor name; None for any other tensor.

    Examples
    --------
    >>> canonical_name("vision_tower.vision_model.post_layernorm.bias")
    'post_layernorm.bias'
    """
    found = _TOWER.match(stored)
    return found[1] if found and found[1] not in _CONSTANTS else None


def tower_shards(weight_map: Mapping[str, str]) -> list[str]:
    """List, sorted, the files of an index that hold some of the tower's tensors."""
    return sorted({file for name, file in weight_map.items() if canonical_name(name)})


def weight_map_of(index: Any, source: str) -> dict[str, str]:
    """Check and give the `weight_map` of a `model.safetensors.index.json`.

    Raises
    ------
    EncoderError
        It is no mapping of tensor names to file names in the same directory.
    """
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise EncoderError(f"{INDEX_FILE} of {source} is not an index of safetensors files.")
    return weight_map


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Raises
    ------
    EncoderError
        Missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        message = f"{path.parent.name} holds no {path.name}: it is not a checkpoint directory."
        raise EncoderError(message) from error
    except (OSError, ValueError, RecursionError) as error:
        raise EncoderError(f"{path.name} of {path.parent.name} cannot be read: {error}") from error


def weight_files(directory: Path) -> list[Path]:
    """List the safetensors files of `directory` that may hold the tower.

    Raises
    ------
    EncoderError
        There are none, or one that the index names is missing.
    """
    if (directory / INDEX_FILE).is_file():
        shards = tower_shards(weight_map_of(read_json(directory / INDEX_FILE), directory.name))
        paths = [directory / shard for shard in shards]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise EncoderError(
                f"{directory.name} lacks {missing[0]}, one of {len(missing)} missing files that "
                "hold the vision tower. Complete the checkpoint."
            )
        return paths
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    raise EncoderError(
        f"{directory.name} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}. Weights in other "
        "formats are not read; convert them to safetensors."
    )


def match_tensors(stored: Iterable[tuple[Path, str]], source: str) -> dict[str, tuple[Path, str]]:
    """Map canonical names to the file and name under which a tensor is stored.

    Raises
    ------
    EncoderError
        Two stored tensors have the same canonical name, or none belongs to a tower.
    """
    found: dict[str, tuple[Path, str]] = {}
    for path, name in stored:
        canonical = canonical_name(name)
        if canonical is None:
            continue
        if canonical in found:
            raise EncoderError(
                f"{source} holds {canonical} twice, as {found[canonical][1]} and as {name}. Keep "
                "one naming."
            )
        found[canonical] = (path, name)
    if not found:
        raise EncoderError(
            f"{source} holds no vision tower: no tensor named vision_tower.… or vision_model.…. "
            "Give a checkpoint of MedGemma, MedSigLIP or SigLIP."
        )
    return found


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and Path(value).name == value
