"""What a hostile or careless environment does: damaged files, odd names, streams, homes, clocks.

Every parser of outside data gives a value or one error of ours, promptly, and writes nothing.
Images have such tests in `test_decode` and `test_dicom_damage`, models in `test_packaging`.
"""

import itertools
import json
import os
import re
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from crashing import SOAK
from hypothesis import given, settings
from hypothesis import strategies as st
from made_extraction import HalvesEncoder, list_images, write_images
from made_images import NOISE, chunk, encode
from made_sweeps import make_data, make_table
from odd_documents import odd_documents

import medembed
from medembed.cache import shards
from medembed.cache.embeddings import load_embeddings
from medembed.cache.spec import keys_from_hex
from medembed.cache.store import open_cache
from medembed.cli import main
from medembed.cli.console import printable
from medembed.core.errors import (
    CacheError,
    ImageError,
    ManifestError,
    MedembedError,
    RecipeError,
    RunError,
    ShardError,
)
from medembed.core.files import json_bytes
from medembed.dataset.manifest import (
    Manifest,
    make_manifest,
    read_contents,
    read_manifest,
    write_manifest,
)
from medembed.dataset.pseudonyms import read_key
from medembed.dataset.recipes.build import load_recipe
from medembed.extraction import extract
from medembed.images.decode import decode_image
from medembed.results.runs import create_run, open_run
from medembed.sweeps.search_space import read_spaces

ROOT = Path(__file__).parents[1]
PROMPT = 5.0  # seconds of computing that any refusal may take
SHORT = 20_000  # characters of a message: what is quoted may be longish, not without end

# What a person, an editor or an attacker puts where something else belongs.
TOKENS = [
    *(b"Infinity", b"NaN", b"-1", b"1e999", b"null", b"9" * 30, b"9" * 5000, b"1979-05-27"),
    *(b"[" * 3000, b'{"a":' * 1500, b"[", b"]", b"{", b"}", b'"', b"\\", b"'''", b"=", b","),
    *(b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b'"\\ud800"', "é".encode(), b"../", b"{x}{x}"),
]
PLACES = st.floats(0, 1, exclude_max=True)
EDITS = st.lists(
    st.tuples(
        PLACES, st.integers(0, 12), st.one_of(st.sampled_from(TOKENS), st.binary(max_size=4))
    ),
    min_size=1,
    max_size=3,
)


def damage(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """Replace some bytes by others, at places from 0 to 1."""
    damaged = bytearray(data)
    for place, n_removed, new in edits:
        start = int(place * len(damaged))
        damaged[start : start + n_removed] = new
    return bytes(damaged)


def answer(call: Callable[[], Any], kind: type[MedembedError]) -> Any:
    """Return the value, or None where it is refused in a short message at once."""
    began, value, message = time.process_time(), None, ""
    try:
        value = call()
    except kind as error:
        message = str(error)
    assert len(message) < SHORT
    assert time.process_time() - began < PROMPT
    return value


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def tree(path: Path) -> dict[str, tuple[int, int]]:
    """Return the size and time of change of all that is below a directory, and of itself."""
    every = [path, *path.rglob("*")]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in every}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    cache, manifest = make_data(tmp_path_factory.mktemp("hardening") / "data", {"mean": 1.5})
    return cache, manifest


# --- tables ---


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@given(edits=EDITS)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_a_damaged_csv_is_a_sound_manifest_or_one_error(
    edits: list[tuple[float, int, bytes]], data: tuple[Path, Path], scratch: Path
) -> None:
    path, again = scratch / "damaged.csv", scratch / "again.csv"
    lines = data[1].read_bytes().splitlines(keepends=True)[:9]
    path.write_bytes(damage(b"".join(lines), edits))
    manifest = answer(lambda: read_manifest(path), ManifestError)
    answer(lambda: read_contents(path), ManifestError)
    if manifest is not None:
        write_manifest(manifest, again)
        assert read_manifest(again).digest() == manifest.digest()


@given(edits=EDITS, footer=st.booleans())
@settings(derandomize=True, max_examples=40, deadline=None)
def test_a_damaged_parquet_file_is_a_sound_manifest_or_one_error(
    edits: list[tuple[float, int, bytes]], footer: bool, data: tuple[Path, Path], scratch: Path
) -> None:
    path = scratch / "damaged.parquet"
    write_manifest(make_manifest(make_table(4), "study"), path)
    whole = path.read_bytes()
    cut = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8 if footer else 0
    path.write_bytes(whole[:cut] + damage(whole[cut:], edits))
    manifest = answer(lambda: read_manifest(path), ManifestError)
    answer(lambda: read_contents(path), ManifestError)
    if manifest is not None:
        assert len(manifest.digest()) == 64


