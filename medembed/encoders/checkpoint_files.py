"""A checkpoint's directory: its configuration files, and the files that hold the vision tower."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from medembed.core.errors import EncoderError
from medembed.core.files import open_plain, read_plain
from medembed.core.text import one_line

__all__ = [
    "ADAPTER_FILE",
    "AUTOENCODER_TYPE",
    "CLIP_TYPES",
    "CONFIG_FILE",
    "FETCHED_FILES",
    "INDEX_FILE",
    "OPEN_CLIP_CONFIG",
    "PART_NAMES",
    "PART_WORDS",
    "PICKLED_FILES",
    "SIGLIP_TYPES",
    "WEIGHTS_FILE",
    "Part",
    "canonical_name",
    "check_config",
    "checkpoint_name",
    "explain_adapter",
    "explain_not_held",
    "find_config",
    "holds_both",
    "holds_file",
    "is_of_timm",
    "is_open_clip_config",
    "is_snapshot",
    "is_timm_config",
    "match_tensors",
    "name_kind",
    "names_model",
    "part_shards",
    "pickled_file",
    "read_json",
    "refuse_adapted",
    "refuse_adapter",
    "single_file",
    "unwrap",
    "weight_files",
    "weight_map_of",
    "whole_files",
]

CONFIG_FILE = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
ADAPTER_FILE = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# An index of a model of 700 GB has 10 MB.
_MOST_JSON_BYTES = 64 << 20


def is_snapshot(directory: Path) -> bool:
    """Return whether a directory is a snapshot of one commit in the hub's cache."""
    return directory.parent.name == "snapshots" and directory.parent.parent.name.startswith(
        "models--"
    )


def checkpoint_name(directory: Path) -> str:
    """Return a checkpoint directory's name for messages: its own, or that of its repository.

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
    """Return whether a checkpoint's directory holds this file.

    Raises
    ------
    EncoderError
        The path exists but is not a plain file, or is not readable.
    """
    try:
        open_plain(path).close()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    return True


def read_json(path: Path) -> Any:
    """Return the content of a checkpoint's JSON file.

    Raises
    ------
    EncoderError
        The file is missing, not a plain file, unreadable, too large or not JSON.
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
    """Refuse a `config.json` that redirects transformers to another file.

    Raises
    ------
    EncoderError
        The config names another config for some releases (`configuration_files`), or a file of
        weights (`transformers_weights`).
    """
    for key, what in (("configuration_files", "configs"), ("transformers_weights", "weights")):
        if config.get(key):
            raise EncoderError(
                f"config.json of {source} names other {what} in {key}, which medembed does not "
                f"follow. Give the files their usual names, and take {key} out."
            )


def is_timm_config(config: Any) -> bool:
    """Return whether a `config.json` is of timm: an architecture and its preprocessing."""
    return (
        isinstance(config, Mapping)
        and "model_type" not in config
        and isinstance(config.get("architecture"), str)
        and isinstance(config.get("pretrained_cfg"), Mapping)
    )


def is_open_clip_config(config: Any) -> bool:
    """Return whether a config is of open_clip: a model with an image tower."""
    model = config.get("model_cfg") if isinstance(config, Mapping) else None
    return isinstance(model, Mapping) and isinstance(model.get("vision_cfg"), Mapping)


def is_of_timm(config: Mapping[str, Any]) -> bool:
    """Return whether the image tower of a config of open_clip is a model of timm."""
    return bool(config["model_cfg"]["vision_cfg"].get("timm_model_name"))


def find_config(directory: Path) -> Path:
    """Return the file that describes a checkpoint's model.

    It is `open_clip_config.json` where `config.json` is missing or names no model.

    Raises
    ------
    EncoderError
        A file cannot be read.
    """
    own, other = directory / CONFIG_FILE, directory / OPEN_CLIP_CONFIG
    if holds_file(other) and not (holds_file(own) and names_model(read_json(own))):
        return other
    return own


def names_model(config: Any) -> bool:
    """Return whether a `config.json` names a model of transformers or timm."""
    return is_timm_config(config) or (isinstance(config, Mapping) and "model_type" in config)


def name_kind(config: Mapping[str, object]) -> str:
    """Return what kind of model a config describes, for people."""
    if is_open_clip_config(config):
        return "open_clip"
    named = config.get("model_type") or config.get("architecture")
    return one_line(named, 60) if named else "of an unnamed type"


