"""Work is bounded before it is begun: bytes, scans, strips, elements, processes, numbers, disks."""

import errno
import io
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from made_dicom import DEEP, dicom, read
from made_extraction import HalvesEncoder, write_images
from made_sweeps import make_data
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core import system
from medembed.core.errors import EncoderError, ImageError, MedembedError, TrainingDataError
from medembed.core.files import append_synced, read_plain, write_atomically
from medembed.core.system import PER_CORE, choose_processes, count_cores, total_memory
from medembed.extraction import extract
from medembed.images import container_checks
from medembed.images.decode import decode_image
from medembed.images.dicom import file as dicom_file
from medembed.images.load import DEFAULT_LIMITS, Limits, read_content
from medembed.prediction import encode
from medembed.sweeps import sweep
from medembed.sweeps.processes import choose_jobs
from medembed.sweeps.worker_pool import Pool

# --- bytes of a file ---


def test_a_file_of_too_many_bytes_fails_and_is_read_once_more_are_allowed(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 3)
    size = max((tmp_path / "images" / name).stat().st_size for name in manifest.rows["image"])
    given = (manifest, tmp_path / "images", HalvesEncoder(), tmp_path / "cache")
    report = extract(*given, limits=Limits(max_bytes=size - 1))
    assert 0 < report.failed <= 3
    for failure in report.failures:
        assert failure["stage"] == "read"
        assert re.search(r"has [0-9,]+ bytes; at most [0-9,]+ are read.*--max", failure["reason"])
    report = extract(*given, limits=Limits(max_bytes=size))
    assert (report.failed, len(open_cache(tmp_path / "cache").keys())) == (0, 3)


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    os.truncate(tmp_path / "x", 2**40)
    found = read_content([tmp_path / "x"], "ab" * 32, lambda pixels: pixels)
    assert found.stage == "read"
    assert "1,099,511,627,776 bytes" in found.reason
    with pytest.raises(OSError, match="bytes; at most") as caught:
        read_plain(tmp_path / "x", max_bytes=DEFAULT_LIMITS.max_bytes)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize(
    "values", [{"max_bytes": 0}, {"max_seconds": float("nan")}, {"max_seconds": 1e300}]
)
def test_limits_that_are_none_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most"):
        Limits(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [10, 11])
def test_few_large_files_are_decoded_where_decoding_can_be_ended(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    seen: list[str] = []

    def reader(name: str) -> Callable[..., Iterator[None]]:
        def read(*_: object) -> Iterator[None]:
            seen.append(name)
            yield from ()

        return read

    monkeypatch.setattr(encode, "LITTLE_BYTES", 10)
    for name in ("_read_here", "_read_ahead"):
        monkeypatch.setattr(encode, name, reader(name))
    embedder: Any = SimpleNamespace(encoder=HalvesEncoder())
    assert list(encode.encode_files([encode.File(0, tmp_path / "x", "")], [embedder])) == []
    assert seen == ["_read_here" if size == 10 else "_read_ahead"]


# --- scans of a JPEG ---


def with_scans(n: int) -> bytes:
    """Make a progressive JPEG whose last scan stands there `n` times more."""
    file = io.BytesIO()
    picture = Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64))
    picture.save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (n + 1) + data[-2:]


def test_a_progressive_jpeg_of_ten_thousand_scans_is_refused_before_it_is_decoded() -> None:
    assert decode_image(with_scans(0)).pixels.shape == (64, 64)
    for n in (100, 10_000):
        with pytest.raises(ImageError, match="more than 100 scans"):
            decode_image(with_scans(n))


def test_scans_are_counted_in_a_dicoms_jpeg_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_checks, "MAX_SCANS", 2)
    with pytest.raises(ImageError, match="more than 2 scans"):
        container_checks.check_jpeg(with_scans(3))


# --- directories of a TIFF ---