COLUMNS: dict[str, Any] = {
    "bytes that are no text": pa.array([b"\xff", b"a"]),
    "text that is no UTF-8": pa.array([b"\xff", b"a"]).view(pa.string()),
    "huge floats": pa.array([1e300, 1.0]),
    "infinite floats": pa.array([float("inf"), float("nan")]),
    "lists": pa.array([[1], [2]]),
    "tables": pa.array([{"a": 1}, None]),
    "nothing": pa.nulls(2),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_any_type_are_read_or_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    table = make_table(2).iloc[:2]
    for column in ("image", "label", "age"):
        columns = {key: table[key].tolist() for key in table.columns} | {column: COLUMNS[name]}
        pq.write_table(pa.table(columns), path)
        answer(lambda: read_manifest(path), ManifestError)
        answer(lambda: read_contents(path), ManifestError)


@pytest.mark.parametrize(
    "note",
    [
        *(b"", b"{", b"{}", b"[]", b"null", b'{"index_columns":["image"],"columns":[]}'),
        b'{"index_columns":["image"],"column_indexes":[],"columns":[{"name":"image",'
        b'"field_name":"image","pandas_type":"int64","numpy_type":"category[x","metadata":{}}]}',
    ],
)
def test_what_pandas_noted_in_a_parquet_file_changes_nothing(note: bytes, tmp_path: Path) -> None:
    path, table = tmp_path / "m.parquet", make_table(3)
    columns = {name: table[name].tolist() for name in table.columns} | {"label_level": "study"}
    columns["label_level"] = ["study"] * len(table)
    pq.write_table(pa.table(columns).replace_schema_metadata({b"pandas": note}), path)
    assert read_manifest(path).digest() == make_manifest(table, "study").digest()


def test_categories_and_an_index_of_pandas_are_read(tmp_path: Path) -> None:
    table = make_table(3).assign(label_level="study")
    table.index = table.index[::-1]
    table.astype("category").to_parquet(tmp_path / "m.parquet")
    expected = make_manifest(make_table(3), "study")
    assert read_manifest(tmp_path / "m.parquet").digest() == expected.digest()


def test_a_row_of_a_million_fields_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(",".join(map(str, range(10**6))) + "\n")
    with pytest.raises(ManifestError, match="has 1000000 columns"):
        answer(lambda: read_manifest(path), CacheError)
    path.write_text(",".join(map(str, range(2_000))) + "\n")
    assert answer(lambda: read_manifest(path), ManifestError) is None
    path.write_text("a," * 9_000 + "a\n")
    with pytest.raises(ManifestError, match="two columns of one name: 'a'"):
        read_manifest(path)


def test_two_columns_of_one_name_are_refused_in_parquet_too(tmp_path: Path) -> None:
    path, table = tmp_path / "m.parquet", make_table(2)
    arrays = [pa.array(table[name].tolist()) for name in [*table.columns, "image"]]
    pq.write_table(pa.Table.from_arrays(arrays, names=[*table.columns, "image"]), path)
    for read in (read_manifest, read_contents):
        with pytest.raises(ManifestError, match="two columns of one name: 'image'"):
            read(path)


@pytest.mark.slow
def test_costs_of_a_manifest_grow_with_its_rows(tmp_path: Path) -> None:
    def seconds(n_patients: int) -> float:
        table, path = make_table(n_patients), tmp_path / f"{n_patients}.csv"
        torn = table.assign(split=[f"x{i}" for i in range(len(table))], sha256="b")
        began = time.process_time()
        write_manifest(make_manifest(table, "study"), path)
        read_manifest(path)
        with pytest.raises(ManifestError):
            make_manifest(torn, "study")
        return time.process_time() - began

    few, many = seconds(300), seconds(2_400)
    assert many < 8 * few * 3  # quadratic would be 64


@pytest.mark.skipif(not SOAK, reason="a million rows are checked with MEDEMBED_SOAK=1 only")
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_manifest_of_a_million_rows_is_checked(form: str, tmp_path: Path) -> None:
    table, path = make_table(500_001), tmp_path / f"m.{form}"
    write_manifest(make_manifest(table, "study"), path)
    assert len(table) >= 1_000_000
    done = run("manifest", "check", path, "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"problems": []})
    table["label_level"] = "study"
    table.loc[table.index[-1], "split"] = "test"  # of the last patient's three images, all in train
    leaking = tmp_path / f"leaking.{form}"
    table.to_csv(leaking, index=False) if form == "csv" else table.to_parquet(leaking, index=False)
    done = run("manifest", "check", leaking, "--json")
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.exit_code == 1
    assert f"patient {table['patient'].iloc[-1]!r} is in more than one split" in problem


# --- recipes, spaces, keys ---


@given(edits=EDITS, number=st.integers(0, 2))
@settings(derandomize=True, max_examples=80, deadline=None)
def test_a_damaged_recipe_is_a_recipe_or_one_error(
    edits: list[tuple[float, int, bytes]], number: int, scratch: Path
) -> None:
    path = scratch / "recipe.toml"
    seeds = sorted((ROOT / "data_manifests").glob("*.toml"))
    path.write_bytes(damage(seeds[number].read_bytes(), edits))
    answer(lambda: load_recipe(path), RecipeError)


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "[" + "a." * 2_000 + "a]"])
def test_a_recipe_nested_without_end_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "deep.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"cannot be read as TOML|unknown key"):
        load_recipe(tmp_path / "deep.toml")


