import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from made_extraction import list_images
from PIL import Image

from medembed.cache.embeddings import load_embeddings
from medembed.cli import main
from medembed.dataset.manifest import Manifest, read_manifest, write_manifest
from medembed.encoders.loading import load_encoder
from medembed.extraction import extract


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Ten films of five patients, embedded with the demo's encoder, and one that is not."""
    home = tmp_path_factory.mktemp("similar")
    generator = np.random.default_rng(0)
    (home / "images").mkdir()
    for number in range(11):
        pixels = generator.integers(0, 256, (48, 64), dtype=np.uint8)
        place = home / ("images" if number < 10 else "") / f"secret{number}.png"
        Image.fromarray(pixels).resize((96, 96)).save(place)
    rows = list_images(home / "images").rows
    rows["patient"] = [f"jane{number // 2}" for number in range(10)]
    manifest = Manifest(rows, "study")
    write_manifest(manifest, home / "manifest.csv")
    encoder = load_encoder("demo", device="cpu", precision="fp32")
    extract(manifest, home / "images", encoder, home / "cache", decoders=1)
    return home


def run(home, *options):
    arguments = ["similar", home / "cache", home / "manifest.csv", *options]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def document(home, *options):
    ran = run(home, *options, "--json")
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


def test_a_film_is_found_by_file_hash_and_row_alike(home):
    rows = read_manifest(home / "manifest.csv").rows
    by_row = document(home, "--image", 5, "-k", 3)
    assert by_row["query"] == {
        "sha256": rows["sha256"][4],
        "row": 5,
        "image": None,
        "study": None,
        "region": "hand",
        "label": 0,
        "in_cache": True,
    }
    assert document(home, "--image", rows["sha256"][4].upper(), "-k", 3) == by_row
    assert document(home, "--image", home / "images" / rows["image"][4], "-k", 3) == by_row
    assert (by_row["own"], by_row["compared"], len(by_row["neighbours"])) == (2, 8, 3)
    own = set(rows["sha256"][4:6])
    assert not own & {row["sha256"] for row in by_row["neighbours"]}


def test_a_film_that_is_not_in_the_cache_is_embedded_with_its_encoder(home, tmp_path):
    rows = read_manifest(home / "manifest.csv").rows
    known = home / "images" / rows["image"][2]
    copy = tmp_path / "copy.png"
    Image.open(known).save(copy, compress_level=0)  # other bytes, the same pixels
    found = document(home, "--image", copy, "-k", 10)
    assert not found["query"]["in_cache"]
    assert found["query"]["row"] is None
    assert len(found["neighbours"]) == 10
    assert found["neighbours"][0]["sha256"] == rows["sha256"][2]
    assert found["neighbours"][0]["similarity"] == pytest.approx(1, abs=2e-6)
    ran = run(home, "--image", copy)
    assert "not in the manifest, so no patient was left out" in ran.stderr


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_a_contact_sheet_names_films_by_hash_unless_names_are_asked_for(home, tmp_path, suffix):
    sheet = tmp_path / f"sheet{suffix}"
    options = ("--image", 1, "-k", 3, "-o", sheet, "--image-root", home / "images")
    ran = run(home, *options)
    assert ran.exit_code == 0, ran.output
    content = sheet.read_bytes()
    words = ran.output.encode() + content
    assert b"secret" not in words.replace(str(home).encode(), b"")
    assert b"jane" not in words
    if suffix == ".html":
        assert content.count(b"data:image/jpeg;base64,") == 4
        first = document(home, "--image", 1, "-k", 1)["neighbours"][0]["sha256"]
        assert first[:12].encode() in content
        run(home, *options, "--names")
        assert b"secret0.png" in sheet.read_bytes()
    else:
        with Image.open(sheet) as picture:
            assert picture.format == "PNG"
        run(home, *options)
        assert sheet.read_bytes() == content


def test_films_that_are_not_there_are_empty_frames(home, tmp_path):
    sheet = tmp_path / "sheet.html"
    (tmp_path / "empty").mkdir()
    ran = run(home, "--image", 1, "-o", sheet, "--image-root", tmp_path / "empty")
    assert ran.exit_code == 0
    assert "9 of 9 films were not found unchanged" in ran.stderr
    assert sheet.read_text().count("not available") == 9


def test_names_are_shown_where_they_are_asked_for(home):
    ran = run(home, "--image", 1, "--names", "-k", 1)
    assert "secret" in ran.stdout
    assert "secret" not in run(home, "--image", 1, "-k", 1).stdout
    assert document(home, "--image", 1, "--names", "-k", 1)["query"]["image"] == "secret0.png"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("0", "no row 0"),
        ("11", "its rows are 1 to 10"),
        ("9" * 5000, "its rows are 1 to 10"),
        ("-3", "is no film"),
        ("nothing.png", "is no film"),
        ("ab" * 32, "is not in the cache"),
        ("", "is no film"),
        ("ab" * 33, "is no film"),
        ("²", "is no film"),
    ],
)
def test_what_names_no_film_is_one_error(home, asked, message):
    ran = run(home, f"--image={asked}")
    assert ran.exit_code == 1
    assert message in ran.stderr
    assert ran.stdout == ""


@pytest.mark.parametrize("kind", ["directory", "text", "empty"])
def test_a_file_that_is_no_image_is_one_error(home, tmp_path, kind):
    path = tmp_path / "film.png"
    if kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(b"" if kind == "empty" else b"no image at all")
    ran = run(home, "--image", path)
    assert ran.exit_code == 1
    assert str(path) in ran.stderr
    assert "cannot be" in ran.stderr


def test_another_encoder_than_the_caches_is_refused(home, tmp_path):
    cache = json.loads((home / "cache" / "cache.json").read_text())
    other = tmp_path / "cache"
    other.mkdir()
    cache["spec"]["encoder"] = "cd" * 32
    (other / "cache.json").write_text(json.dumps(cache))
    (other / "shards").mkdir()
    arguments = ["similar", str(other), str(home / "manifest.csv")]
    ran = CliRunner().invoke(main, [*arguments, "--image", str(home / "secret10.png")])
    assert ran.exit_code == 1
    assert "Name the cache's own encoder with --encoder" in ran.stderr


def test_a_sheet_without_images_is_wrong_usage(home):
    for options in (
        ("-o", "sheet.png"),
        ("--image-root", "."),
        ("-o", "x.pdf", "--image-root", "."),
    ):
        assert run(home, "--image", 1, *options).exit_code == 2


def test_the_embedding_of_a_new_film_is_what_the_cache_would_hold(home):
    from medembed.cache.store import open_cache
    from medembed.prediction.similar import Film, embed_film

    path = home / "images" / "secret4.png"
    film = Film(hashlib.sha256(Path(path).read_bytes()).hexdigest(), path, None, False)
    embeddings = load_embeddings(home / "cache", home / "manifest.csv")
    place = list(embeddings.rows["sha256"]).index(film.sha256)
    found = embed_film(film, open_cache(home / "cache"))
    np.testing.assert_array_equal(found, embeddings.X[place])