def tiff(entries: list[tuple[int, int, int, int]], *, big: bool = False, order: str = "<") -> bytes:
    """Write a TIFF of one directory whose entries are (tag, type, count, value)."""
    mark = b"II" if order == "<" else b"MM"
    if big:
        head = mark + struct.pack(order + "HHHQ", 43, 8, 0, 16)
        body = struct.pack(order + "Q", len(entries))
        body += b"".join(struct.pack(order + "HHQQ", *entry) for entry in entries)
        return head + body + bytes(8)
    head = mark + struct.pack(order + "HI", 42, 8)
    body = struct.pack(order + "H", len(entries))
    body += b"".join(struct.pack(order + "HHII", *entry) for entry in entries)
    return head + body + bytes(4)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("tag", "kind", "said"),
    [
        (273, 4, "300,000 strips or tiles"),
        (324, 4, "300,000 strips or tiles"),
        (258, 3, "300,000 values in its tag 258"),
        (339, 12, "300,000 values in its tag 339"),
    ],
)
def test_a_tiff_of_too_many_strips_or_values_is_refused(
    big: bool, order: str, tag: int, kind: int, said: str
) -> None:
    sizes = [(256, 3, 1, 8), (257, 3, 1, 8), (262, 3, 1, 1)]
    data = tiff([*sizes, (tag, kind, 300_000, 8)], big=big, order=order)
    with pytest.raises(ImageError, match=said):
        decode_image(data + bytes(2_400_000))


def test_a_tiff_of_endless_directories_is_refused() -> None:
    head, one = struct.pack("<2sHI", b"II", 42, 8), struct.pack("<HHHII", 1, 256, 3, 1, 8)
    size = len(one) + 4
    chain = b"".join(one + struct.pack("<I", 8 + (n + 1) * size) for n in range(200))
    with pytest.raises(ImageError, match=r"more than (one picture|100 pictures)"):
        decode_image(head + chain + one + bytes(4))
    with pytest.raises(ImageError, match=r"60,000 entries|Missing dimensions"):
        decode_image(struct.pack("<2sHIH", b"II", 42, 8, 60_000) + bytes(60_000 * 12))
    loop = head + one + struct.pack("<I", 8)
    with pytest.raises(ImageError, match="TIFF"):
        decode_image(loop)


def test_a_tiff_of_many_strips_is_read() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3_000, 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF", tiffinfo={278: 1}, compression="raw")
    assert np.array_equal(decode_image(file.getvalue()).pixels, pixels)


# --- elements of a DICOM, and what it inflates to ---


def deflated(inside: bytes, odd: str = "") -> bytes:
    """Write a deflated DICOM, the transfer syntax somewhere in group 2."""
    name = DeflatedExplicitVRLittleEndian.encode()
    syntax = struct.pack("<HH2sH", 2, 0x10, b"UI", len(name)) + name
    if odd == "after 100 kB of group 2":
        syntax = struct.pack("<HH2sHI", 2, 0x102, b"OB", 0, 100_000) + bytes(100_000) + syntax
    elif odd == "implicit VR":
        syntax = struct.pack("<HHI", 2, 0x10, len(name)) + name
    elif odd == "padded":
        syntax = struct.pack("<HH2sH", 2, 0x10, b"UI", len(name) + 2) + name + b"\0\0"
    elif odd == "twice":
        plain = b"1.2.840.10008.1.2.1\0"
        syntax = struct.pack("<HH2sH", 2, 0x10, b"UI", len(plain)) + plain + syntax
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return bytes(128) + b"DICM" + syntax + packer.compress(inside) + packer.flush()


PLACES = ["", "after 100 kB of group 2", "implicit VR", "padded", "twice"]


