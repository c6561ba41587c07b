"""`medembed prompts`: from sentences to a file that a sweep of the same checkpoint takes."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from made_sweeps import make_table
from made_towers import save as save_tower
from made_words import make_siglip

from medembed.cli import main
from medembed.core.errors import PathNotFoundError, RecipeError
from medembed.core.prompts import read_prompts
from medembed.dataset.manifest import make_manifest, write_manifest
from medembed.encoders.loading import load_encoder
from medembed.encoders.text_tower import load_text_tower
from medembed.extraction.prompts import embed_prompts, read_prompt_file

FLAT = 'normal = ["a normal {region}"]\nabnormal = ["a fracture", "an implant"]\n'


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prompts") / "siglip"
    make_siglip(directory)
    return directory


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_command_fills_in_regions_and_names_the_image_tower(
    siglip: Path, tmp_path: Path
) -> None:
    write_manifest(make_manifest(make_table(12), "study"), tmp_path / "manifest.csv")
    words = ["prompts", str(write(tmp_path / "p.toml", FLAT)), "--encoder", str(siglip)]
    words += ["--manifest", str(tmp_path / "manifest.csv"), "-o", str(tmp_path / "p.safetensors")]
    ran = CliRunner().invoke(main, [*words, "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["classes"] == {"normal": 2, "abnormal": 2}
    prompts = read_prompts(tmp_path / "p.safetensors")
    texts = [entry.text for entry in prompts.document.prompts]
    assert texts == ["a normal hand", "a normal wrist", "a fracture", "an implant"]
    assert prompts.regions == ("hand", "wrist")
    encoder = load_encoder(siglip, device="cpu", precision="fp32")
    assert prompts.document.encoder == encoder.fingerprint
    assert np.array_equal(prompts.text, load_text_tower(siglip).embed(texts))


def test_a_checkpoint_without_words_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    gemma = save_tower(tmp_path / "gemma", "gemma")
    path = write(tmp_path / "p.toml", 'normal = "a"\nabnormal = "b"\n')
    words = ["prompts", str(path), "--encoder", str(gemma), "-o", str(tmp_path / "p.safetensors")]
    ran = CliRunner().invoke(main, words)
    assert ran.exit_code == 1
    assert "has no partner in words" in ran.stderr
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompts"),
        ("normal = [", "cannot be read as TOML"),
        ('normal = ["a"]\n', "has not both classes"),
        ('[s]\nnormal = ["a"]\nabnormal = ["b"]\nother = ["c"]\n', "unknown key 'other'"),
        ("normal = []\nabnormal = ['b']\n", "normal is not a list of prompts"),
        ("normal = ['a', ' ']\nabnormal = ['b']\n", "holds an empty prompt"),
        ("normal = [1]\nabnormal = ['b']\n", "holds an empty prompt, or one that is no text"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read_prompt_file(write(tmp_path / "p.toml", text))


def test_a_region_needs_a_manifest_and_a_missing_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "p.toml", FLAT)
    with pytest.raises(RecipeError, match="Give --manifest M"):
        embed_prompts(path, "demo", tmp_path / "p.safetensors")
    with pytest.raises(PathNotFoundError, match="there is no file"):
        read_prompt_file(tmp_path / "none.toml")


def test_tables_are_sets_of_which_a_prompt_counts_once(tmp_path: Path) -> None:
    text = '[a]\nnormal = "x"\nabnormal = ["y", "y"]\n[b]\nnormal = ["x"]\nabnormal = ["z"]\n'
    found = read_prompt_file(write(tmp_path / "p.toml", text))
    assert found["a"] == {"normal": ["x"], "abnormal": ["y"]}
    assert list(found) == ["a", "b"]