def refuse_adapter(directory: Path) -> None:
    """Refuse a directory with an adapter of PEFT, alone or beside a model.

    If PEFT is installed, transformers applies an adapter that it finds to the model; reading the
    model alone would silently embed with another encoder.

    Raises
    ------
    EncoderError
        The directory holds an adapter.
    """
    has_config = os.path.lexists(directory / CONFIG_FILE)
    is_told = os.path.lexists(directory / ADAPTER_FILE)
    is_alone = not has_config and any(os.path.lexists(directory / n) for n in _ADAPTER_WEIGHTS)
    if is_told or is_alone:
        raise explain_adapter(checkpoint_name(directory), alone=not has_config)


def explain_adapter(source: str, *, alone: bool) -> EncoderError:
    """Return the error for a PEFT adapter, which is not supported, with the way out."""
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


Part = Literal["tower", "image", "text", "projector", "encoder", "whole"]
SIGLIP_TYPES = ("gemma3", "siglip", "siglip_vision_model")
CLIP_TYPES = ("clip", "clip_vision_model")
AUTOENCODER_TYPE = "medembed-autoencoder"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
# State dicts, read where there are no safetensors.
PICKLED_FILES: dict[Part, tuple[str, ...]] = {
    "image": ("open_clip_pytorch_model.bin",),
    "whole": ("pytorch_model.bin", "model.bin", "model.pth"),
}
# The files that `partial_download` builds from ranges of a repository's files.
FETCHED_FILES: dict[Part, str] = {
    "tower": "medembed-vision-tower.safetensors",
    "image": "medembed-image-tower.safetensors",
    "text": "medembed-text-tower.safetensors",
    "projector": "medembed-projector.safetensors",
}
# Wrapper modules of DistributedDataParallel, torch.compile, FSDP and activation checkpointing, at
# any level.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# PEFT's outermost two, and the one of trainers and of transformers' own heads.
_OUTER = r"^(?:(?:base_model\.)?model\.)*"
# transformers 4.x wrote vision_tower.vision_model.…, 5.x writes vision_tower.…, a bare state dict
# has model.vision_tower.…; SigLIP itself has vision_model.… or, alone and since 5.x, no prefix.
# Each of these may be wrapped.
_TOWER = re.compile(
    rf"{_OUTER}(?:vision_tower\.(?:base_model\.model\.)?)?(?:vision_model\.)?"
    r"((?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\..+)$"
)
_PROJECTOR = re.compile(
    rf"{_OUTER}multi_modal_projector\.(mm_input_projection_weight|mm_soft_emb_norm\.weight)$"
)
# The text tower, and what joins it with the other: CLIP's projections, the scale and the bias.
_TEXT = re.compile(
    rf"{_OUTER}((?:text_model\.(?:embeddings|encoder|final_layer_norm|head)\.|"
    r"(?:text|visual)_projection\.).+|logit_scale|logit_bias)$"
)
_IMAGE = re.compile(r"^visual\.(.+)$")  # of open_clip
_ENCODER = re.compile(rf"{_OUTER}encoder\.(.+)$")  # of an autoencoder
# Words that occur only in names of a model with unmerged PEFT adapters.
_ADAPTED = re.compile(r"\.(?:base_layer|original_module|modules_to_save|lora_\w+|ia3_\w+)(?:\.|$)")
PART_WORDS: dict[Part, str] = {
    "tower": "the vision tower",
    "image": "the image tower",
    "text": "the text tower",
    "projector": "the projector",
    "encoder": "the encoder",
    "whole": "the model",
}
_NOT_HELD: dict[Part, str] = {
    "tower": "vision tower: no tensor named vision_tower.… or vision_model.…. Give a checkpoint of "
    "MedGemma, MedSigLIP, SigLIP or CLIP.",
    "image": "image tower: no tensor named visual.…. Give a checkpoint of open_clip.",
    "text": "text tower: no tensor named text_model.…. Give a checkpoint of MedSigLIP, SigLIP or "
    "CLIP.",
    "projector": "projector: no tensor named multi_modal_projector.…. Only MedGemma has one; leave "
    "out the pooling `projector`.",
    "encoder": "encoder: no tensor named encoder.…. Train it again with `medembed autoencoder`.",
    "whole": "tensor at all. Complete the checkpoint.",
}
_BLOB = re.compile(r"^[0-9a-f]{64}$")
_FILE_NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z._+-]{0,199}\.safetensors")
# A constant (0, 1, 2, …) that early releases of transformers saved with the weights.
_CONSTANTS = {"embeddings.position_ids"}


