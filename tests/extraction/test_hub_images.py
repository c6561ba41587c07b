"""Datasets of a hub on loopback as image roots: the manifest and the rows come from one stream."""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hub_server import NEW, OLD, Hub, Request
from huggingface_hub import constants
from made_extraction import HalvesEncoder, counts, write_images

from medembed.cache.embeddings import load_embeddings
from medembed.cache.pending import Worker
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.core.errors import (
    ArgumentError,
    ImageError,
    ManifestError,
    MedembedError,
    PathNotFoundError,
    RecipeError,
    StorageError,
)
from medembed.dataset.build_file import build_path, read_build
from medembed.dataset.manifest import Manifest, existing_images, existing_root, read_manifest
from medembed.dataset.recipes.build import BuildReport
from medembed.dataset.recipes.choices import Choices
from medembed.dataset.recipes.stream import build_from_stream
from medembed.extraction import extract
from medembed.images.hub_dataset import HubRoot, list_data_files, parse_hub_root

N_IMAGES = 12
FILMS = "datasets/owner/films"
ROOT = "hf://datasets/owner/films"
NOISE = random.Random(0).randbytes(600_000)
PATIENT = Choices(patient=("pid",))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("films")
    write_images(folder, N_IMAGES)
    return [(folder / f"{n:03d}.png").read_bytes() for n in range(N_IMAGES)]


