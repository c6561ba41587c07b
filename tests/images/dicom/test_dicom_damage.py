"""Damaged DICOM and other images run through `extract`: embedded whole, or listed as failed."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_dicom import DEEP, RAMP, dicom, read, relabelled
from made_extraction import HalvesEncoder
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medembed.cache.embeddings import load_embeddings
from medembed.cache.store import open_cache
from medembed.core.errors import ImageError
from medembed.dataset.manifest import Manifest, write_manifest
from medembed.encoders.preprocessing import prepare
from medembed.images.decode import decode_image

HELPERS = Path(__file__).parents[2] / "helpers"
N_FILES = 300
MEMORY = 2_000_000_000
WINDOW = {"BitsStored": 12, "WindowCenter": 2048, "WindowWidth": 4096}
SYNTAXES = (
    *(ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian),
    *(DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless),
    *(JPEGLosslessSV1, JPEGBaseline8Bit),
)
TAGS = (
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("SamplesPerPixel", "PhotometricInterpretation", "WindowCenter", "PixelData", "SOPClassUID"),
)
ABSURD = (
    *({"Rows": 65535, "Columns": 65535}, {"Rows": 9000, "Columns": 8800}, {"Rows": 0}),
    *({"NumberOfFrames": 10**6}, {"BitsStored": 99}, {"BitsAllocated": 64}, {"SamplesPerPixel": 9}),
    *({"Columns": 57}, {"Rows": 80}, {"WindowWidth": "1e300"}, {"PixelRepresentation": 7}),
)

EXTRACT = """
import json, pathlib, resource, sys
sys.path.insert(0, sys.argv[1])
from made_extraction import HalvesEncoder
from medembed.dataset.manifest import read_manifest
from medembed.extraction import extract
manifest, root, cache = sys.argv[2:]
report = extract(read_manifest(manifest), root, HalvesEncoder(), cache, dtype="float32")
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss keeps the starter's own peak
own = int(status.partition("VmHWM:")[2].split()[0])
peak = max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
print(json.dumps({**report.as_dict(), "peak": peak * 1024}))
"""


def sound_files() -> list[bytes]:
    """Make a file of every transfer syntax, and one of every other kind."""
    sound = [
        dicom(RAMP if syntax == JPEGBaseline8Bit else DEEP, syntax,
              **({} if syntax == JPEGBaseline8Bit else WINDOW))
        for syntax in SYNTAXES
    ]  # fmt: skip
    for pixels, kind in [(RAMP, "PNG"), (RAMP, "JPEG"), (RAMP, "TIFF"), (DEEP << 4, "PNG")]:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        sound.append(file.getvalue())
    return sound


def flip(data: bytes, random: np.random.Generator) -> bytes:
    """Flip one to eight bits, most often in the header."""
    mutable = bytearray(data)
    end = len(data) if random.random() < 0.5 else min(900, len(data))
    for place in random.integers(0, end, random.integers(1, 9)):
        mutable[place] ^= 1 << int(random.integers(8))
    return bytes(mutable)


def truncate(data: bytes, random: np.random.Generator) -> bytes:
    return data[: int(random.integers(1, len(data)))]


def drop_tag(data: bytes, random: np.random.Generator) -> bytes:
    return saved(data, {TAGS[random.integers(len(TAGS))]: None})


def make_absurd(data: bytes, random: np.random.Generator) -> bytes:
    return saved(data, ABSURD[random.integers(len(ABSURD))])


def relabel(data: bytes, random: np.random.Generator) -> bytes:
    """Name another transfer syntax than the data are in."""
    own = read(data).file_meta.TransferSyntaxUID
    others = [syntax for syntax in SYNTAXES if syntax != own]
    return relabelled(data, others[random.integers(len(others))])


def saved(data: bytes, elements: dict[str, Any]) -> bytes:
    made = read(data)
    for keyword, value in elements.items():
        if value is None and keyword in made:
            del made[keyword]
        elif value is not None:
            setattr(made, keyword, value)
    file = io.BytesIO()
    made.save_as(file)
    return file.getvalue()


def mutated() -> list[tuple[str, bytes, bytes]]:
    """Draw `N_FILES` different damaged files: the kind of damage, the file, what it was."""
    random = np.random.default_rng(8)
    kinds = (flip, flip, truncate, drop_tag, make_absurd, relabel)
    sound = sound_files()
    drawn: dict[bytes, tuple[str, bytes, bytes]] = {}
    while len(drawn) < N_FILES:
        whole = sound[random.integers(len(sound))]
        damage = kinds[random.integers(len(kinds))]
        if damage in (flip, truncate) or whole[128:132] == b"DICM":
            damaged = damage(whole, random)
            if damaged != whole:
                drawn[damaged] = (damage.__name__, damaged, whole)
    return list(drawn.values())


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of what it is made to write
def test_300_damaged_files_are_embedded_whole_or_listed(tmp_path: Path) -> None:
    files = mutated()
    root = tmp_path / "images"
    root.mkdir()
    for number, (_, damaged, _) in enumerate(files):
        (root / f"{number:03d}").write_bytes(damaged)
    rows = pd.DataFrame({"image": [f"{number:03d}" for number in range(N_FILES)]})
    rows["sha256"] = [hashlib.sha256(damaged).hexdigest() for _, damaged, _ in files]
    rows["patient"] = rows["study"] = rows["image"]
    rows["region"], rows["split"] = "hand", "train"
    rows["label"] = pd.array([0] * N_FILES, dtype="Int8")
    manifest = Manifest(rows, "study")
    write_manifest(manifest, tmp_path / "manifest.csv")
    done = subprocess.run(
        [sys.executable, "-c", EXTRACT, str(HELPERS)]
        + [str(tmp_path / name) for name in ("manifest.csv", "images", "cache")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["peak"] < MEMORY
    assert report["embedded"] + report["failed"] == N_FILES
    assert report["failed"] > N_FILES / 2
    failures = open_cache(tmp_path / "cache").failures()
    assert len(failures) == report["failed"]
    assert {failure["stage"] for failure in report["failures"]} == {"decode"}
    assert not [f for f in report["failures"] if "process died" in f["reason"]]
    loaded = load_embeddings(tmp_path / "cache", manifest)
    assert len(loaded) == report["embedded"]
    check_embedded(files, dict(zip(loaded.rows["image"].astype(int), loaded.X, strict=True)))


def check_embedded(files: list[tuple[str, bytes, bytes]], embedded: dict[int, np.ndarray]) -> None:
    """Hold every row to the file's pixels, and where no pixel may have changed, to the original."""
    for number, row in embedded.items():
        damage, damaged, whole = files[number]
        pixels = decode_image(damaged).pixels
        assert np.array_equal(row, by_hand(pixels)), (number, damage)
        if damage in ("truncate", "relabel", "make_absurd"):
            assert np.array_equal(pixels, decode_image(whole).pixels), (number, damage)
    for number, (_, damaged, _) in enumerate(files):
        if number not in embedded:
            with pytest.raises(ImageError):
                decode_image(damaged)


def by_hand(pixels: np.ndarray) -> np.ndarray:
    small = prepare(pixels, HalvesEncoder().preprocessing)[None]
    pooled = HalvesEncoder().encode(small, ("mean", "max"))
    return np.concatenate([pooled["mean"][0], pooled["max"][0]])
