"""Where a checkpoint keeps its vision tower: which files, under which names."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from medembed.errors import EncoderError

__all__ = [
    "AUTOENCODER_TYPE",
    "FETCHED_FILES",
    "INDEX_FILE",
    "PART_NAMES",
    "PART_WORDS",
    "SIGLIP_TYPES",
    "WEIGHTS_FILE",
    "Part",
    "canonical_name",
    "canonical_projector_name",
    "checkpoint_name",
    "match_tensors",
    "part_shards",
    "read_json",
    "weight_files",
    "weight_map_of",
    "whole_files",
]

Part = Literal["tower", "projector", "encoder", "whole"]
SIGLIP_TYPES = ("gemma3", "siglip", "siglip_vision_model")
AUTOENCODER_TYPE = "medembed-autoencoder"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What `fetching` makes of the ranges that it fetches from a repository's files.
FETCHED_FILES: dict[Part, str] = {
    "tower": "medembed-vision-tower.safetensors",
    "projector": "medembed-projector.safetensors",
}
# transformers 4.x wrote vision_tower.vision_model.…, 5.x writes vision_tower.…, a bare state dict
# has model.vision_tower.…; SigLIP itself has vision_model.… or, alone and since 5.x, no prefix.
_TOWER = re.compile(
    r"^(?:(?:model\.)?vision_tower\.(?:vision_model\.)?|vision_model\.)?"
    r"((?:embeddings|encoder|post_layernorm|head)\..+)$"
)
_PROJECTOR = re.compile(
    r"^(?:model\.)?multi_modal_projector\.(mm_input_projection_weight|mm_soft_emb_norm\.weight)$"
)
PART_WORDS: dict[Part, str] = {
    "tower": "the vision tower",
    "projector": "the projector",
    "encoder": "the encoder",
    "whole": "the model",
}
_NOT_HELD: dict[Part, str] = {
    "tower": "vision tower: no tensor named vision_tower.… or vision_model.…. Give a checkpoint of "
    "MedGemma, MedSigLIP or SigLIP.",
    "projector": "projector: no tensor named multi_modal_projector.…. Only MedGemma has one; leave "
    "out the pooling `projector`.",
    "encoder": "encoder: no tensor named encoder.…. Train it again with `medembed autoencoder`.",
    "whole": "tensor at all. Complete the checkpoint.",
}
_BLOB = re.compile(r"^[0-9a-f]{64}$")
_ENCODER = re.compile(r"^encoder\.(.+)$")  # of an autoencoder
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


def canonical_projector_name(stored: str) -> str | None:
    """Strip the prefix from a tensor name of Gemma's projector; None for any other tensor.

    Examples
    --------
    >>> canonical_projector_name("multi_modal_projector.mm_soft_emb_norm.weight")
    'mm_soft_emb_norm.weight'
    """
    found = _PROJECTOR.match(stored)
    return found[1] if found else None


def _encoder_name(stored: str) -> str | None:
    found = _ENCODER.match(stored)
    return found[1] if found else None


def _any_name(stored: str) -> str | None:
    return stored


PART_NAMES: dict[Part, Callable[[str], str | None]] = {
    "tower": canonical_name,
    "projector": canonical_projector_name,
    "encoder": _encoder_name,
    "whole": _any_name,
}


def checkpoint_name(directory: Path) -> str:
    """Name a checkpoint's directory to a user: its own name, or the repository it is of.

    Examples
    --------
    >>> checkpoint_name(Path("hub/models--google--medgemma-4b-pt/snapshots/0123abc"))
    'google/medgemma-4b-pt'
    """
    storage = directory.parent.parent.name
    if directory.parent.name == "snapshots" and storage.startswith("models--"):
        return storage.removeprefix("models--").replace("--", "/")
    return directory.name


def part_shards(weight_map: Mapping[str, str], part: Part = "tower") -> list[str]:
    """List, sorted, the files of an index that hold some of a part's tensors."""
    belongs = PART_NAMES[part]
    return sorted({file for name, file in weight_map.items() if belongs(name)})


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
        raise EncoderError(
            f"{checkpoint_name(path.parent)} holds no {path.name}: it is not a checkpoint "
            "directory."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        name = checkpoint_name(path.parent)
        raise EncoderError(f"{path.name} of {name} cannot be read: {error}") from error


def weight_files(directory: Path, part: Part = "tower") -> list[Path]:
    """List the safetensors files of `directory` that may hold a part of the model.

    The checkpoint's own files come first; else what `hub.resolve_checkpoint` fetched of them.
    A fetched file that lies in the hub's cache is named there by its SHA-256, and is compared
    with it here (0.8 GB: about a second).

    Parameters
    ----------
    part : {"tower", "projector", "encoder", "whole"}
        The vision tower, Gemma's projector, an autoencoder's encoder, or every tensor there is.

    Raises
    ------
    EncoderError
        There are none, one that the index names is missing, or a fetched one was damaged.
    """
    whole = whole_files(directory, part)
    if whole:
        return whole
    fetched = directory / FETCHED_FILES.get(part, "")
    if part in FETCHED_FILES and fetched.is_file():
        _check_blob(fetched)
        return [fetched]
    if whole is None:
        raise EncoderError(
            f"{checkpoint_name(directory)} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}. "
            "Weights in other formats are not read; convert them to safetensors."
        )
    shards = part_shards(
        weight_map_of(read_json(directory / INDEX_FILE), checkpoint_name(directory)), part
    )
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise EncoderError(
            f"{checkpoint_name(directory)} lacks {missing[0]}, one of {len(missing)} missing "
            f"files that hold {PART_WORDS[part]}. Complete the checkpoint."
        )
    return []


def whole_files(directory: Path, part: Part) -> list[Path] | None:
    """List the checkpoint's own files that hold a part, only if all of them are there.

    None means that the directory has neither an index nor a single file of weights.

    Raises
    ------
    EncoderError
        The index is no index.
    """
    if (directory / INDEX_FILE).is_file():
        weight_map = weight_map_of(read_json(directory / INDEX_FILE), checkpoint_name(directory))
        paths = [directory / shard for shard in part_shards(weight_map, part)]
        return paths if all(path.is_file() for path in paths) else []
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    return None


def _check_blob(path: Path) -> None:
    blob = path.resolve()
    if not path.is_symlink() or not _BLOB.match(blob.name):
        return
    with blob.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != blob.name:
        raise EncoderError(
            f"{path.name} of {checkpoint_name(path.parent)} was damaged after it was fetched: "
            f"its SHA-256 is {digest[:12]}…, not {blob.name[:12]}…. "
            f"Delete {path} and {blob}, and run again."
        )


def match_tensors(
    stored: Iterable[tuple[Path, str]], source: str, part: Part = "tower"
) -> dict[str, tuple[Path, str]]:
    """Map canonical names to the file and name under which a part's tensor is stored.

    Raises
    ------
    EncoderError
        Two stored tensors have the same canonical name, or none belongs to the part.
    """
    found: dict[str, tuple[Path, str]] = {}
    for path, name in stored:
        canonical = PART_NAMES[part](name)
        if canonical is None:
            continue
        if canonical in found:
            raise EncoderError(
                f"{source} holds {canonical} twice, as {found[canonical][1]} and as {name}. Keep "
                "one naming."
            )
        found[canonical] = (path, name)
    if not found:
        raise EncoderError(f"{source} holds no {_NOT_HELD[part]}")
    return found


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and Path(value).name == value