def unwrap(stored: str) -> str:
    """Return a tensor's name without modules that only wrap others.

    Examples
    --------
    >>> unwrap("module._orig_mod.vit.layernorm.bias")
    'vit.layernorm.bias'
    """
    return ".".join(part for part in stored.split(".") if part not in _WRAPPERS)


def canonical_name(stored: str) -> str | None:
    """Return a vision tower's tensor name without prefixes, or None for any other tensor.

    Examples
    --------
    >>> canonical_name("vision_tower.vision_model.post_layernorm.bias")
    'post_layernorm.bias'
    """
    found = _TOWER.match(unwrap(stored))
    return found[1] if found and found[1] not in _CONSTANTS else None


def _canonical_projector_name(stored: str) -> str | None:
    """Return a tensor name of Gemma's projector without prefix, or None for any other tensor.

    Examples
    --------
    >>> _canonical_projector_name("multi_modal_projector.mm_soft_emb_norm.weight")
    'mm_soft_emb_norm.weight'
    """
    found = _PROJECTOR.match(unwrap(stored))
    return found[1] if found else None


def _text_name(stored: str) -> str | None:
    found = _TEXT.match(unwrap(stored))
    return found[1] if found and not found[1].endswith(".position_ids") else None


def _image_name(stored: str) -> str | None:
    found = _IMAGE.match(unwrap(stored))
    return found[1] if found and not found[1].endswith("num_batches_tracked") else None


def _encoder_name(stored: str) -> str | None:
    found = _ENCODER.match(unwrap(stored))
    return found[1] if found else None


def _any_name(stored: str) -> str | None:
    return stored


PART_NAMES: dict[Part, Callable[[str], str | None]] = {
    "tower": canonical_name,
    "image": _image_name,
    "text": _text_name,
    "projector": _canonical_projector_name,
    "encoder": _encoder_name,
    "whole": _any_name,
}


def single_file(part: Part) -> str:
    """Return the name of a file that holds all of a checkpoint's weights."""
    return _OPEN_CLIP_WEIGHTS if part == "image" else WEIGHTS_FILE


def pickled_file(directory: Path, part: Part) -> Path | None:
    """Return the state dict to read, or None if there are safetensors or nothing at all."""
    others = (single_file(part), *((INDEX_FILE,) if part == "whole" else ()))
    if any(holds_file(directory / name) for name in (*others, FETCHED_FILES.get(part, others[0]))):
        return None
    held = (directory / name for name in PICKLED_FILES.get(part, ()))
    return next((path for path in held if holds_file(path)), None)


def part_shards(weight_map: Mapping[str, str], part: Part = "tower") -> list[str]:
    """Return the sorted files of an index that hold some of a part's tensors."""
    belongs = PART_NAMES[part]
    return sorted({file for name, file in weight_map.items() if belongs(name)})


def weight_map_of(index: Any, source: str) -> dict[str, str]:
    """Return the checked `weight_map` of a `model.safetensors.index.json`.

    Raises
    ------
    EncoderError
        The index does not map tensor names to names of files in its own directory.
    """
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise EncoderError(f"{INDEX_FILE} of {source} is not an index of safetensors files.")
    return weight_map


def weight_files(directory: Path, part: Part = "tower") -> list[Path]:
    """Return the safetensors files of `directory` that may hold a part of the model.

    The checkpoint's own files take precedence over the part that `hub.resolve_checkpoint`
    downloaded. A downloaded file in the hub's cache is named by its SHA-256, which is verified here
    (0.8 GB: about a second).

    Parameters
    ----------
    part : {"tower", "image", "text", "projector", "encoder", "whole"}
        The vision tower, the one of open_clip, the text tower, Gemma's projector, an autoencoder's
        encoder, or all tensors.

    Raises
    ------
    EncoderError
        The files are inconsistent (see `whole_files`), missing or incomplete, or a downloaded one
        is damaged.
    """
    whole = whole_files(directory, part)
    if whole:
        return whole
    fetched = directory / FETCHED_FILES.get(part, "")
    if part in FETCHED_FILES and holds_file(fetched):
        _check_blob(fetched)
        return [fetched]
    if whole is None:
        raise EncoderError(
            f"{checkpoint_name(directory)} holds neither {single_file(part)} nor {_other(part)}. "
            "Weights in other formats are not read; convert them to safetensors."
        )
    shards = part_shards(
        weight_map_of(read_json(directory / INDEX_FILE), checkpoint_name(directory)), part
    )
    missing = [shard for shard in shards if not holds_file(directory / shard)]
    if missing:
        raise EncoderError(
            f"{checkpoint_name(directory)} lacks {missing[0]}, one of {len(missing)} missing "
            f"files that hold {PART_WORDS[part]}. Complete the checkpoint."
        )
    return []


