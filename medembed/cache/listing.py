"""Which files of a cache are its shards."""

from pathlib import Path

from medembed.cache import shards

__all__ = ["committed_shards"]


def committed_shards(directory: Path) -> list[Path]:
    """List the committed shards of `shards/`, sorted by name."""
    return sorted(path for path in directory.glob("*.h5") if shards.is_shard_name(path.name))
