"""The oracle is transformers' own model with its own tokenizer, on small random checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Hub, ask, serving
from made_towers import save as save_tower
from made_words import LENGTH, make_clip, make_siglip
from safetensors.torch import load_file, save, save_file

from medembed.core.errors import EncoderError
from medembed.core.prompts import PromptEntry, Prompts, PromptsDocument
from medembed.encoders.loading import load_encoder
from medembed.encoders.text_tower import TextTower, load_text_tower

TEXTS = ["A radiograph, of a NORMAL hand!", "no acute finding", "a displaced fracture (shoulder)"]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("words") / "siglip"
    return directory, make_siglip(directory)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("words") / "clip"
    return directory, make_clip(directory)


def prompts_of(tower: TextTower, texts: list[str] = TEXTS) -> Prompts:
    labels = ["normal", "abnormal", "abnormal"]
    entries = [
        PromptEntry(set="s", label=label, region=None, text=text)
        for label, text in zip(labels, texts, strict=True)
    ]
    document = PromptsDocument(
        encoder="ab" * 32,
        text_encoder=tower.fingerprint,
        source=tower.source,
        revision=None,
        logit_scale=tower.logit_scale,
        logit_bias=tower.logit_bias,
        prompts=entries,
    )
    return Prompts(document, tower.embed(texts), tower.image_projection)


def ask_transformers(directory: Path, model: Any, texts: list[str] = TEXTS) -> tuple[Any, Any]:
    """Return logits_per_image and the image tower's pooled vectors of eight random images."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    given = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(pixel_values=pixels, **given).logits_per_image
        pooled = model.vision_model(pixel_values=pixels).pooler_output
    return logits.double().numpy(), pooled.numpy()


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_logits_of_cached_vectors_are_transformers_own(kind: str, request: Any) -> None:
    directory, model = request.getfixturevalue(kind)
    logits, pooled = ask_transformers(directory, model)
    prompts = prompts_of(load_text_tower(directory))
    scale = np.abs(logits).max()
    assert np.abs(prompts.logits(pooled) - logits).max() <= 1e-5 * scale
    stored = pooled.astype(np.float16).astype(np.float32)
    assert np.abs(prompts.logits(stored) - logits).max() <= 1e-3 * scale


def test_a_tokenizer_with_a_mask_is_followed(tmp_path: Path) -> None:
    model = make_siglip(tmp_path / "masked", masked=True)
    logits, pooled = ask_transformers(tmp_path / "masked", model)
    prompts = prompts_of(load_text_tower(tmp_path / "masked"))
    assert np.abs(prompts.logits(pooled) - logits).max() <= 1e-5 * np.abs(logits).max()


