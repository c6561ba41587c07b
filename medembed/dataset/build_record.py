"""The build file as a machine without pydantic reads it: where it is, and which commit was read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from medembed.core.errors import MedembedError
from medembed.core.files import read_plain
from medembed.dataset.manifest import Manifest
from medembed.images.hub_dataset import HubRoot, pin_commit

__all__ = ["FORMAT", "VERSION", "build_path", "follow_build", "read_document"]

FORMAT, VERSION = "medembed-build", 1
MAX_BYTES = 1 << 20  # of a build file; a usual one has 2 KB
Root = TypeVar("Root")


def build_path(manifest_path: str | Path) -> Path:
    """Return the path of a manifest's build file."""
    return Path(manifest_path).with_suffix(".build.json")


def read_document(manifest_path: object, manifest: Manifest) -> dict[str, Any] | None:
    """Return the content of a manifest's build file, or None if it has none that is its own."""
    if not isinstance(manifest_path, str | Path):
        return None
    try:
        document = json.loads(read_plain(build_path(manifest_path), max_bytes=MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return None
    if document.get("version") != VERSION or document.get("manifest") != manifest.digest():
        return None
    return document


def follow_build(
    root: Root,
    manifest_path: object,
    manifest: Manifest,
    on_notice: Callable[[str], None] = lambda words: None,
) -> Root | HubRoot:
    """Return an image root at the commit that the manifest was built from, if it is recorded.

    Parameters
    ----------
    root : Path, BucketPath, TarRoot or HubRoot
        Only a dataset of the hub is changed, and only if it names no commit, and no other revision
        than the manifest was built from.
    manifest_path : path or other
        The manifest's file; anything else has no record.
    manifest : Manifest
    on_notice : callable, optional
        Called with a sentence if the branch or tag that was read then has moved since, or another
        commit is read.
    """
    if not isinstance(root, HubRoot):
        return root
    stream = (read_document(manifest_path, manifest) or {}).get("stream")
    if not isinstance(stream, dict) or stream.get("dataset") != root.dataset:
        return root
    recorded = replace(root, revision=str(stream.get("commit")))
    if not recorded.is_pinned:
        return root
    if root.is_pinned:
        if root != recorded:
            on_notice(
                f"{root} is read; the manifest was built from commit {recorded.revision[:12]}."
            )
        return root
    named = str(stream.get("revision") or "")
    is_same = root.revision in ("", named or "main")
    asked = root if root.revision else replace(root, revision=named)
    try:
        current = pin_commit(asked)
    except MedembedError:  # the branch is gone, or the hub: who reads the commit says so
        return recorded if is_same else root
    if current == recorded:
        return recorded
    if not is_same:
        on_notice(
            f"{root} is read, commit {current.revision[:12]}; the manifest was built from commit "
            f"{recorded.revision[:12]}."
        )
        return current
    on_notice(
        f"{asked} has moved to commit {current.revision[:12]} since the manifest was built from "
        f"{recorded.revision[:12]}, which is read."
    )
    return recorded