def parquet(
    films: list[bytes | None], start: int = 0, *, names: bool = True, **columns: list[Any]
) -> bytes:
    """Return a Parquet file as `datasets` writes it, with row groups of two rows."""
    n = range(start, start + len(films))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": data, "path": f"{k:03d}.png"} for k, data in zip(n, films, strict=True)]
    given = {
        "image": pa.array(cells, kind),
        "label": pa.array([k % 2 for k in n]),
        "pid": pa.array([f"p{k}" for k in n]),
        "age": pa.array([20.0 + k for k in n]),
        **{name: pa.array(own) for name, own in columns.items()},
    }
    table = pa.table({name: column for name, column in given.items() if len(column)})
    features = {"label": {"names": ["broken", "healthy"], "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}}).encode()
    table = table.replace_schema_metadata({b"huggingface": about} if names else {})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2)
    return sink.getvalue()


def two_splits(films: list[bytes]) -> dict[str, bytes]:
    return {
        "README.md": b"# films",
        "data/train-00000-of-00001.parquet": parquet(films[:8]),
        "data/validation-00000-of-00001.parquet": parquet(films[8:], 8),
        "films.py": b"raise SystemExit('code of a dataset was run')",
    }


def build(text: str = ROOT, choices: Choices | None = PATIENT, **options: Any) -> BuildReport:
    root = parse_hub_root(text)
    assert root is not None
    return build_from_stream(root, choices=choices, **options)


def run_extract(manifest: Any, root: Any, cache: Path, **options: Any) -> Any:
    options = {"dtype": "float32", "batch_size": 4, "decoders": 1} | options
    return extract(manifest, root, HalvesEncoder(), cache, **options)


def test_parquet_files_give_the_manifest_and_the_rows_of_their_images(
    hub: Hub, films: list[bytes], tmp_path: Path
) -> None:
    hub.put(FILMS, two_splits(films))
    told: list[tuple[int, int]] = []
    report = build(progress=lambda *own: told.append(own))
    rows = report.manifest.rows
    assert rows["image"].tolist()[:2] == [
        f"data/train-00000-of-00001.parquet/{n:06d}/{n:03d}.png" for n in (0, 1)
    ]
    assert rows["sha256"].tolist() == [hashlib.sha256(film).hexdigest() for film in films]
    # The classes' names decide, not their numbers: 0 is broken here.
    assert rows["label"].tolist() == [1, 0] * 6
    assert rows["split"].tolist() == ["train"] * 8 + ["test"] * 4
    assert rows["patient"].tolist() == [f"p{n}" for n in range(N_IMAGES)]
    assert rows["age"].astype(float).tolist() == [20.0 + n for n in range(N_IMAGES)]
    assert set(rows["region"]) == {"all"}
    assert told[0] == (1, N_IMAGES)
    assert told[-1] == (N_IMAGES, N_IMAGES)
    assert any("healthy means normal, broken means abnormal" in notice for notice in report.notices)
    assert not hub.asked("GET", "films.py")
    two = run_extract(report.manifest, ROOT, tmp_path / "cache", decoders=2)
    assert counts(two) == (12, 0, 12, 0, 0)
    write_images(tmp_path / "images", N_IMAGES)
    near = rows.assign(image=[f"{n:03d}.png" for n in range(N_IMAGES)])
    run_extract(Manifest(near, "study"), tmp_path / "images", tmp_path / "near")
    far = load_embeddings(tmp_path / "cache", report.manifest).X
    assert far.tobytes() == load_embeddings(tmp_path / "near", report.manifest).X.tobytes()
    assert counts(run_extract(report.manifest, ROOT, tmp_path / "cache"))[1] == N_IMAGES
    shared = [run_extract(report.manifest, ROOT, tmp_path / "shared", worker=Worker(n, 3)).embedded
              for n in range(3)]  # fmt: skip
    assert sum(shared) == N_IMAGES
    assert max(shared) < N_IMAGES


def test_only_values_are_fetched_before_a_choice_is_refused(hub: Hub, films: list[bytes]) -> None:
    hub.put(FILMS, two_splits([film + NOISE for film in films]))
    whole = sum(map(len, hub.repos[FILMS][NEW].values()))
    for choices, words in (
        (None, "no column of .* is called patient.*--patient 'pid'"),
        (Choices(patient=("person",)), "has no column 'person'; its columns are 'label', 'pid'"),
        (Choices(patient=("pid",), abnormal=("bent",)), "'bent' does not occur"),
        (Choices(patient=("pid",), split="age"), "not those of training and test"),
        (Choices(patient=("pid",), image="age"), "column 'age' of Parquet file .* holds no images"),
    ):
        with pytest.raises(RecipeError, match=words):
            build(choices=choices)
    assert hub.sent < whole / 2  # in all five


def test_without_patients_each_image_counts_as_one_and_test_is_drawn(
    hub: Hub, films: list[bytes]
) -> None:
    hub.put(FILMS, {"a.parquet": parquet([*films, films[0]], pid=[])})
    report = build(choices=Choices(patient=()))
    rows = report.manifest.rows
    assert rows["patient"].nunique() == N_IMAGES  # equal bytes are one
    assert set(rows["split"]) == {"train", "test"}
    assert any("counts as a patient of its own" in warning for warning in report.warnings)
    assert any("has no splits" in notice for notice in report.notices)
    again = build(choices=Choices(patient=(), test_fraction=0.5, seed=3)).manifest.rows
    assert again["split"].tolist() != rows["split"].tolist()


def test_a_card_names_configurations_splits_and_classes(hub: Hub, films: list[bytes]) -> None:
    card = """---
configs:
- config_name: hands
  data_files:
  - {split: train, path: one.parquet}
  - {split: test, path: [two.parquet]}
- config_name: feet
  data_files: feet/*.parquet
dataset_info:
- config_name: hands
  features:
  - name: image
    dtype: image
  - name: label
    dtype: {class_label: {names: {'0': abnormal, '1': normal}}}
---
"""
    files = {
        "README.md": card.encode(),
        "one.parquet": parquet(films[:8], names=False),
        "two.parquet": parquet(films[8:], 8, names=False),
        "feet/x.parquet": parquet(films[:2], pid=[]),
    }
    hub.put(FILMS, files)
    rows = build(f"{ROOT}/hands").manifest.rows
    assert rows["split"].tolist() == ["train"] * 8 + ["test"] * 4
    assert rows["label"].tolist() == [1, 0] * 6
    with pytest.raises(PathNotFoundError, match=r"configurations hands, feet. Name one: .*/hands"):
        build()
    with pytest.raises(PathNotFoundError, match=r"nothing at 'arms', and no configuration but ha"):
        build(f"{ROOT}/arms")
    hub.put(FILMS, {**files, "README.md": b"---\n{a: [\n---\n"}, commit=OLD)
    warnings = build(f"{ROOT}/one.parquet").warnings
    assert any("README.md cannot be read" in warning for warning in warnings)


def test_tar_files_and_image_files_of_a_dataset(
    hub: Hub, films: list[bytes], tmp_path: Path
) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number, film in enumerate(films):
            about = {"patient": f"p{number}", "label": number % 2}
            for name, data in ((f"{number}.json", json.dumps(about).encode()),
                               (f"{number}.png", film)):  # fmt: skip
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    hub.put(FILMS, {"tars/train-0.tar": sink.getvalue(), "README.md": b""})
    by_tar = build(choices=None).manifest
    assert by_tar.rows["image"].iloc[0] == "tars/train-0.tar/0.png"
    assert run_extract(by_tar, ROOT, tmp_path / "tar").embedded == N_IMAGES

    files = {f"{'train' if n < 8 else 'test'}/{('ok', 'fracture')[n % 2]}/{n}.png": film
             for n, film in enumerate(films)}  # fmt: skip
    hub.put("datasets/owner/folders", files)
    folders = "hf://datasets/owner/folders"
    with pytest.raises(RecipeError, match="cannot be told from the words"):
        build(folders, Choices(patient=()))
    by_folder = build(folders, Choices(patient=(), abnormal=("fracture",))).manifest
    found = by_folder.rows.set_index("image")
    assert found.loc["train/fracture/1.png", ["label", "split"]].tolist() == [1, "train"]
    assert found.loc["test/ok/8.png", ["label", "split"]].tolist() == [0, "test"]
    assert run_extract(by_folder, folders, tmp_path / "folders").embedded == N_IMAGES

    lines = [f"{n}.png,p{n // 2},{n % 2}" for n in range(N_IMAGES)]
    table = "\n".join(["file_name,patient,label", *lines]).encode()
    named = {f"train/{n}.png": film for n, film in enumerate(films)}
    hub.put("datasets/owner/table", {**named, "train/metadata.csv": table})
    rows = build("hf://datasets/owner/table", None).manifest.rows.set_index("image")
    assert rows.loc["train/3.png", ["patient", "label"]].tolist() == ["p1", 1]
    hub.put("datasets/owner/table", {**named, "train/metadata.csv": table[:57]}, commit=OLD)
    with pytest.raises(ManifestError, match=r"train/11\.png is in no row of train/metadata\.csv"):
        build("hf://datasets/owner/table", None)


def test_extraction_reads_the_commit_of_the_manifest_and_says_what_moved(
    hub: Hub, films: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.repos = {FILMS: {OLD: two_splits(films)}}
    hub.branches = {FILMS: {"main": OLD, "v1": OLD}}
    done = invoke("manifest", "build", "--from-stream", f"{ROOT}@v1", "--patient", "pid", "-o",
                  "m.csv")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"--image-root {ROOT}@{OLD}" in done.output
    document = json.loads(build_path("m.csv").read_text())
    assert document["stream"] == {
        "kind": "hub", "dataset": "owner/films", "commit": OLD, "revision": "v1"
    }  # fmt: skip
    assert document["counts"]["found"] == N_IMAGES
    kept = read_build("m.csv", read_manifest("m.csv"))
    assert kept is not None
    assert kept.stream is not None
    assert kept.stream.commit == OLD
    hub.repos[FILMS][NEW] = {"data/train.parquet": parquet(films[:2])}
    hub.branches[FILMS] = {"main": NEW, "v1": OLD}
    words = ("extract", "m.csv", "--encoder", "demo", "--cache", "c", "--device", "cpu")
    done = invoke(*words, "--image-root", ROOT)
    assert done.exit_code == 0, done.output
    assert "has moved" not in done.output  # only the branch that was not read has
    assert "12 embedded" in done.output
    hub.branches[FILMS] = {"main": OLD, "v1": NEW}
    done = invoke(*words, "--image-root", ROOT, "--dry-run")
    assert f"{ROOT}@v1 has moved to commit {NEW[:12]} since the manifest was built" in done.output
    done = invoke(*words[:-3], "c2", "--device", "cpu", "--image-root", f"{ROOT}@{NEW}")
    assert "the manifest was built from commit aaaaaaaaaaaa" in done.output
    assert "no file in the dataset has its bytes" in done.output
    assert "10 failed" in done.output
    told: list[str] = []
    run_extract("m.csv", ROOT, tmp_path / "c3", on_status=told.append)
    assert any(f"{ROOT}@v1 has moved" in words for words in told)
    hub.branches[FILMS] = {}
    assert run_extract("m.csv", f"{ROOT}@v1", tmp_path / "c4").embedded == N_IMAGES


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_cells_without_bytes_are_left_out_and_named(hub: Hub, films: list[bytes]) -> None:
    own = [*films[:4], None, None, None]
    table = pq.read_table(io.BytesIO(parquet(own)))
    cells = table["image"].to_pylist()
    cells[4] = None
    cells[5] = {"bytes": None, "path": "https://x.example/a.png?token=hf_secret"}
    cells[0]["path"], cells[1]["path"], cells[2]["path"] = "/etc/passwd", "..", "C:\\a\\\x1b[1m.png"
    kind = table.schema.field("image").type
    table = table.set_column(0, "image", pa.array(cells, kind))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    hub.put(FILMS, {"train.parquet": sink.getvalue()})
    report = build()
    assert report.manifest.rows["image"].tolist() == [
        "train.parquet/000000/passwd", "train.parquet/000001", "train.parquet/000002",
        "train.parquet/000003/003.png",
    ]  # fmt: skip
    assert report.excluded == [
        ("train.parquet/000004", "its cell holds no image"),
        ("train.parquet/000005", "its cell holds a URL and no bytes"),
        ("train.parquet/000006/006.png", "its cell holds a path and no bytes"),
    ]
    hub.put(FILMS, {"train.parquet": parquet([None, None])}, commit=OLD)
    with pytest.raises(ManifestError, match=r"no image in .* can be read; .* a path and no bytes"):
        build()
    hub.put("datasets/owner/urls", {"a.parquet": parquet([], pid=["a"], url=["http://x"])})
    with pytest.raises(ImageError, match="no column with the bytes of images; its columns are"):
        build("hf://datasets/owner/urls")


def test_damaged_parquet_is_named_and_rows_before_stay(
    hub: Hub, films: list[bytes], tmp_path: Path
) -> None:
    files = two_splits(films)
    hub.put(FILMS, files)
    manifest = build().manifest
    name = "data/train-00000-of-00001.parquet"
    data = bytearray(files[name])
    first = pq.ParquetFile(io.BytesIO(files[name])).metadata.row_group(2).column(0)
    data[first.data_page_offset : first.data_page_offset + 40] = bytes(40)
    hub.put(FILMS, {**files, name: bytes(data)}, commit=OLD)
    with pytest.raises(ImageError, match=f"Parquet file {name} of owner/films at aaaaaaaaaaaa"):
        run_extract(manifest, ROOT, tmp_path / "cache", batch_size=1)
    assert 0 < len(open_cache(tmp_path / "cache").keys()) <= 4
    for broken in (b"", b"PAR1", files[name][:-9], files[name][:100]):
        list_data_files.cache_clear()
        hub.put(FILMS, {name: broken}, commit=OLD)
        with pytest.raises(ImageError, match="cannot be read to its end"):
            build()
    list_data_files.cache_clear()
    hub.put(FILMS, {**files, name: parquet(films[:8], label=[])}, commit=OLD)
    with pytest.raises(RecipeError, match="has no column 'label'; its columns are 'pid', 'age'"):
        build(choices=Choices(patient=("pid",), label="label"))
    list_data_files.cache_clear()
    second = "data/validation-00000-of-00001.parquet"
    hub.put(FILMS, {**files, second: parquet(films[8:], 8, label=[])}, commit=OLD)
    with pytest.raises(ImageError, match=f"{second} .* has no column 'label', as others"):
        build()


def test_cut_connections_are_taken_up_where_they_broke(
    hub: Hub, films: list[bytes], tmp_path: Path
) -> None:
    large = [film + NOISE[:300_000] for film in films]
    hub.put(FILMS, two_splits(large))
    seen: list[str] = []

    def cut(request: Request) -> int | None:
        is_new = request.span not in seen and request.path.endswith(".parquet")
        seen.append(request.span)
        return 100_000 if is_new else None

    hub.cut_after = cut
    manifest = build().manifest
    assert manifest.rows["sha256"].tolist() == [hashlib.sha256(f).hexdigest() for f in large]
    hub.cut_after = lambda request: 10 if "train" in request.path else None
    list_data_files.cache_clear()
    with pytest.raises(StorageError, match=r"broke while data/train.* was fetched.*Run the same"):
        run_extract(manifest, ROOT, tmp_path / "cache")


def test_every_refusal_of_the_hub_is_one_error_with_the_way_out(
    hub: Hub, films: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(FILMS, two_splits(films))
    hub.put("datasets/owner/gated", two_splits(films))
    hub.put("datasets/owner/script", {"script.py": b"", "README.md": b""})
    hub.put("datasets/owner/hostile", {"../../x.parquet": parquet(films[:2])})
    hub.tokens = {"datasets/owner/gated": "Bearer hf_right"}
    hub.refusals = {"datasets/owner/forbidden": (403, ""), "datasets/owner/broken": (500, "")}
    expected = {
        "owner/absent": f"no repository at {hub.address}/datasets/owner/absent that you may read",
        "owner/gated": f"gated: accept its terms at {hub.address}/datasets/owner/gated",
        "owner/films@v9": "owner/films has no revision v9; see",
        "owner/films/none": "holds nothing at 'none'",
        "owner/script": "holds no Parquet, tar or image files at commit bbbbbbbbbbbb",
        "owner/hostile": "lists a file '../../x.parquet'",
        "owner/forbidden": "(HTTP 403): the token in HF_TOKEN is wrong or lacks access",
        "owner/broken": "answered HTTP 500",
    }
    for name, words in expected.items():
        with pytest.raises(MedembedError) as caught:
            build(f"hf://datasets/{name}")
        assert words in str(caught.value)
        assert "hf_secret" not in str(caught.value)
        assert "checkpoint" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert len(build("hf://datasets/owner/gated").manifest.rows) == N_IMAGES
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="HF_HUB_OFFLINE is set, and the list of files"):
        build()


@pytest.mark.parametrize("lie", ["short", "other", "whole", "no-commit", "no-json"])
def test_a_hub_that_lies_is_refused(hub: Hub, films: list[bytes], lie: str) -> None:
    hub.put(FILMS, two_splits(films))

    def tamper(request: Request, answer: Any) -> Any:
        status, headers, body = answer
        if "/api/" in request.path:
            if lie == "no-commit" and "/tree/" not in request.path:
                return status, headers, json.dumps({"id": "x", "sha": "../../etc"}).encode()
            return (status, headers, b"<html>") if lie == "no-json" else answer
        if lie == "other":
            return status, {**headers, "ETag": f'"{len(hub.requests)}"'}, body
        if lie == "short" and status == 206:
            span = headers["Content-Range"].partition("/")[0]
            return status, {**headers, "Content-Range": f"{span}/99999999"}, body
        return (200, headers, body) if lie == "whole" else answer

    hub.tamper = tamper
    with pytest.raises(StorageError, match=r"HF_ENDPOINT"):
        build()


@pytest.mark.parametrize(
    "text", ["hf://owner/films", "hf://datasets/films", "hf://datasets/o/n/../x", "hf://",
             "hf://hf_secret@datasets/o/n", "hf://datasets/o/n@hf secret"]
)  # fmt: skip
def test_an_address_that_names_no_dataset_is_refused_without_its_text(text: str) -> None:
    with pytest.raises(ArgumentError, match="is hf://datasets/OWNER/NAME") as caught:
        parse_hub_root(text)
    assert "secret" not in str(caught.value)


def test_an_address_may_name_a_branch_of_the_hubs_own() -> None:
    assert parse_hub_root("hf://datasets/o/n@refs/convert/parquet/default/train") == HubRoot(
        "o/n", "refs/convert/parquet", "default/train"
    )
    assert parse_hub_root("hf://datasets/o/n@refs%2Fpr%2F3") == HubRoot("o/n", "refs/pr/3")
    assert parse_hub_root("tar://x") is None


STREAMS = ("tar://shards", "hf://datasets/owner/films")


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    "words",
    [
        ("manifest", "build", "mura", "-o", "m.csv", "--image-root"),
        ("manifest", "build", "-o", "m.csv", "--from-folders"),
        ("manifest", "init", "-o", "m.toml"),
        ("manifest", "check", "m.csv", "--image-root"),
        ("finetune", "m.csv", "--encoder", "demo", "-o", "r", "--image-root"),
        ("autoencoder", "m.csv", "-o", "a", "--image-root"),
        ("predict", "model", "--manifest", "m.csv", "--image-root"),
        ("predict", "model"),
        ("report", "r", "-o", "p", "--manifest", "m.csv", "--image-root"),
        ("similar", "c", "m.csv", "--image", "x", "--image-root"),
        ("cache", "info"),
        ("audit", "labels", "r", "--manifest", "m.csv", "-o", "p", "--image-root"),
        ("audit", "shortcuts", "c", "m.csv", "--columns", "age", "--image-root"),
        ("run", "--encoder", "demo", "-o", "r"),
        ("extract", "m.csv", "--encoder", "demo", "--image-root", ".", "--cache"),
    ],
)
def test_commands_that_look_images_up_refuse_a_stream(
    words: tuple[str, ...], stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*words, stream)
    assert done.exit_code == 2, done.output
    assert "is read from front to back" in " ".join(done.output.split())
    assert "--from-stream" in done.output
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("look_up", [existing_images, existing_root])
def test_python_refuses_a_stream_where_images_are_looked_up(look_up: Callable[[str], Any]) -> None:
    with pytest.raises(ArgumentError, match=r"front to back.*save its images as files"):
        look_up(ROOT)


@pytest.mark.parametrize("extra", [("--sheet", "x"), ("--pattern", "x"), ("--key-file", "k")])
def test_options_that_mean_nothing_for_a_stream_are_refused(
    extra: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("manifest", "build", "--from-stream", ROOT, "-o", "m.csv", *extra)
    assert done.exit_code == 2
    assert "--from-stream" in done.output


LABELS_AND_NULL = {"0": 0, "1": 1, "normal": "normal", "fracture": "fracture"}


@pytest.mark.parametrize("value", LABELS_AND_NULL)
def test_a_null_label_is_never_taken_for_the_other_class(
    value: str, hub: Hub, films: list[bytes]
) -> None:
    labels = [LABELS_AND_NULL[value], None] * 6
    hub.put(FILMS, {"train.parquet": parquet([*films], label=labels, names=False)})
    way_out = "--normal" if value in ("0", "normal") else "--empty normal or --empty unknown"
    with pytest.raises(RecipeError, match=way_out):
        build(choices=Choices(patient=("pid",), label="label"))
    chosen = {"normal": (value,)} if way_out == "--normal" else {"abnormal": (value,)}
    given = Choices(patient=("pid",), label="label", empty="unknown", **chosen)
    rows = build(choices=given).manifest.rows
    assert rows["label"].fillna(-1).tolist() == [0 if way_out == "--normal" else 1, -1] * 6


def test_without_patients_the_views_of_a_study_stay_together(hub: Hub, films: list[bytes]) -> None:
    studies = [f"s{n // 2}" for n in range(N_IMAGES)]
    labels = [n // 2 % 2 for n in range(N_IMAGES)]
    hub.put(FILMS, {"a.parquet": parquet([*films], pid=[], study=studies, label=labels)})
    report = build(choices=Choices(patient=()))
    rows = report.manifest.rows
    assert rows["study"].tolist() == rows["patient"].tolist() == studies
    assert rows.groupby("study")["split"].nunique().eq(1).all()
    assert report.manifest.label_level == "study"
    assert any("each study counts as a patient" in warning for warning in report.warnings)


@pytest.mark.parametrize("own", [["healthy", "broken"], None])
def test_files_that_number_their_classes_differently_are_refused(
    own: list[str] | None, hub: Hub, films: list[bytes]
) -> None:
    second = pq.read_table(io.BytesIO(parquet(films[8:], 8)))
    about = {"info": {"features": {"label": {"names": own}}}}
    second = second.replace_schema_metadata({b"huggingface": json.dumps(about).encode()})
    sink = io.BytesIO()
    pq.write_table(second, sink)
    hub.put(FILMS, {"train.parquet": parquet(films[:8]), "test.parquet": sink.getvalue()})
    with pytest.raises(RecipeError, match=r"classes of column 'label' are .* in Parquet file test"):
        build()


@pytest.mark.parametrize("number", [2, -2])
def test_a_number_that_no_class_has_is_refused(number: int, hub: Hub, films: list[bytes]) -> None:
    labels = [0, 1, -1, number]
    hub.put(FILMS, {"train.parquet": parquet(films[:4], label=labels)})
    with pytest.raises(
        RecipeError, match=f"'label' of train.parquet, row 3 holds {number}, .*0 to 1"
    ):
        build()


def test_an_images_folder_and_not_its_own_name_gives_the_split(
    hub: Hub, films: list[bytes]
) -> None:
    names = [f"{('train', 'test')[n // 8]}/{('normal', 'fracture')[n % 2]}/train_{n}.png"
             for n in range(N_IMAGES)]  # fmt: skip
    hub.put(FILMS, dict(zip(names, films, strict=True)))
    rows = build(choices=Choices(patient=())).manifest.rows.set_index("image")
    assert rows.loc[names, "split"].tolist() == ["train"] * 8 + ["test"] * 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("0.png,p0,1", r"describes train/0\.png a second time with other values"),
        ("9.png,p9", "line 14 has fewer fields than the header"),
        ("9.png,p9,0,x", "line 14 has more fields than the header"),
    ],
)
def test_rows_of_metadata_that_contradict_are_refused(
    more: str, words: str, hub: Hub, films: list[bytes]
) -> None:
    lines = ["file_name,patient,label", *(f"{n}.png,p{n},{n % 2}" for n in range(N_IMAGES))]
    named = {f"train/{n}.png": film for n, film in enumerate(films)}
    same = "\n".join([*lines, lines[1]]).encode()  # the same row twice says nothing new
    hub.put(FILMS, {**named, "train/metadata.csv": same})
    assert len(build(choices=None).manifest.rows) == N_IMAGES
    list_data_files.cache_clear()
    hub.put(FILMS, {**named, "train/metadata.csv": "\n".join([*lines, more]).encode()}, commit=OLD)
    with pytest.raises(RecipeError, match=words):
        build(choices=None)


def test_equal_bytes_with_two_labels_are_refused_with_a_way_out_for_streams(
    hub: Hub, films: list[bytes]
) -> None:
    hub.put(FILMS, {"train.parquet": parquet([*films, films[0]], label=[0, 1] * 6 + [1])})
    with pytest.raises(ManifestError, match="remove them from the dataset") as caught:
        build()
    assert any("more than one label" in problem for problem in caught.value.problems)
    assert "recipe" not in str(caught.value)