@given(edits=EDITS)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_a_damaged_search_space_is_a_space_or_one_error(
    edits: list[tuple[float, int, bytes]], scratch: Path
) -> None:
    path = scratch / "space.toml"
    path.write_bytes(damage(b"[logistic]\nC = {low = 1e-3, high = 10.0, log = true}\n", edits))
    answer(lambda: read_spaces(path), MedembedError)


@pytest.mark.parametrize("content", [b"", b"\0" * 4, b" \n" * 50, b"short", b"x" * 5000, None])
def test_what_is_no_key_is_one_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(content or b"")
    if content is None:
        os.truncate(path, 2**26)  # a device has no end at all
    with pytest.raises(RecipeError, match="key file"):
        read_key(path)


# --- caches and runs ---


@pytest.fixture
def spoilt(data: tuple[Path, Path], tmp_path: Path) -> Path:
    """Give a cache of its own, whose shard is a link."""
    cache = tmp_path / "cache"
    (cache / "shards").mkdir(parents=True)
    (cache / "cache.json").write_bytes((data[0] / "cache.json").read_bytes())
    [shard] = (data[0] / "shards").iterdir()
    (cache / "shards" / shard.name).write_bytes(shard.read_bytes())
    return cache


def test_any_odd_value_in_cache_json_is_one_error_or_a_cache(spoilt: Path) -> None:
    path = spoilt / "cache.json"
    whole, n_read = path.read_bytes(), 0
    for text in odd_documents(json.loads(whole)):
        path.write_bytes(text)
        cache = answer(lambda: open_cache(spoilt), CacheError)
        if cache is not None:
            card = answer(cache.card, CacheError)
            n_read += card is not None and card["rows"] > 0
    assert n_read > 0  # what is recorded beside the spec may say anything
    path.write_bytes(whole)
    assert open_cache(spoilt).verify() == []


def test_any_odd_value_in_a_shards_header_is_one_error(spoilt: Path) -> None:
    [path] = (spoilt / "shards").iterdir()
    whole = path.read_bytes()
    header, sound = json.loads(whole[: shards.HEADER_BYTES]), open_cache(spoilt).keys()
    for text in odd_documents(header):
        if len(text) >= shards.HEADER_BYTES:
            text = text[: shards.HEADER_BYTES]
        path.write_bytes(text.ljust(shards.HEADER_BYTES) + whole[shards.HEADER_BYTES :])
        keys = answer(lambda: open_cache(spoilt).keys(), ShardError)
        assert keys is None or np.array_equal(keys, sound)  # true is 1 in Python
        assert answer(lambda: shards.read_shard(path), ShardError) is None
    path.write_bytes(whole)
    assert len(open_cache(spoilt).keys()) == header["rows"]


def test_a_header_that_promises_the_world_reads_no_more_than_there_is(spoilt: Path) -> None:
    [path] = (spoilt / "shards").iterdir()
    whole = path.read_bytes()
    header = json.loads(whole[: shards.HEADER_BYTES]) | {"rows": 2**56}
    path.write_bytes(json.dumps(header).encode().ljust(512) + whole[512:])
    for read in (shards.read_header, shards.read_keys):
        with pytest.raises(ShardError, match="ends before its keys do"):
            read(path)