@pytest.mark.parametrize("odd", PLACES)
def test_a_deflated_dicom_is_held_to_a_size_wherever_its_syntax_stands(
    odd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dicom(DEEP, BitsStored=12, WindowCenter=2048, WindowWidth=4096)
    start = plain.index(struct.pack("<HH2s", 8, 0x16, b"UI"))
    data = deflated(plain[start:], odd)
    monkeypatch.setattr(dicom_file, "MAX_INFLATED", 1_000_000)
    assert np.array_equal(decode_image(data).pixels, decode_image(plain).pixels)
    bomb = deflated(plain[start:] + bytes(2_000_000), odd)
    assert len(bomb) < len(data) + 10_000
    with pytest.raises(ImageError, match="inflates to more than 1 MB"):
        decode_image(bomb)


def test_a_deflated_dicom_that_ends_early_or_is_damaged_is_refused() -> None:
    data = deflated(dicom(DEEP)[400:])
    with pytest.raises(ImageError, match=r"end early|damaged"):
        decode_image(data[:-40])
    with pytest.raises(ImageError, match="deflated data are damaged"):
        decode_image(data[:162] + b"\xff" * 400)


def with_elements(more: bytes) -> bytes:
    """Put elements before the pixels of a sound file."""
    plain = dicom(DEEP, BitsStored=12)
    place = plain.index(struct.pack("<HH2s", 0x28, 2, b"US"))
    return plain[:place] + more + plain[place:]


def test_a_dicom_of_endless_elements_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_file, "MAX_READS", 3_000)
    private = struct.pack("<HH2sHH", 0x19, 0x1001, b"US", 2, 7)
    assert decode_image(with_elements(private * 100)).pixels.shape == DEEP.shape
    with pytest.raises(ImageError, match="far more elements than any image"):
        decode_image(with_elements(private * 4_000))
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    ends = struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    sequence = struct.pack("<HH2sHI", 0x19, 0x1002, b"SQ", 0, 0xFFFFFFFF)
    close = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    with pytest.raises(ImageError, match="far more elements than any image"):
        decode_image(with_elements(sequence + (item + private + ends) * 2_000 + close))


def test_a_dicom_nested_without_end_is_refused() -> None:
    begin = struct.pack("<HH2sHI", 0x19, 0x1002, b"SQ", 0, 0xFFFFFFFF)
    begin += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    end = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    with pytest.raises(ImageError, match="the DICOM is damaged: decoding ends"):
        decode_image(with_elements(begin * 5_000 + end * 5_000))


def test_an_element_of_many_bytes_beside_the_pixels_is_refused() -> None:
    tag = struct.pack("<HH2sHI", 0x28, 0x3010, b"SQ", 0, 5_000_000)
    made = read(dicom(DEEP))
    assert made.Rows
    plain = dicom(DEEP, BitsStored=12)
    place = plain.index(struct.pack("<HH2s", 0x7FE0, 0x10, b"OW"))
    with pytest.raises(ImageError, match="element of 5,000,000 bytes beside its pixels"):
        decode_image(plain[:place] + tag + bytes(5_000_000) + plain[place:])
    whole = io.BytesIO(plain[:place] + tag + bytes(5_000_000) + plain[place:])
    with (
        dicom_file.quiet_pydicom(),
        pytest.raises(ImageError, match="element of 5,000,000 bytes before its pixels"),
    ):
        dicom_file.read_dicom(whole, "Rows VOILUTSequence", with_pixels=False)


# --- processes ---


