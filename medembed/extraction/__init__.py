"""Stage 1: embed the images of a manifest into the rows of a cache, each content once.

Names are resolved on first use, so that the decoder processes, which also run modules of this
package, start without the cache's and the encoder's libraries.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medembed.extraction.job import COMMIT_SECONDS, extract, spec_of
    from medembed.extraction.report import ExtractionReport

__all__ = ["COMMIT_SECONDS", "ExtractionReport", "extract", "spec_of"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from medembed.extraction import job

    return getattr(job, name)