def test_lines_that_are_no_failures_are_passed_over(spoilt: Path) -> None:
    failure = {"sha256": "ab" * 32, "stage": "decode", "reason": "truncated"}
    lines = [json.dumps(failure).encode(), *odd_documents(failure)]
    (spoilt / "failures.jsonl").write_bytes(b"\n".join(lines))
    known = open_cache(spoilt).failures()
    assert set(known) == {"ab" * 32}
    assert all(isinstance(failure.reason, str) for failure in known.values())


@pytest.mark.parametrize("text", [b"", b"{}", b"[1, null]", b"[" * 100_000, b'["../../x.h5"]'])
def test_names_of_replaced_shards_that_are_none_change_nothing(text: bytes, spoilt: Path) -> None:
    [path] = (spoilt / "shards").glob("*.h5")
    path.with_suffix(shards.REPLACES).write_bytes(text)
    assert open_cache(spoilt).card()["rows"] == len(shards.read_keys(path))


def test_any_odd_value_in_run_json_is_one_error_or_a_run(tmp_path: Path) -> None:
    create_run(tmp_path / "run", {"seed": 1, "heads": ["mlp"]})
    path = tmp_path / "run" / "run.json"
    for text in odd_documents(json.loads(path.read_bytes())):
        if len(text) > SHORT:  # see test_packaging for files without end
            continue
        path.write_bytes(text)
        answer(lambda: open_run(tmp_path / "run"), RunError)


def test_reading_a_cache_writes_nothing_there(data: tuple[Path, Path], tmp_path: Path) -> None:
    cache, manifest = data
    before = tree(cache)
    assert run("cache", "info", cache, "--manifest", manifest, "--json").exit_code == 0
    assert run("cache", "verify", cache).exit_code == 0
    options = ("--heads", "logistic", "--configs", "1", "--folds", "2", "--jobs", "1")
    done = run("sweep", cache, manifest, "--out", tmp_path / "run", *options)
    assert done.exit_code == 0, done.output
    load_embeddings(cache, manifest)
    assert tree(cache) == before


# --- images ---


def test_a_png_that_inflates_without_end_is_refused_soon() -> None:
    header, end = encode(NOISE, "PNG")[:33], chunk(b"IEND", b"")
    stream = zlib.compressobj(9)
    black = stream.compress(bytes(1 << 20)) + stream.flush(zlib.Z_FULL_FLUSH)
    more = stream.compress(bytes(1 << 20)) + stream.flush(zlib.Z_FULL_FLUSH)
    bomb = black + more * 5_000  # 5 GB
    began = time.process_time()
    with pytest.raises(ImageError, match="far beyond its last row"):
        decode_image(header + chunk(b"IDAT", bomb) + end)
    assert time.process_time() - began < PROMPT


def test_a_png_with_a_little_too_much_is_read() -> None:
    plain = np.zeros((4, 4), np.uint8)
    plain[0, 0] = 9  # and the last row is black, as is what is not there
    whole = encode(plain, "PNG")
    body = zlib.compress(b"\0\x09" + bytes(4 * 5 - 2 + 1000))
    again = whole[:33] + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert np.array_equal(decode_image(again).pixels, plain)


# --- names and links ---

NAMES = [
    *("nfc-\u00e9.png", "nfd-e\u0301.png", "two  spaces .png", 'it\'s "quoted".png', "a\nb.png"),
    *("-rf.png", "骨折.png", "tab\tcolon:semi;.png", "$(x) `y` %s {z}.png", "r\rn.png"),
    *("x" * 251 + ".png", "comma,.png", "\x1b[31mred.png", "a..b.png", "a..png"),
]


