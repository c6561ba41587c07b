"""Save and load a classifier as a directory, without pickle.

`model.json` tells what the head is and carries the card; `head.safetensors` or `booster.txt` holds
what it learnt. The payload's size and SHA-256 stand in `model.json` and are compared before
anything parses it; then names, shapes, dtypes and values are checked against the head's parameters,
because a hash only shows that the payload is the one its author meant. `reference.safetensors`,
where there is one, holds statistics of the training embeddings, under the same rules. No code is
executed from a model.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from medembed.errors import MedembedError, ModelError, PathNotFoundError
from medembed.files import json_bytes, sync_directory, write_atomically
from medembed.heads.base import Head
from medembed.heads.registry import HEADS, make_head

__all__ = [
    "FORMAT",
    "VERSION",
    "Model",
    "load_model",
    "read_document",
    "save_model",
    "update_card",
]

FORMAT = "medembed-model"
VERSION = 1

_CARD_FILE = "model.json"
_TENSOR_FILE = "head.safetensors"
_TEXT_FILE = "booster.txt"
_REFERENCE_FILE = "reference.safetensors"
_KEYS = {"format", "version", "head", "params", "n_features", "best_epoch", "payload", "card"}
_LATER_KEYS = {"reference"}  # models of before do not have them
#: A million training images' codes are some 20 MB of `model.json`.
_MAX_CARD_BYTES = 1 << 28
#: A thousand times the largest head of the default space.
_MAX_PAYLOAD_BYTES = 1 << 32


@dataclass(frozen=True)
class Model:
    """A fitted head and its card: what was recorded beside it when it was saved.

    `reference` are statistics of the embeddings that it was trained on (see `evaluation.drift`), or
    None where none were saved.
    """

    head: Head
    card: dict[str, Any]
    reference: dict[str, np.ndarray] | None = None


def save_model(
    directory: str | Path,
    head: Head,
    card: Mapping[str, Any],
    *,
    reference: Mapping[str, np.ndarray] | None = None,
    texts: Mapping[str, str] | None = None,
    replace: bool = False,
) -> None:
    """Write a fitted head to `directory`, which appears whole or not at all.

    Parameters
    ----------
    directory : path
        To be made; its parent exists.
    head : Head
        Fitted on labels 0 and 1; one of `HEADS`.
    card : dict
        What else to keep, fit for JSON: spec, calibration, thresholds, scores, ….
    reference : mapping of str to ndarray, optional
        Statistics of the training embeddings.
    texts : mapping of str to str, optional
        Further files by name, for people: nothing reads them.
    replace : bool
        Put the model in the place of one that is there; without it that is an error.

    Raises
    ------
    ModelError
        The head is unfitted, unknown or of other labels, the card is not JSON, or there is
        something at `directory` that may not be replaced.
    PathNotFoundError
        The parent of `directory` is missing.
    """
    target = Path(os.path.abspath(directory))
    _check_target(target, replace)
    name, data = _payload_of(head)
    files = {name: data, **{text: content.encode() for text, content in (texts or {}).items()}}
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "head": _name_of(head),
        "params": _plain_params(head),
        "n_features": int(head.n_features_in_),
        "best_epoch": head.best_epoch_,
        "payload": _entry(name, data),
        "reference": None,
        "card": dict(card),
    }
    if reference is not None:
        files[_REFERENCE_FILE] = _tensor_bytes(reference)
        document["reference"] = _entry(_REFERENCE_FILE, files[_REFERENCE_FILE])
    _write_directory(target, {**files, _CARD_FILE: _document_bytes(document)})


def update_card(
    directory: str | Path, texts: Mapping[str, str] | None = None, **entries: Any
) -> None:
    """Replace entries of a saved model's card, and files for people; the payload stays.

    Raises
    ------
    PathNotFoundError
        There is no model.
    ModelError
        It is none of this version, or the entries are not JSON.
    """
    path = Path(directory)
    document = read_document(path)
    document["card"] = {**document["card"], **entries}
    described = _document_bytes(document)
    for name, content in (texts or {}).items():
        write_atomically(path / name, content.encode())
    write_atomically(path / _CARD_FILE, described)


def load_model(directory: str | Path) -> Model:
    """Read what `save_model` wrote; predictions are those of the head saved, byte for byte.

    Raises
    ------
    PathNotFoundError
        There is no such directory, or no `model.json` in it.
    ModelError
        Another format or version, a payload that is missing or not the one recorded, parameters
        that no head has, or tensors or trees that do not fit them.
    """
    path = Path(directory)
    document = read_document(path)
    try:
        head = _rebuild(document, path)
        reference = _read_reference(document.get("reference"), path)
    except ModelError as error:
        raise ModelError(
            f"model at {path} cannot be used: {error}. Train or copy it again"
        ) from error
    return Model(head, document["card"], reference)


def read_document(directory: str | Path) -> dict[str, Any]:
    """Read `model.json` alone: what the model says of itself, without what it learnt.

    Raises
    ------
    PathNotFoundError
        There is no such directory, or no `model.json` in it.
    ModelError
        It is too large, not JSON, or another format or version.
    """
    path = Path(directory)
    if not (path / _CARD_FILE).is_file():
        raise PathNotFoundError(f"no model at {path}: {_CARD_FILE} is not there")
    return _read_card(path / _CARD_FILE)


def _check_target(target: Path, replace: bool) -> None:
    if not target.parent.is_dir():
        raise PathNotFoundError(f"{target.parent} is not a directory; make it first")
    if not os.path.lexists(target):
        return
    if not replace:
        raise ModelError(f"{target} exists already; remove it or choose another place")
    if target.is_symlink() or not (target / _CARD_FILE).is_file():
        raise ModelError(f"{target} is not a model and is not replaced; choose another place")


def _name_of(head: Head) -> str:
    kind = type(head)
    for name, place in HEADS.items():
        if place == f"{kind.__module__}:{kind.__qualname__}":
            return name
    raise ModelError(f"{kind.__qualname__} is not in the table of heads ({', '.join(HEADS)})")


def _payload_of(head: Head) -> tuple[str, bytes]:
    classes = getattr(head, "classes_", None)
    if classes is None or classes.tolist() != [0, 1]:
        held = "not fitted" if classes is None else f"fitted on the classes {classes.tolist()}"
        raise ModelError(f"{type(head).__name__} is {held}; a model is fitted on labels 0 and 1")
    payload = head._payload()
    if isinstance(payload, str):
        return _TEXT_FILE, payload.encode()
    return _TENSOR_FILE, _tensor_bytes(payload)


def _tensor_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    return safetensors.numpy.save({n: np.ascontiguousarray(array) for n, array in arrays.items()})


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _document_bytes(document: Mapping[str, Any]) -> bytes:
    try:
        return json_bytes(document)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the model's card or parameters are not JSON: {error}") from error


def _plain_params(head: Head) -> dict[str, Any]:
    params = dict(head.get_params())
    if isinstance(params.get("class_weight"), Mapping):
        # JSON has no whole numbers for keys; `_given_params` turns them back
        params["class_weight"] = {str(k): float(v) for k, v in params["class_weight"].items()}
    return {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in params.items()
    }


def _given_params(params: dict[str, Any]) -> dict[str, Any]:
    given = dict(params)
    if isinstance(given.get("class_weight"), dict):
        given["class_weight"] = {int(key): value for key, value in given["class_weight"].items()}
    if isinstance(given.get("hidden"), list):
        given["hidden"] = tuple(given["hidden"])
    return given


def _write_directory(target: Path, files: Mapping[str, bytes]) -> None:
    """Write beside, sync, rename; an old model steps aside just before and goes just after."""
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    old = made.with_suffix(".old.partial")
    try:
        made.chmod(0o755)
        for name, data in files.items():
            write_atomically(made / name, data)
        if target.exists():
            os.rename(target, old)
        os.rename(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _read_card(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_CARD_BYTES:
        raise ModelError(f"{path} is larger than {_MAX_CARD_BYTES} bytes and is not read")
    try:
        document = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ModelError(f"{path} is not a {FORMAT}")
    if document.get("version") != VERSION:
        raise ModelError(
            f"{path} is version {document.get('version')!r} of {FORMAT}; this medembed reads "
            f"{VERSION}. Use the medembed that wrote it, or train again"
        )
    if set(document) - _LATER_KEYS != _KEYS or not isinstance(document["card"], dict):
        raise ModelError(f"{path} does not hold exactly {', '.join(sorted(_KEYS))}")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _rebuild(document: Mapping[str, Any], directory: Path) -> Head:
    n_features, best_epoch = document["n_features"], document["best_epoch"]
    if not _is_count(n_features) or not (best_epoch is None or _is_count(best_epoch)):
        raise ModelError(
            f"n_features={n_features!r} or best_epoch={best_epoch!r} is not a whole number above 0"
        )
    if not isinstance(document["head"], str) or not isinstance(document["params"], dict):
        raise ModelError("head is not a name, or params are not a table")
    payload = _read_payload(document["payload"], directory, (_TENSOR_FILE, _TEXT_FILE))
    try:
        head = make_head(document["head"], _given_params(document["params"]))
        head._restore(payload, n_features)
    except ModelError:
        raise
    except (MedembedError, TypeError, ValueError) as error:
        raise ModelError(f"its parameters do not make a head: {error}") from error
    head.classes_ = np.array([0, 1])
    head.n_features_in_ = n_features
    head.best_epoch_ = best_epoch
    return head


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _read_reference(entry: Any, directory: Path) -> dict[str, np.ndarray] | None:
    if entry is None:
        return None
    arrays = _read_payload(entry, directory, (_REFERENCE_FILE,))
    assert isinstance(arrays, dict)
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ModelError(f"{name} in {_REFERENCE_FILE} is not finite")
    return arrays


def _read_payload(
    entry: Any, directory: Path, names: tuple[str, ...]
) -> dict[str, np.ndarray] | str:
    if not isinstance(entry, dict) or set(entry) != {"file", "bytes", "sha256"}:
        raise ModelError("payload does not hold exactly file, bytes and sha256")
    # the name decides the parser, and is never a path that a stranger chose
    if entry["file"] not in names:
        raise ModelError(f"payload {entry['file']!r} is neither of {', '.join(names)}")
    path = directory / entry["file"]
    if path.is_symlink() or not path.is_file():
        raise ModelError(f"{entry['file']} is missing or not a plain file")
    size = path.stat().st_size
    if size != entry["bytes"] or size > _MAX_PAYLOAD_BYTES:
        raise ModelError(f"{entry['file']} has {size} bytes, {entry['bytes']!r} are recorded")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ModelError(f"{entry['file']} is damaged: its SHA-256 is not the one recorded")
    return _parse(entry["file"], data)


def _parse(name: str, data: bytes) -> dict[str, np.ndarray] | str:
    try:
        return data.decode("ascii") if name == _TEXT_FILE else safetensors.numpy.load(data)
    except (UnicodeDecodeError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ModelError(f"{name} cannot be read: {error}") from error
