"""Check within seconds whether an extraction will run: device, memory, disk, token, access."""

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from shutil import which
from typing import Any

from medembed.core.errors import MedembedError
from medembed.core.locations import BucketPath, as_location
from medembed.core.object_store import require_conditions
from medembed.core.poolings import (
    DEFAULT_POOLINGS,
    expand_blocks,
    find_pooling,
    list_blocks,
    list_names,
    refuse_unknown,
)
from medembed.core.system import count_cores, free_bytes
from medembed.core.text import one_line
from medembed.encoders.base_ref import base_of
from medembed.encoders.checkpoint_files import name_kind
from medembed.encoders.hub import RemoteCheckpoint, describe_remote, has_token

__all__ = ["Check", "examine", "lines"]

PYTHON = (3, 11)
MURA_IMAGES = 40_005  # 36,808 of train and 3,197 of valid
MEDGEMMA_COLUMNS, MEDGEMMA_BLOCKS = 1152, 27
BYTES = {"fp32": 4, "bf16": 2}
STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes
    ----------
    name : str
        What was checked.
    ok : bool
        Whether an extraction can run.
    detail : str
        What was found.
    remedy : str
        What to do if the check failed; else empty.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the check as JSON-able values."""
        return asdict(self)


def examine(
    ref: str | os.PathLike[str] | None = None,
    *,
    manifest: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    poolings: Sequence[str] = DEFAULT_POOLINGS,
    dtype: str = "float16",
) -> list[Check]:
    """Return checks of everything that an extraction needs; no weights are downloaded.

    Parameters
    ----------
    ref : str, optional
        The encoder, a reference that `extract` accepts. By default only the machine is checked.
    manifest : path, optional
        A manifest whose distinct images are counted; by default the disk space is estimated for as
        many images as MURA has.
    cache : path, optional
        Where the cache will be, by default in the working directory.
    poolings, dtype
        The arguments that `extract` will get.

    Raises
    ------
    ManifestError, PathNotFoundError
        The manifest cannot be read.
    EncoderError
        No encoder has such a pooling.
    CacheError
        The dtype is unknown.
    """
    from medembed.encoders.loading import choose_device, choose_precision

    refuse_unknown(poolings)
    n_images = _count_images(manifest)
    device = choose_device("auto")
    precision = choose_precision("auto", device)
    found, access = _ask(ref)
    checks = [
        *_check_versions(),
        _check_codecs(),
        _check_device(device),
        *_check_compiler(device),
        Check("precision", True, _why_precision(device, precision)),
        _check_token(found, access),
    ]
    if access:
        checks.append(access)
    if found:
        checks.append(_check_memory(found, device, precision))
        checks += _check_fetch(found)
    columns = found.config if found else {}
    place = as_location(cache or "cache", "a cache")
    if isinstance(place, BucketPath):
        return [*checks, _check_bucket(place)]
    return [*checks, _check_cache_disk(columns, n_images, place, poolings, dtype)]


def lines(checks: Sequence[Check]) -> Iterator[str]:
    """Yield a line per check, and below a failed one what to do."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        yield f"{'ok' if check.ok else 'NO':<3} {check.name:<{width}}  {check.detail}"
        if not check.ok:
            yield f"{'':<{width + 5}} -> {check.remedy}"


def _count_images(manifest: str | os.PathLike[str] | None) -> int | None:
    if manifest is None:
        return None
    from medembed.dataset.manifest import read_manifest

    digests = read_manifest(Path(manifest)).rows["sha256"]
    known = digests[digests != ""]  # a --structure-only manifest has no digests: each row counts
    return int(known.nunique()) + len(digests) - len(known)


def _ask(ref: str | os.PathLike[str] | None) -> tuple[RemoteCheckpoint | None, Check | None]:
    if ref is None:
        return None, None
    try:
        found = describe_remote(base_of(ref))
    except MedembedError as error:
        return None, Check("encoder", False, f"{ref} is not available", str(error))
    at = f"@{found.revision[:12]}" if found.revision else ""
    state = "on this machine" if found.fetched else "to be downloaded"
    size = "" if found.tower_bytes is None else f", {_shown(found.tower_bytes)}"
    kind = name_kind(found.config)
    if not found.fetched and found.tower_bytes is None:
        return found, Check(
            "encoder",
            False,
            f"{found.source}{at} ({kind}) is not on this machine, and the hub is out of reach",
            "Run this again, and then `medembed extract`, with a connection.",
        )
    return found, Check("encoder", True, f"{found.source}{at} ({kind}), {state}{size}")