def test_padding_to_the_longest_text_would_be_another_vector(
    siglip: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SigLIP reads the last position: the comparison above fails if the padding is wrong."""
    directory, model = siglip
    logits, pooled = ask_transformers(directory, model)
    tower = load_text_tower(directory)
    assert tower.tokenize(TEXTS)["input_ids"].shape == (3, LENGTH)

    def pad_wrongly(_: TextTower, texts: list[str]) -> dict[str, Any]:
        return dict(tower.tokenizer(list(texts), padding=True, return_tensors="pt"))

    monkeypatch.setattr(TextTower, "tokenize", pad_wrongly)
    wrong = prompts_of(tower).logits(pooled)
    assert np.abs(wrong - logits).max() > 1e-2 * np.abs(logits).max()


def test_case_and_punctuation_are_the_tokenizers(siglip: tuple[Path, Any]) -> None:
    tower = load_text_tower(siglip[0])
    loud, quiet = tower.embed(["A Radiograph, of a normal HAND!", "a radiograph of a normal hand"])
    assert np.array_equal(loud, quiet)


def test_the_image_tower_of_the_checkpoint_pools_what_the_prompts_need(
    siglip: tuple[Path, Any],
) -> None:
    directory, model = siglip
    encoder = load_encoder(directory, device="cpu", precision="fp32")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16), dtype=np.uint8)
    pooled = encoder.encode(pixels, ["pooler"])["pooler"]
    values = torch.from_numpy(pixels / 127.5 - 1).float()[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        expected = model.vision_model(pixel_values=values).pooler_output.numpy()
    assert np.allclose(pooled, expected, atol=1e-5)


def test_the_fingerprint_names_the_text_tower_alone(
    siglip: tuple[Path, Any], tmp_path: Path
) -> None:
    directory = siglip[0]
    known = load_text_tower(directory).fingerprint
    for name, is_same in (("vision_model.post_layernorm.bias", True), ("logit_bias", False)):
        changed = tmp_path / name
        shutil.copytree(directory, changed)
        tensors = load_file(changed / "model.safetensors")
        tensors[name] = tensors[name] + 1
        save_file(tensors, changed / "model.safetensors", {"format": "pt"})
        assert (load_text_tower(changed).fingerprint == known) == is_same


def test_only_the_towers_and_the_tokenizer_are_fetched(
    siglip: tuple[Path, Any], tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in siglip[0].iterdir()}
    tensors = load_file(siglip[0] / "model.safetensors")
    ballast = {"decoder.weight": torch.ones(1 << 19)}
    files["model.safetensors"] = save({**tensors, **ballast})
    with serving(Hub()) as hub:
        hub.put("google/siglip", files)
        (answer,) = ask(hub.address, tmp_path / "home", "google/siglip", TEST_WORDS="1")
        fetched = sum(r.sent for r in hub.requests if r.path.endswith("model.safetensors"))
    assert fetched < 2 * sum(tensor.nbytes for tensor in tensors.values())  # headers, twice
    assert {"medembed-text-tower.safetensors", "spiece.model"} <= set(answer["files"])
    snapshot = next((tmp_path / "home").rglob("medembed-text-tower.safetensors")).parent
    found = load_text_tower(snapshot)
    assert found.fingerprint == load_text_tower(siglip[0]).fingerprint
    assert np.array_equal(found.embed(TEXTS), load_text_tower(siglip[0]).embed(TEXTS))


# What is refused


def test_a_text_that_is_too_long_or_empty_is_refused(siglip: tuple[Path, Any]) -> None:
    tower = load_text_tower(siglip[0])
    with pytest.raises(EncoderError, match=rf"reads 1 to {LENGTH}. Write another one"):
        tower.embed(["a radiograph of a wrist " * 20])
    with pytest.raises(EncoderError, match="is empty"):
        tower.embed([" "])


def test_medgemma_has_no_partner_in_words(tmp_path: Path) -> None:
    gemma = save_tower(tmp_path / "gemma", "gemma")
    with pytest.raises(EncoderError, match="has no partner in words"):
        load_text_tower(gemma)
    with pytest.raises(EncoderError, match="no text tower beside its image tower"):
        load_text_tower(save_tower(tmp_path / "tower", "siglip"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text_model.head.bias", "lacks text_model.head.bias"),
        ("logit_scale", "lacks logit_scale"),
    ],
)
def test_a_missing_tensor_is_named(
    siglip: tuple[Path, Any], tmp_path: Path, name: str, words: str
) -> None:
    shutil.copytree(siglip[0], tmp_path / "cut")
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=words):
        load_text_tower(tmp_path / "cut")


def test_code_and_damaged_files_of_a_tokenizer_are_refused(
    siglip: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(siglip[0], tmp_path / "coded")
    path = tmp_path / "coded" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"x": "y.Z"}}))
    with pytest.raises(EncoderError, match="brings code for its tokenizer"):
        load_text_tower(tmp_path / "coded")
    shutil.copytree(siglip[0], tmp_path / "torn")
    (tmp_path / "torn" / "spiece.model").write_bytes(b"torn")
    with pytest.raises(EncoderError, match="cannot be read"):
        load_text_tower(tmp_path / "torn")