def test_processes_are_bounded_by_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    most = PER_CORE * count_cores()
    assert choose_processes(most, "--x", 1, MedembedError) == most
    assert choose_processes(None, "--x", 1, MedembedError) == count_cores()
    assert choose_processes(None, "--x", 2 * total_memory(), MedembedError) == 1
    with pytest.raises(MedembedError, match=rf"--x {most + 1} .* at most {most}\. Give no more"):
        choose_processes(most + 1, "--x", 1, MedembedError)
    with pytest.raises(MedembedError, match=r"--x 4 .* at most 3\."):
        choose_processes(4, "--x", total_memory() // 3, MedembedError)
    monkeypatch.setattr(system, "count_cores", lambda: 64)
    assert choose_processes(None, "--x", total_memory() // 3, MedembedError) == 3


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_memory_counts(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "CGROUPS", tmp_path)
    name = "memory/memory.limit_in_bytes" if version == 1 else "memory.max"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("max\n")
    whole = total_memory()
    assert whole == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / name).write_text("123456789\n")
    found = total_memory()
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    assert found == (123456789 if version == 1 or any(g[:2] == "0:" for g in groups) else whole)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    cache, manifest = make_data(tmp_path_factory.mktemp("bounds") / "data", {"mean": 1.5})
    return cache, manifest


def test_ten_thousand_processes_are_refused_before_one_is_started(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    manifest = write_images(tmp_path / "images", 2)
    for number in (10_000, 10**9):
        with pytest.raises(MedembedError, match=f"--decoders {number} is more than this machine"):
            extract(manifest, tmp_path / "images", HalvesEncoder(), tmp_path / "c", decoders=number)
        with pytest.raises(TrainingDataError, match=f"--jobs {number} is more than this machine"):
            sweep(*data, tmp_path / "run", jobs=number)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "c").exists()
    assert choose_jobs(1) == 1
    with pytest.raises(TrainingDataError, match="--jobs is 0"):
        sweep(*data, tmp_path / "run", jobs=0)


def test_a_batch_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "images", 2)
    given = (manifest, tmp_path / "images", HalvesEncoder(), tmp_path / "cache")
    with pytest.raises(EncoderError, match=r"--batch-size 1000000000000: .* at most [0-9]+ fit"):
        extract(*given, batch_size=10**12)
    assert not (tmp_path / "cache").exists()


# --- numbers ---

EXTRACT = "extract m.csv --image-root . --encoder demo --cache c"
SWEEP = "sweep c m.csv --out r"
FINETUNE = "finetune m.csv --image-root . --encoder demo --out r"
AUTOENCODER = "autoencoder m.csv --image-root . --out r"
ABSURD = (
    *(f"{EXTRACT} --batch-size {n}" for n in ("1e9", "1000000000", "0", "-1", "9" * 5000, "²")),
    *(f"{EXTRACT} --max-bytes {n}" for n in ("0", "-5", str(2**70), "1GB")),
    *(f"{EXTRACT} --max-seconds {n}" for n in ("0", "nan", "inf", "-1", "1e999", "1e7")),
    f"{EXTRACT} --decoders 0",
    *(f"{SWEEP} --seed {n}" for n in (2**63, 2**64, 2**70, -1, "1e3", "nan")),
    *(f"{SWEEP} --configs {n}" for n in (0, 10**12, "1e3")),
    *(f"{SWEEP} --folds {n}" for n in (1, 10**12)),
    *(f"{SWEEP} --train-fraction {n}" for n in ("0", "nan", "inf", "1.5", "-1")),
    f"{SWEEP} --jobs 0",
    *(f"{FINETUNE} --seed {n}" for n in (2**70, -1)),
    *(f"{FINETUNE} --{name} {10**12}" for name in ("seeds", "folds", "epochs", "patience", "lora")),
    *(f"{FINETUNE} --{name} {10**12}" for name in ("batch-size", "accumulate")),
    *(f"{FINETUNE} --{name} nan" for name in ("lr", "encoder-share", "decay", "weight-decay")),
    *(f"{FINETUNE} --{name} inf" for name in ("lr", "encoder-share", "decay", "weight-decay")),
    f"{FINETUNE} --seed {2**63 - 1} --seeds 2",
    *(f"{AUTOENCODER} --{name} {10**12}" for name in ("size", "epochs", "batch-size", "widths")),
    *(f"{AUTOENCODER} --lr {n}" for n in ("nan", "inf", "0", "-1")),
    *(f"{AUTOENCODER} --widths {n}" for n in ("0", "32,0", "9" * 5000, "32,100000")),
    *(f"{AUTOENCODER} --latent-channels {n}" for n in (0, 10**12)),
    f"{AUTOENCODER} --seed {2**70}",
    *(f"{command} --seed {2**70}" for command in ("compare r", "report r -o p", "demo d")),
    f"manifest check m.csv --seed {2**70}",
    *(f"evaluate m c m.csv --out r --{name} {2**70}" for name in ("seed", "recalibrate")),
    *(f"predict m x.png --alpha {n}" for n in ("nan", "0", "1", "inf")),
    f"predict m x.png --max-bytes {2**70}",
    f"demo d --patients {10**12}",
)