def whole_files(directory: Path, part: Part) -> list[Path] | None:
    """Return the checkpoint's own files that hold a part, if all of them exist.

    If there are both a single file and an index with shards, the single file is used, as in
    transformers; saving again can leave behind an index without its shards.

    Returns
    -------
    list of Path or None
        None if the directory has neither an index nor a single file of weights.

    Raises
    ------
    EncoderError
        The index is invalid, a file is not a plain file, or the single file is older than the
        index or its shards, so that transformers would choose outdated weights.
    """
    single = directory / single_file(part)
    if holds_file(single):
        if holds_both(directory, part) and not is_snapshot(directory):
            _refuse_older(single, part)
        return [single]
    paths = _indexed(directory, part)
    if paths is None:
        return None
    return paths if all(map(holds_file, paths)) else []


def holds_both(directory: Path, part: Part) -> bool:
    """Return whether a part exists twice, in a single file and in all shards of an index.

    Raises
    ------
    EncoderError
        The index is invalid, or a file is not a plain file.
    """
    paths = _indexed(directory, part) or []
    return bool(paths) and all(map(holds_file, [*paths, directory / WEIGHTS_FILE]))


def _indexed(directory: Path, part: Part) -> list[Path] | None:
    if part == "image" or not holds_file(directory / INDEX_FILE):
        return None
    weight_map = weight_map_of(read_json(directory / INDEX_FILE), checkpoint_name(directory))
    return [directory / shard for shard in part_shards(weight_map, part)]


def _other(part: Part) -> str:
    return PICKLED_FILES["image"][0] if part == "image" else INDEX_FILE


def _refuse_older(single: Path, part: Part) -> None:
    others = [single.with_name(INDEX_FILE), *(_indexed(single.parent, part) or ())]
    latest = max(others, key=lambda path: path.stat().st_mtime_ns)
    if latest.stat().st_mtime_ns > single.stat().st_mtime_ns:
        raise EncoderError(
            f"{checkpoint_name(single.parent)} holds its weights twice, as {WEIGHTS_FILE} and in "
            f"the shards of {INDEX_FILE}, and {latest.name} is newer than {WEIGHTS_FILE}, which "
            "transformers would read. Keep one of the two."
        )


def _check_blob(path: Path) -> None:
    blob = path.resolve()
    if not path.is_symlink() or not _BLOB.match(blob.name):
        return
    with open_plain(blob) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if digest != blob.name:
        raise EncoderError(
            f"{path.name} of {checkpoint_name(path.parent)} was damaged after it was fetched: "
            f"its SHA-256 is {digest[:12]}…, not {blob.name[:12]}…. "
            f"Delete {path} and {blob}, and run again."
        )


def match_tensors(
    stored: Iterable[tuple[Path, str]], source: str, part: Part = "tower"
) -> dict[str, tuple[Path, str]]:
    """Return the file and stored name of each of a part's tensors, by canonical name.

    Raises
    ------
    EncoderError
        Two stored tensors share a canonical name, one belongs to an unmerged adapter, or none
        belongs to the part.
    """
    found: dict[str, tuple[Path, str]] = {}
    for path, name in stored:
        canonical = PART_NAMES[part](name)
        if canonical is None:
            continue
        if canonical in found:
            before = found[canonical]
            raise EncoderError(
                f"{source} holds {canonical} twice, as {before[1]} of {before[0].name} and as "
                f"{name} of {path.name}. Keep one naming."
            )
        refuse_adapted(canonical, source, part)
        found[canonical] = (path, name)
    if not found:
        raise explain_not_held(source, part)
    return found


def explain_not_held(source: str, part: Part) -> EncoderError:
    """Return the error for a checkpoint that has no tensor of a part."""
    return EncoderError(f"{source} holds no {_NOT_HELD[part]}")


def refuse_adapted(name: str, source: str, part: Part) -> None:
    """Refuse the tensor name of a PEFT adapter, or of a module with an adapter.

    Raises
    ------
    EncoderError
        The message explains how to merge the adapter.
    """
    if _ADAPTED.search(name):
        raise EncoderError(
            f"{source} holds {PART_WORDS[part]} with an adapter of PEFT in it ({name}). Merge it "
            "with PEFT (merge_and_unload), and save that."
        )


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and _FILE_NAME.fullmatch(value) is not None