def _check_versions() -> Iterator[Check]:
    from packaging.requirements import Requirement

    python = ".".join(map(str, sys.version_info[:3]))
    wanted = ".".join(map(str, PYTHON))
    yield Check(
        "python",
        sys.version_info >= PYTHON,
        python,
        "" if sys.version_info >= PYTHON else f"medembed needs {wanted} or newer.",
    )
    found, bad = [], []
    for text in _wishes():
        wish = Requirement(text)
        if wish.marker and not wish.marker.evaluate({"extra": "encoders"}):
            continue
        try:
            version = metadata.version(wish.name)
        except metadata.PackageNotFoundError:
            bad.append(f"{wish.name} is missing, {wish.specifier} is needed")
            continue
        if not wish.specifier.contains(version, prereleases=True):
            bad.append(f"{wish.name} is {version}, {wish.specifier} is needed")
        if wish.name in ("torch", "transformers", "huggingface_hub", "h5py"):
            found.append(f"{wish.name} {version}")
    detail = "; ".join(bad) or ", ".join(found) or "run from a checkout, so their releases are open"
    remedy = "Install medembed again: pip install 'medembed[encoders]'." if bad else ""
    yield Check("libraries", not bad, detail, remedy)


def _wishes() -> Sequence[str]:
    """Return the requirements of the installed package; none if it runs from a checkout."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.requires("medembed") or ()
    return ()


def _check_codecs() -> Check:
    """List the codecs for compressed DICOM; RLE, 8-bit JPEG and JPEG 2000 need no extra."""
    from medembed.images.dicom.codecs import list_codecs

    codecs = list_codecs()
    there = ", ".join(codec.name for codec in codecs if codec.plugin)
    missing = [codec for codec in codecs if not codec.plugin]
    if not missing:
        return Check("dicom", True, f"uncompressed, {there}")
    names = ", ".join(codec.name for codec in missing)
    detail = f"uncompressed, {there}; not {names}, which only DICOM files use"
    return Check("dicom", True, f"{detail}: pip install 'medembed[dicom]'")


def _check_gpu() -> Check:
    """Run one kernel: an installed driver may still not run the installed torch."""
    import torch

    name = f"{torch.cuda.get_device_name()}, {torch.cuda.device_count()} in all"
    try:
        ones = torch.ones(64, 64, device="cuda")
        works = float((ones @ ones).sum()) == 64.0**3
    except RuntimeError as error:
        works, reason = False, one_line(error, 200)
    else:
        reason = "the product of matrices of ones is wrong"
    if not works:
        remedy = (
            f"Install a torch that is built for this card and driver (this one is "
            f"{torch.__version__}, for {', '.join(torch.cuda.get_arch_list())}), or use "
            "--device cpu."
        )
        return Check("device", False, f"cuda: {name}, but no kernel runs: {reason}", remedy)
    return Check("device", True, f"cuda: {name}; a kernel runs")


def _check_compiler(device: str) -> Iterator[Check]:
    """Look for the C compiler that torch.compile needs to launch its kernels."""
    if device != "cuda":
        return
    found = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and which(c)), None)
    detail = f"{found}: towers can be compiled" if found else "none: towers run uncompiled"
    how = "" if found else ", 15 to 25 % slower on long runs. Install gcc for that"
    yield Check("compiler", True, detail + how)


def _check_device(device: str) -> Check:

    from medembed.encoders.devices import why_no_gpu

    if device == "cuda":
        return _check_gpu()
    if device == "mps":
        return Check("device", True, "mps: Apple's GPU")
    found = why_no_gpu()
    if found is not None:
        reason, remedy = found
        return Check("device", False, f"cpu, though there is an NVIDIA driver: {reason}", remedy)
    cores = count_cores()
    return Check(
        "device", True, f"cpu, {cores} cores: fine for heads and small encoders, slow here"
    )


def _why_precision(device: str, precision: str) -> str:
    if precision == "bf16":
        return "bf16, which this GPU has in hardware; poolings in fp32"
    if device == "cuda":
        return "fp32, since this GPU has no bf16 in hardware"
    return f"fp32, as always on {device}"


def _check_token(found: RemoteCheckpoint | None, access: Check | None) -> Check:
    if has_token():
        return Check("token", True, "set")
    if access and not access.ok:
        remedy = "If the encoder is gated or private, set HF_TOKEN or use the hub's login."
        return Check("token", False, "none is set", remedy)
    why = "and none was needed" if found else "and only gated encoders need one"
    return Check("token", True, f"none is set, {why}")


def _check_memory(found: RemoteCheckpoint, device: str, precision: str) -> Check:
    """Compare the free memory with weights, the canary's fp32 tower, and one image's values.

    One image takes n tokens × (MLP width + 8 × hidden width) values: the widest product beside
    the residual stream, its norm, queries, keys, values and what the allocator keeps.
    """
    needed, free = _needed_bytes(found, precision), _free_memory(device)
    if needed is None or free is None:
        return Check("memory", True, "not known beforehand for this encoder or device")
    detail = f"{_shown(free)} free on {device}, about {_shown(needed)} needed for batches of one"
    remedy = "Close other programs, or use a smaller encoder or a device with more memory."
    return Check("memory", free >= needed, detail, "" if free >= needed else remedy)


def _needed_bytes(found: RemoteCheckpoint, precision: str) -> int | None:
    vision = found.config.get("vision_config", found.config)
    if found.tower_bytes is None or not isinstance(vision, Mapping):
        return None
    stored = found.config.get("dtype", found.config.get("torch_dtype", "float32"))
    n_weights = found.tower_bytes // STORED_BYTES.get(str(stored), 4)
    towers = n_weights * (BYTES[precision] + (4 if precision != "fp32" else 0))
    sizes = [
        vision.get(k) for k in ("image_size", "patch_size", "hidden_size", "intermediate_size")
    ]
    if not all(type(size) is int and size > 0 for size in sizes):
        return towers
    side, patch, hidden, mlp = (int(size) for size in sizes if size)
    return towers + (side // patch) ** 2 * (mlp + 8 * hidden) * BYTES["fp32"]


def _free_memory(device: str) -> int | None:
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _check_fetch(found: RemoteCheckpoint) -> Iterator[Check]:
    if found.fetched or found.tower_bytes is None:
        return
    from huggingface_hub import constants

    free = free_bytes(Path(constants.HF_HUB_CACHE))
    ok = free > found.tower_bytes
    detail = f"{_shown(free)} free in the hub's cache for {_shown(found.tower_bytes)} to download"
    yield Check(
        "disk (hub)", ok, detail, "" if ok else "Free some space, or set HF_HOME to another disk."
    )


def _check_bucket(place: BucketPath) -> Check:
    """Return whether rows can be written to a bucket, and by many workers at once."""
    try:
        require_conditions(place)
    except MedembedError as error:
        return Check("bucket (cache)", False, str(error), "Mend that, or choose another --cache.")
    detail = f"{place} takes objects, and only where their names are free"
    return Check("bucket (cache)", True, detail, "")


def _check_cache_disk(
    config: Mapping[str, Any],
    n_images: int | None,
    path: Path,
    poolings: Sequence[str],
    dtype: str,
) -> Check:
    from medembed.cache.spec import CacheSpec
    from medembed.extraction.job import ROOM

    poolings = expand_blocks(poolings, list_blocks(_count_blocks(config)))
    rows = CacheSpec("", {}, {name: (_columns(config, name),) for name in poolings}, dtype)
    needed = int(ROOM * rows.row_bytes() * (n_images or MURA_IMAGES))  # as extract requires
    free = free_bytes(path)
    count = f"{n_images:,} images" if n_images is not None else f"{MURA_IMAGES:,} images (MURA's)"
    detail = (
        f"{_shown(free)} free for the cache, {_shown(needed)} for {list_names(poolings)} of {count}"
    )
    remedy = "Free some space, choose a --cache on another disk, or store fewer poolings."
    return Check("disk (cache)", free > needed, detail, "" if free > needed else remedy)


def _count_blocks(config: Mapping[str, Any]) -> int:
    """Return the number of an encoder's blocks from its config, or MedGemma's by default."""
    tower = config.get("vision_config", config)
    found = tower.get("num_hidden_layers") if isinstance(tower, Mapping) else None
    return found if type(found) is int and 0 < found < 1000 else MEDGEMMA_BLOCKS


def _columns(config: Mapping[str, Any], pooling: str) -> int:
    """Return the columns of a pooling from an encoder's config, or MedGemma's by default."""
    entry = find_pooling(pooling)
    part = "text_config" if entry.needs_language_model else "vision_config"
    tower = config.get(part, config)
    width = tower.get("hidden_size") if isinstance(tower, Mapping) else None
    if width is None and isinstance(config.get("hidden_sizes"), list):
        width = config["hidden_sizes"][-1]
    columns = width if type(width) is int else MEDGEMMA_COLUMNS
    return math.prod(entry.shape(columns))


def _shown(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"