@pytest.mark.parametrize("command", ABSURD, ids=lambda command: command[:70])
def test_a_number_that_is_absurd_is_one_usage_error(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, command.split())
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert re.search(r"Error: (Invalid value for|--seed .* go beyond)", done.output)
    assert not list(tmp_path.iterdir())


def test_a_seed_of_63_bits_is_a_seed(data: tuple[Path, Path], tmp_path: Path) -> None:
    heads = ["logistic", "mlp", "lightgbm"]
    options = {"heads": heads, "n_configs": 1, "n_folds": 2, "jobs": 1}
    results = [
        sweep(*data, tmp_path / f"{n}", seed=seed, **options).as_dict()  # type: ignore[arg-type]
        for n, seed in enumerate((2**63 - 1, 2**63 - 1, 2**63 - 2))
    ]
    for result in results:
        assert {entry["status"] for entry in result["leaderboard"]} == {"ok"}
    scores = [[entry["cv"] for entry in result["leaderboard"]] for result in results]
    assert scores[0] == scores[1] != scores[2]


# --- a full disk ---

FOLDERS = """
name = "mine"
licence = "none"
citation = "none"
url = "https://example.org"
layout = "folders"
label_level = "image"
[folders]
pattern = "{patient}.png"
[region]
constant = "hand"
[split]
fraction = 0.3
"""


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Mount a disk of 256 kB."""
    place = tmp_path_factory.mktemp("small")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted to be filled: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.fixture
def nearly_full(small_disk: Path) -> Iterator[Path]:
    """Leave 8 kB on the disk."""
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize - 8192))
    yield small_disk
    for path in sorted(small_disk.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_full_disk_names_the_file_and_what_is_missing(nearly_full: Path) -> None:
    path = nearly_full / "x"
    said = "No space left on device: 20,000 bytes were wanted, 8,192 are free, 11,808 are missing"
    with pytest.raises(OSError, match=said) as caught:
        write_atomically(path, bytes(20_000))
    assert caught.value.filename == str(path)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in nearly_full.iterdir()] == ["ballast"]
    with pytest.raises(OSError, match="No space left on device: 50,000 bytes were wanted"):
        append_synced(path, bytes(50_000))


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("report {run} -o {disk}/page", "page"),
        ("sweep {cache} {manifest} --out {disk}/run --heads logistic --configs 1 --folds 2 "
         "--jobs 1", "run"),
        ("cache export {cache} {manifest} -o {disk}/x.npz", "x.npz"),
        ("manifest build {recipe} --image-root {images} -o {disk}/m.csv", "m.csv"),
    ],
)  # fmt: skip
def test_commands_name_the_file_that_a_full_disk_lacks(
    command: str, name: str, nearly_full: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    places = {"disk": nearly_full, "cache": data[0], "manifest": data[1], "run": tmp_path / "run"}
    if "{run}" in command:
        sweep(*data, tmp_path / "run", heads=["logistic"], n_configs=1, n_folds=2, jobs=1)
    if "{recipe}" in command:
        (tmp_path / "recipe.toml").write_text(FOLDERS)
        write_images(tmp_path / "images", 120)
        places |= {"recipe": tmp_path / "recipe.toml", "images": tmp_path / "images"}
    done = CliRunner().invoke(main, command.format(**places).split())
    assert done.exit_code == 1, done.output
    assert "No space left on device" in done.output
    assert str(nearly_full / name) in done.output
    assert re.search(r"[0-9,]+ are missing|[0-9,]+ bytes are free", done.output), done.output


def test_no_room_for_what_processes_share_is_no_trials_fault(
    nearly_full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(nearly_full))
    with pytest.raises(OSError, match="--jobs 1") as caught, Pool(np.zeros(1 << 18), 2):
        pass
    assert not list(nearly_full.glob("medembed-*"))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(nearly_full))