def test_images_of_any_name_are_listed_hashed_embedded_and_shown(tmp_path: Path) -> None:
    images = tmp_path / "images -ü '\"\n"
    folder = images / "train" / "hand"
    made = list(write_images(folder, len(NAMES)).rows["image"])
    for old, new in zip(made, NAMES, strict=True):
        (folder / old).rename(folder / new)
    recipe = tmp_path / "any.toml"
    recipe.write_text(
        'name = "any"\nlicence = "x"\ncitation = "x"\nurl = "x"\nlayout = "folders"\n'
        'label_level = "image"\n[folders]\npattern = "{split}/{region}/*"\n'
        '[groups]\nrule = "image"\n'
    )
    out = tmp_path / "m ö.csv"
    built = run("manifest", "build", recipe, "--image-root", images, "-o", out, "--json")
    assert built.exit_code == 0, built.output
    assert json.loads(built.stdout)["images"] == len(NAMES)
    manifest = read_manifest(out)
    assert sorted(manifest.rows["image"]) == sorted(f"train/hand/{name}" for name in NAMES)
    report = extract(manifest, images, HalvesEncoder(), tmp_path / "cache", decoders=1)
    assert (report.embedded, report.failed) == (len(NAMES), 0)
    assert len(load_embeddings(tmp_path / "cache", out).X) == len(NAMES)
    (folder / "\x1b[31mred.png").write_bytes(b"")
    checked = run("manifest", "check", out, "--image-root", images)
    assert checked.exit_code == 1
    assert "\x1b" not in checked.output
    assert r"\x1b[31mred.png is not the manifest's" in checked.output


@pytest.mark.parametrize("name", ["../x.png", "/etc/hostname", "a/../../x.png", "..\\x.png"])
def test_a_manifest_that_leaves_the_root_is_refused_before_any_work(
    name: str, tmp_path: Path
) -> None:
    manifest = write_images(tmp_path / "images", 2)
    (tmp_path / "x.png").write_bytes((tmp_path / "images" / "000.png").read_bytes())
    write_manifest(manifest, tmp_path / "m.csv")
    text = (tmp_path / "m.csv").read_text().replace("000.png", name, 1)
    (tmp_path / "m.csv").write_text(text)
    options = ("--image-root", tmp_path / "images", "--encoder", "demo", "--cache")
    done = run("extract", tmp_path / "m.csv", *options, tmp_path / "cache")
    assert done.exit_code == 1
    assert "may leave the image root" in done.output
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["file", "directory", "parent"])
def test_a_link_out_of_the_root_is_never_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "images", tmp_path / "outside"
    write_images(root, 1)
    write_images(outside, 3, seed=1)
    link = {"file": "z.png", "directory": "z/002.png", "parent": "z/outside/002.png"}[kind]
    target = {"file": outside / "002.png", "directory": outside, "parent": tmp_path}[kind]
    (root / link.split("/")[0]).symlink_to(target)
    rows = list_images(root).rows.iloc[:1]
    other = list_images(outside).rows.iloc[2:].assign(image=link)
    manifest = Manifest(pd.concat([rows, other], ignore_index=True), "study")
    with pytest.raises(ManifestError, match="leads out of the image root"):
        extract(manifest, root, HalvesEncoder(), tmp_path / "cache", decoders=1)
    write_manifest(manifest, tmp_path / "m.csv")
    checked = run("manifest", "check", tmp_path / "m.csv", "--image-root", root)
    assert checked.exit_code == 1
    assert "leads out of the image root" in checked.output


def test_another_file_put_in_place_of_an_image_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "images", tmp_path / "outside"
    manifest = write_images(root, 3)
    write_images(outside, 3, seed=1)
    (root / "001.png").write_bytes((outside / "001.png").read_bytes())
    with pytest.raises(ManifestError, match=r"1 image\(s\) hold other bytes than the manifest"):
        extract(manifest, root, HalvesEncoder(), tmp_path / "cache", decoders=1)
    done = open_cache(tmp_path / "cache").is_done(keys_from_hex(manifest.rows["sha256"].tolist()))
    assert done.tolist() == [True, False, True]


def test_names_that_are_no_unicode_can_be_written_down(tmp_path: Path) -> None:
    name = os.fsdecode(b"r\xff\xc3\xa9n")
    assert json.loads(json_bytes({"out": name})) == {"out": name}
    assert json_bytes({"out": "é"}) == '{\n  "out": "é"\n}\n'.encode()
    create_run(tmp_path / name, {"seed": 1}, details={"command": f"sweep --out {name}"})
    assert open_run(tmp_path / name).info.command.endswith(name)


