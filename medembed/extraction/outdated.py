"""Caches of an older `images_version`: what may join their rows, and which of these are outdated.

New rows join where `Radiograph.since` says that the older version gave the same pixels. Rows that
are there already are compared with their files, where these are at hand: most by their first bytes
alone, since an 8-bit grey PNG or a JPEG is decoded as ever; the others are decoded again.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from medembed.cache.pending import Plan
from medembed.cache.store import Cache
from medembed.core.errors import SpecMismatchError
from medembed.core.files import open_plain
from medembed.core.system import default_decoders
from medembed.dataset.manifest import image_path
from medembed.encoders.preprocessing import Preprocessing
from medembed.extraction.decode_pool import Decoders
from medembed.images.intensity import Intensity
from medembed.images.load import Content, Reading
from medembed.images.versions import IMAGES_VERSION, may_have_changed, why_changed

__all__ = ["joining", "refuse_outdated"]

HEAD = 2048  # bytes: the header of nearly every PNG and JPEG
N_NAMED = 20
# As small as can be: the images are decoded for what is said of them.
_SMALL = Preprocessing(8, 8, "stretch", "nearest", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255)


def joining(
    pairs: Iterator[tuple[Content, Reading] | None], cache: Cache
) -> Iterator[tuple[Content, Reading] | None]:
    """Fail the readings whose pixels cannot join the rows of this cache, with the way out."""
    for pair in pairs:
        if pair is None:
            yield None
        else:
            content, reading = pair
            yield content, reading.joining(cache.spec.images_version, "this cache", _WAY_OUT)


_WAY_OUT = "Extract into a new --cache"


def refuse_outdated(
    plan: Plan,
    cache: Cache | None,
    image_root: Path,
    intensity: Intensity,
    n_decoders: int | None,
    tell: Callable[[str], None],
) -> None:
    """Name the rows of a cache that are of another `images_version` than their files are now.

    What is not at hand, or holds other bytes by now, is passed over.

    Raises
    ------
    SpecMismatchError
        There are such rows.
    """
    if cache is None or cache.spec.images_version == IMAGES_VERSION:
        return
    found = []
    for content, reading in _decoded_again(plan, image_root, intensity, n_decoders, tell):
        reason = why_changed(reading.since, cache.spec.images_version, "its row")
        if reason and reading.stage:
            reason = f"is refused since images_version {reading.since} ({reading.reason})"
        if reason:
            found.append(f"{content.images[0]}: {reason}")
    if found:
        more = [f"and {len(found) - N_NAMED} more"] if len(found) > N_NAMED else []
        named = "".join(f"\n  - {line}" for line in [*found[:N_NAMED], *more])
        raise SpecMismatchError(
            f"{len(found)} row(s) of the cache at {cache.path} are not what their images are now; "
            "all others are, and those that were missing have been embedded. Extract into a new "
            f"--cache, or leave these images out of the manifest:{named}"
        )


def _decoded_again(
    plan: Plan,
    image_root: Path,
    intensity: Intensity,
    n_decoders: int | None,
    tell: Callable[[str], None],
) -> Iterator[tuple[Content, Reading]]:
    suspects = [content for content in plan.done if _is_suspect(content, image_root)]
    if not suspects:
        return
    tell(f"Decoding {len(suspects):,} images of an older version again")
    n_processes = min(n_decoders or default_decoders(), len(suspects))
    with Decoders(n_processes, _SMALL, intensity) as readers:
        for pair in readers.read(suspects, image_root, 8 * n_processes):
            if pair is not None:
                yield pair


def _is_suspect(content: Content, image_root: Path) -> bool:
    for image in content.images:
        try:
            with open_plain(image_path(image_root, image)) as file:
                head = file.read(HEAD)
                size = file.seek(0, 2)
        except OSError:
            continue
        return may_have_changed(head, size)
    return False
