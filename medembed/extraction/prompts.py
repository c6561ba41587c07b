"""Embed a file of prompts with the text tower of an encoder's checkpoint."""

import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medembed.core.errors import EncoderError, PathNotFoundError, RecipeError
from medembed.core.files import describe_error, read_plain
from medembed.core.prompts import LABELS, PromptEntry, Prompts, PromptsDocument, write_prompts
from medembed.core.text import one_line
from medembed.dataset.manifest import Manifest, read_manifest

__all__ = ["embed_prompts", "read_prompt_file"]

_MAX_BYTES = 1 << 20
_MAX_PROMPTS = 10_000
_REGION = "{region}"
_ONLY = "prompts"
"""The name of a file's only set, where it has no tables."""


def embed_prompts(
    path: str | os.PathLike[str],
    encoder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    manifest: Manifest | str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prompts:
    """Write the vectors of a file's prompts, and return them.

    Parameters
    ----------
    path : path
        TOML, see `read_prompt_file`.
    encoder : str or path
        The checkpoint whose image tower the cache is of: MedSigLIP's, SigLIP's or CLIP's.
    out : path
        The file to write, see `core.prompts`.
    manifest : Manifest or path, optional
        Its regions are put in the place of ``{region}``.
    progress : callable, optional
        Called as progress(done, total) with bytes, while weights are downloaded.

    Raises
    ------
    RecipeError
        The file is not one of prompts, or names regions and there is no manifest.
    EncoderError
        The checkpoint has no text tower beside an image tower that pools, or cannot be loaded; or
        a prompt is longer than the tower reads.
    MissingLibraryError
        A library of the extra `encoders` is not installed.
    """
    sets = read_prompt_file(path)
    regions: list[str] = []
    if manifest is not None:
        regions = sorted({str(own) for own in read_manifest(manifest).rows["region"]})
    entries = list(_fill(sets, regions, path))
    from medembed.encoders.loading import load_encoder
    from medembed.encoders.text_tower import load_text_tower

    tower = load_text_tower(encoder, progress=progress)
    images = load_encoder(encoder, device="cpu", precision="fp32", poolings=(), progress=progress)
    text = tower.embed([entry.text for entry in entries])
    width = text.shape[1] if tower.image_projection is None else tower.image_projection.shape[1]
    shape = images.dimensions.get("pooler")
    if shape != (width,):
        raise EncoderError(
            f"the image tower of {tower.source} offers {'no' if shape is None else shape} pooling "
            f"pooler, and its text tower needs one of {width} columns."
        )
    document = PromptsDocument(
        encoder=images.fingerprint,
        text_encoder=tower.fingerprint,
        source=tower.source,
        revision=tower.revision,
        logit_scale=tower.logit_scale,
        logit_bias=tower.logit_bias,
        prompts=entries,
    )
    prompts = Prompts(document, text, tower.image_projection)
    write_prompts(out, prompts)
    return prompts


def read_prompt_file(path: str | os.PathLike[str]) -> dict[str, dict[str, list[str]]]:
    """Return the prompts of a TOML file: by set, then by label.

    A file has two lists, ``normal`` and ``abnormal``, or several tables with two lists each, of
    which a sweep chooses one on training patients.

    Raises
    ------
    PathNotFoundError
        There is no such file.
    RecipeError
        It is not TOML, or has no prompts of each class.
    """
    try:
        document = tomllib.loads(read_plain(Path(path), max_bytes=_MAX_BYTES).decode("utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise PathNotFoundError(f"there is no file {os.fspath(path)} with prompts.") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = describe_error(error) if isinstance(error, OSError) else one_line(error, 200)
        raise RecipeError(f"{os.fspath(path)} cannot be read as TOML: {reason}.") from error
    is_flat = any(label in document for label in LABELS)
    tables = {_ONLY: document} if is_flat else document
    if not tables:
        raise RecipeError(f"{os.fspath(path)} holds no prompts. {_FORM}")
    return {name: _read_set(table, name, path) for name, table in tables.items()}


_FORM = 'Write normal = ["…"] and abnormal = ["…"], or tables with these two lists.'


def _read_set(table: Any, name: str, path: str | os.PathLike[str]) -> dict[str, list[str]]:
    where = f"{os.fspath(path)}, [{one_line(name, 40)}]"
    if not isinstance(table, dict) or set(table) != set(LABELS):
        held = sorted(set(table) - set(LABELS)) if isinstance(table, dict) else []
        what = f" has an unknown key {held[0]!r}." if held else " has not both classes."
        raise RecipeError(f"{where}{what} {_FORM}")
    for label, texts in table.items():
        given = [texts] if isinstance(texts, str) else texts
        if not isinstance(given, list) or not given:
            raise RecipeError(f"{where}: {label} is not a list of prompts. {_FORM}")
        if not all(isinstance(text, str) and text.strip() for text in given):
            raise RecipeError(f"{where}: {label} holds an empty prompt, or one that is no text.")
        table[label] = list(dict.fromkeys(given))
    return dict(table)


def _fill(
    sets: Mapping[str, Mapping[str, Sequence[str]]],
    regions: Sequence[str],
    path: str | os.PathLike[str],
) -> list[PromptEntry]:
    """Return a sentence per prompt, or per prompt and region where the prompt names one."""
    entries = []
    for name, own in sets.items():
        for label in LABELS:
            for text in own[label]:
                if _REGION not in text:
                    entries.append(PromptEntry(set=name, label=label, region=None, text=text))
                    continue
                if not regions:
                    raise RecipeError(
                        f"{os.fspath(path)}: the prompt {one_line(text, 60)!r} names a region. "
                        "Give --manifest M, whose regions are filled in."
                    )
                for region in regions:
                    filled = text.replace(_REGION, region.lower())
                    entries.append(PromptEntry(set=name, label=label, region=region, text=filled))
    if len(entries) > _MAX_PROMPTS:
        raise RecipeError(
            f"{os.fspath(path)} makes {len(entries):,} sentences; at most {_MAX_PROMPTS:,} are "
            "embedded. Give fewer prompts."
        )
    return entries
