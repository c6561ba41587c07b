"""Save and load a classifier as a directory, without pickle.

`model.json` describes the head and carries the card; `head.safetensors` or `booster.txt` holds what
the head learnt. The payload's size and SHA-256 are recorded in `model.json` and compared before
anything is parsed; then names, shapes, dtypes and values are checked against the head's parameters,
because a hash only shows that the payload is the one its author meant. `reference.safetensors`, if
there is one, holds statistics of the training embeddings and is checked likewise. `README.md`
describes for people what `model.json` describes for programs. No code is executed from a model.

An ensemble keeps each of its members as such a directory, in `members`, and the digest of the
member's `model.json` in its own.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medembed.core.errors import MedembedError, ModelError, PathNotFoundError
from medembed.core.files import as_path, json_bytes, sync_directory, write_atomically
from medembed.core.schema import AnyTable, ClosedRecord, Field, parse
from medembed.core.text import Summarised, Summary, counted
from medembed.heads.model_files import (
    MAX_MEMBERS,
    MEMBERS,
    MODEL_FILE,
    README_FILE,
    REFERENCE_FILE,
    TENSOR_FILE,
    TEXT_FILE,
    MemberEntry,
    PayloadEntry,
    ReferenceEntry,
    check_members,
    check_names,
    describe_file,
    pack_tensors,
    parse_json,
    read_described,
    read_part,
)
from medembed.heads.registry import known_heads, make_head

if TYPE_CHECKING:
    from medembed.heads.base import Head

__all__ = [
    "ENSEMBLE",
    "FORMAT",
    "VERSION",
    "Model",
    "ModelDocument",
    "load_model",
    "read_document",
    "save_model",
    "update_card",
]

FORMAT = "medembed-model"
VERSION = 1
ENSEMBLE = "ensemble"
"""The head of a model that has members; sweeps do not train it."""

#: The most columns that a head may read: checking trees lists their names.
_MAX_FEATURES = 1 << 20
_MAX_EPOCHS = 1 << 31


class ModelDocument(ClosedRecord):
    """`model.json`."""

    format: Literal["medembed-model"]
    version: Literal[1]
    head: str
    params: AnyTable
    n_features: int = Field(ge=1, le=_MAX_FEATURES)
    best_epoch: int | None = Field(ge=1, le=_MAX_EPOCHS)
    payload: PayloadEntry
    reference: ReferenceEntry | None = None
    """Older models have none."""
    members: list[MemberEntry] | None = Field(default=None, min_length=1, max_length=MAX_MEMBERS)
    """Only an ensemble has them."""
    card: AnyTable


@dataclass(frozen=True, repr=False)
class Model(Summarised):
    """A fitted head and its card: what was recorded with the head when it was saved.

    `reference` holds statistics of the embeddings that the head was trained on (see
    `evaluation.drift.reference`), or None if none were saved. `path` is the directory that the
    model was read from. `members` are the models of an ensemble, in the order of its weights.
    """

    head: "Head"
    card: Mapping[str, object]
    reference: dict[str, np.ndarray] | None = None
    path: Path | None = None
    members: tuple["Model", ...] = ()

    def summarise(self) -> Summary:
        """Return the kind of head, the columns that it reads, and the encoder behind them."""
        name = "" if self.path is None else f" {self.path.resolve().name}"
        encoder = self.card.get("encoder")
        source = encoder.get("source") if isinstance(encoder, Mapping) else None
        return Summary(
            f"Model{name}: {type(self.head).__name__}",
            {
                "reads": f"{self.card.get('pooling', 'unknown')}, "
                f"{counted(int(self.head.n_features_in_), 'column')}",
                "encoder": str(source or "not known"),
            },
        )


def save_model(
    directory: str | Path,
    head: "Head",
    card: Mapping[str, object],
    *,
    reference: Mapping[str, np.ndarray] | None = None,
    texts: Mapping[str, str] | None = None,
    members: Sequence[Path] = (),
    replace: bool = False,
) -> None:
    """Write a fitted head to `directory`, which appears whole or not at all.

    Parameters
    ----------
    directory : path
        Created by this call; its parent must exist.
    head : Head
        Fitted on labels 0 and 1; one of `known_heads`.
    card : dict
        Further JSON values to keep: spec, calibration, thresholds, scores, ….
    reference : mapping of str to ndarray, optional
        Statistics of the training embeddings.
    texts : mapping of str to str, optional
        `README.md`, for people: no program reads it.
    members : sequence of Path
        For an ensemble, the models of its members, which are copied.
    replace : bool
        Replace a model that exists at `directory`; otherwise an existing one is an error.

    Raises
    ------
    ModelError
        The head is unfitted, unknown or fitted on other labels, the card is not JSON, or something
        at `directory` may not be replaced.
    PathNotFoundError
        The parent of `directory` is missing.
    """
    target = Path(os.path.abspath(directory))
    _check_target(target, replace)
    name, data = _payload_of(head)
    files = {name: data, **_encode_texts(texts)}
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "head": _name_of(head),
        "params": _plain_params(head),
        "n_features": int(head.n_features_in_),
        "best_epoch": head.best_epoch_,
        "payload": describe_file(name, data),
        "reference": None,
        "card": dict(card),
    }
    if members:
        document["members"] = []
        for k, member in enumerate(members):
            copied = _read_files(member)
            files |= {f"{MEMBERS}/{k}/{own}": content for own, content in copied.items()}
            digest = hashlib.sha256(copied[MODEL_FILE]).hexdigest()
            document["members"].append({"directory": str(k), "sha256": digest})
    if reference is not None:
        files[REFERENCE_FILE] = pack_tensors(reference)
        document["reference"] = describe_file(REFERENCE_FILE, files[REFERENCE_FILE])
    _write_directory(target, {**files, MODEL_FILE: _document_bytes(document)})


def update_card(
    directory: str | Path, texts: Mapping[str, str] | None = None, **entries: Any
) -> None:
    """Replace entries of a saved model's card, and `README.md`; the payload stays.

    Each file is replaced atomically, `model.json` last.

    Raises
    ------
    PathNotFoundError
        There is no model.
    ModelError
        The model is not of this version, or the entries are not JSON.
    """
    path = Path(directory)
    document = read_document(path)
    card = {**document.card, **entries}
    described = _document_bytes(document.model_dump(exclude_unset=True) | {"card": card})
    for name, content in _encode_texts(texts).items():
        write_atomically(path / name, content)
    write_atomically(path / MODEL_FILE, described)


def load_model(directory: Model | str | os.PathLike[str]) -> Model:
    """Return the model that `save_model` wrote; its predictions are equal byte for byte.

    A `Model` is returned unchanged.

    Raises
    ------
    PathNotFoundError
        The directory does not exist or holds no `model.json`.
    ModelError
        The format or version is not supported, links or files are not part of a model, a payload or
        reference is missing or not the recorded one, no head has the parameters, or tensors or
        trees do not match them.
    """
    if isinstance(directory, Model):
        return directory
    path = as_path(directory, "a model", "a Model")
    document = read_document(path)
    members = tuple(_load_member(entry, path) for entry in document.members or ())
    try:
        head = _rebuild(document, path, members)
        reference = _read_reference(document.reference, path)
    except ModelError as error:
        raise ModelError(
            f"model at {path} cannot be used: {error}. Train or copy it again"
        ) from error
    return Model(head, document.card, reference, path, members)


def read_document(directory: str | Path) -> ModelDocument:
    """Return the content of `model.json`, without reading the payload.

    Raises
    ------
    PathNotFoundError
        The directory does not exist or holds no `model.json`.
    ModelError
        `model.json` is too large, not JSON, of an unsupported format or version, or has an entry
        that no model has; or the directory holds links or files that are not part of a model.
    """
    path = Path(directory)
    check_names(path)
    document = _read_card(path / MODEL_FILE)
    check_members(path, [entry.directory for entry in document.members or ()])
    return document


def _load_member(entry: MemberEntry, directory: Path) -> Model:
    path = directory / MEMBERS / entry.directory
    check_names(path)
    if hashlib.sha256(read_part(path / MODEL_FILE)).hexdigest() != entry.sha256:
        raise ModelError(
            f"model at {directory} cannot be used: its member {entry.directory} is another model "
            "than the one recorded. Train or copy it again"
        )
    return load_model(path)


def _read_files(directory: Path) -> dict[str, bytes]:
    """Return the files of a model, by name."""
    check_names(directory)
    names = (entry.name for entry in os.scandir(directory) if not entry.name.startswith("."))
    return {name: read_part(directory / name) for name in sorted(names)}


def _check_target(target: Path, replace: bool) -> None:
    if not target.parent.is_dir():
        raise PathNotFoundError(f"{target.parent} is not a directory; make it first")
    if not os.path.lexists(target):
        return
    if not replace:
        raise ModelError(f"{target} exists already; remove it or choose another place")
    if target.is_symlink() or not (target / MODEL_FILE).is_file():
        raise ModelError(f"{target} is not a model and is not replaced; choose another place")


def _is_ensemble(head: "Head") -> bool:
    """Return whether a head is an `EnsembleHead`, without importing scikit-learn for it."""
    return type(head).__name__ == "EnsembleHead"


def _name_of(head: "Head") -> str:
    if _is_ensemble(head):
        return ENSEMBLE
    kind, known = type(head), known_heads()
    for name, place in known.items():
        if place == f"{kind.__module__}:{kind.__qualname__}":
            return name
    raise ModelError(f"{kind.__qualname__} is not in the table of heads ({', '.join(known)})")


def _payload_of(head: "Head") -> tuple[str, bytes]:
    classes = getattr(head, "classes_", None)
    if classes is None or classes.tolist() != [0, 1]:
        held = "not fitted" if classes is None else f"fitted on the classes {classes.tolist()}"
        raise ModelError(f"{type(head).__name__} is {held}; a model is fitted on labels 0 and 1")
    payload = head._payload()
    if isinstance(payload, str):
        return TEXT_FILE, payload.encode()
    return TENSOR_FILE, pack_tensors(payload)


def _encode_texts(texts: Mapping[str, str] | None) -> dict[str, bytes]:
    unknown = sorted(set(texts or {}) - {README_FILE})
    if unknown:
        raise ModelError(f"a model keeps no file {unknown[0]!r}, only {README_FILE}")
    return {name: content.encode() for name, content in (texts or {}).items()}


def _document_bytes(document: Mapping[str, Any]) -> bytes:
    try:
        return json_bytes(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"the model's card or parameters are not JSON: {error}") from error


def _plain_params(head: "Head") -> dict[str, Any]:
    if _is_ensemble(head):
        return {}
    params = {k: own for k, own in head.get_params().items() if k not in head.data_params}
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
    """Write to a temporary directory, sync, rename; an old model is moved aside, then removed."""
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    old = made.with_suffix(".old.partial")
    try:
        made.chmod(0o755)
        for name, data in files.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
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


def _read_card(path: Path) -> ModelDocument:
    try:
        document = parse_json(read_part(path))
    except ModelError as error:
        raise ModelError(f"{path} {str(error).removeprefix(path.name).lstrip()}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ModelError(f"{path} is not a {FORMAT}")
    if document.get("version") != VERSION:
        raise ModelError(
            f"{path} is version {document.get('version')!r} of {FORMAT}; this medembed reads "
            f"{VERSION}. Use the medembed that wrote it, or train again"
        )
    return parse(ModelDocument, document, ModelError, path, "Train or copy the model again.")


def _rebuild(document: ModelDocument, directory: Path, members: Sequence[Model]) -> "Head":
    payload = read_described(document.payload, directory)
    if bool(members) != (document.head == ENSEMBLE):
        raise ModelError(f"a model of {document.head!r} has {len(members)} members")
    try:
        head: Head
        if members:
            from medembed.heads.ensemble import EnsembleHead  # scikit-learn

            head = EnsembleHead(members=[member.head for member in members])
        else:
            head = make_head(document.head, _given_params(document.params))
        head._restore(payload, document.n_features)
    except ModelError:
        raise
    except (MedembedError, TypeError, ValueError) as error:
        raise ModelError(f"its parameters do not make a head: {error}") from error
    head.classes_ = np.array([0, 1])
    head.n_features_in_ = document.n_features
    head.best_epoch_ = document.best_epoch
    return head


def _read_reference(entry: ReferenceEntry | None, directory: Path) -> dict[str, np.ndarray] | None:
    if entry is None:
        return None
    arrays = read_described(entry, directory)
    assert isinstance(arrays, dict)
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise ModelError(f"tensor {name} in {REFERENCE_FILE} holds values that are not finite")
    return arrays