def test_a_manifest_below_a_name_that_is_no_unicode_is_read(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    for suffix in (".csv", ".parquet"):
        write_manifest(make_manifest(make_table(3), "study"), folder / f"m{suffix}")
        done = run("manifest", "check", folder / f"m{suffix}", "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["problems"] == []


# --- streams, locales, homes, disks, clocks ---


def test_terminals_are_not_commanded_by_names() -> None:
    assert printable("a\x1b[2J\x9b\x07\x7fé骨\n\tb") == "a\\x1b[2J\\x9b\\x07\\x7fé骨\n\tb"


def test_control_characters_of_a_path_do_not_reach_the_terminal(tmp_path: Path) -> None:
    done = run("cache", "info", tmp_path / "\x1b[2Jno")
    assert done.exit_code == 1
    assert "\x1b" not in done.output
    assert r"\x1b[2Jno" in done.output


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "utf-8"])
def test_json_is_whole_whatever_stdout_can_write(
    charset: str, data: tuple[Path, Path], tmp_path: Path
) -> None:
    named = tmp_path / "骨 é"
    named.symlink_to(data[0])
    runner = CliRunner(charset=charset)
    done = runner.invoke(main, ["cache", "info", str(named), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout_bytes.decode(charset))["path"] == str(named)
    done = runner.invoke(main, ["cache", "info", os.fsdecode(bytes(named) + b"\xff/.."), "--json"])
    assert done.exit_code == 1  # no such directory; the message holds half a character


def start(code: str, cwd: Path, closing: str = "", **variables: str) -> "subprocess.Popen[bytes]":
    environment = {name: os.environ[name] for name in ("PATH",)} | variables
    command = ["sh", "-c", f'exec "$0" "$@" {closing}', sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes)  # type: ignore[call-overload]


def test_a_process_without_locale_home_and_width_says_all(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also prints to a stdout that has not the characters; all at once, to spend few seconds."""
    (tmp_path / "é骨").symlink_to(data[0])
    write_manifest(make_manifest(make_table(1).assign(image="骨.png"), "study"), tmp_path / "m.csv")
    code = "import sys\nfrom medembed.__main__ import run\nsys.argv[1:] = {}\nrun()"
    nowhere = {"HOME": "/dev/null/x", "XDG_CACHE_HOME": "/dev/null/c", "COLUMNS": "1"}
    posix = nowhere | {"LC_ALL": "POSIX", "TERM": "dumb"}
    bare = posix | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    info = code.format(["cache", "info", "é骨", "--json"])
    text = code.format(["cache", "info", "é骨"])
    bytewise = code.format("['manifest', 'check', 'm.csv', '--image-root', '.']")
    asked = [
        start(info, tmp_path, **posix),
        start(text, tmp_path, **nowhere, LC_ALL="C.UTF-8", PYTHONIOENCODING="latin-1"),
        start(bytewise, tmp_path, **bare),
        start(info, tmp_path, closing=">&- 2>&- <&-", **posix),
    ]
    (out, err), (latin, no_err), (_, locale), (nothing, silence) = (p.communicate() for p in asked)
    assert json.loads(out)["path"] == "é骨"
    assert (err, no_err) == (b"", b"")
    assert b"\npath: \xe9\\u9aa8\n" in latin
    assert b"is not a usable path: 'ascii' codec" in locale
    assert locale.count(b"Error: ") == 1
    assert (nothing, silence) == (b"", b"")
    assert [process.returncode for process in asked] == [0, 0, 1, 0]


def test_a_file_of_ours_never_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "from medembed.__main__ import _open_standard_streams as fill\n"
        "import os\nfill()\nfile = open('ours', 'wb')\n"
        "os.write(1, b'noise')\nos.write(2, b'noise')\n"
        "raise SystemExit(file.fileno())"
    )
    process = start(code, tmp_path, closing=">&- 2>&- <&-")
    process.communicate()
    assert process.returncode > 2
    assert (tmp_path / "ours").read_bytes() == b""


def test_a_limit_on_the_size_of_files_leaves_no_manifest(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    manifest = read_manifest(data[1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("m.csv", "m.parquet"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                write_manifest(manifest, tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_jumps_changes_no_duration_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.cycle([0.0, 4e9, -4e9, 1e6])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    manifest = write_images(tmp_path / "images", 6)
    done: list[int] = []
    report = extract(
        manifest,
        tmp_path / "images",
        HalvesEncoder(),
        tmp_path / "cache",
        decoders=1,
        batch_size=2,
        commit_seconds=1e6,
        progress=lambda n, _: done.append(n),
    )
    assert report.embedded == 6
    assert 0 < report.seconds < 60
    assert done == sorted(done)
    assert len(open_cache(tmp_path / "cache")._index.refresh().paths) == 1


def test_no_duration_is_taken_from_the_wall_clock() -> None:
    package = Path(medembed.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    found = [
        path.name for path, text in sources.items() if re.search(r"\btime\.time(_ns)?\b", text)
    ]
    assert found == []
