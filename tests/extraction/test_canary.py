"""The canary: a run that embeds otherwise than its cache was begun is refused, others pass."""

import contextlib
import copy
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from medembed.cache.spec import CacheSpec
from medembed.cache.store import create_cache, open_cache
from medembed.core.errors import CacheError, NonFiniteError, SpecMismatchError
from medembed.core.files import json_digest
from medembed.encoders import hub
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import Preprocessing
from medembed.encoders.protocol import Encoder
from medembed.extraction import canary
from medembed.extraction.canary import (
    CANARY_FILES,
    TOLERANCE,
    canary_pixels,
    check_canary,
    compute_canary,
)
from medembed.images.decode import decode_image
from tools import canary_images

POOLINGS = ("mean", "max", "grid4")
HERE = {"precision": "fp32", "device": "cpu", "versions": {"torch": "2.13.0", "pillow": "13.0"}}
ASSETS = Path(canary.__file__).parent / "assets" / "canary"


def make_random(directory: Path, side: int) -> None:
    """Save a random SigLIP tower of `side` pixels by transformers' own means."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=side,
        patch_size=16,
        vision_use_head=False,
    )
    model = SiglipVisionModel(config)
    for parameter in model.parameters():  # biases and norms start as constants: move them
        parameter.data += 0.02 * torch.randn_like(parameter)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(directory)
    processor = json.loads((hub._DEMO_PATH / "preprocessor_config.json").read_text())
    processor["size"] = {"height": side, "width": side}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))


@pytest.fixture(scope="module", params=["demo", "random 224"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "tower"
    if request.param == "demo":
        shutil.copytree(hub._DEMO_PATH, directory)
    else:
        make_random(directory, 224)
    return directory


@pytest.fixture(scope="module")
def laid(checkpoint: Path) -> dict[str, Any]:
    """Lay the canary of a checkpoint, as it comes back from `cache.json`."""
    document = compute_canary(load_encoder(checkpoint, device="cpu"), POOLINGS)
    return dict(json.loads(json.dumps(document, allow_nan=False)))


def check(document: Mapping[str, Any], encoder: Encoder, **changes: Any) -> float:
    options: dict[str, Any] = {"batch_size": 4, "there": HERE, "here": HERE, "cache_path": "c"}
    poolings = changes.pop("poolings", POOLINGS)
    return check_canary(document, encoder, poolings, **(options | changes))


@dataclass
class Inverted:
    """An encoder whose images arrive with black and white exchanged."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
        return dict(self.inner.encode(255 - pixels, poolings))


def altered(checkpoint: Path, tmp_path: Path, **processor: Any) -> Path:
    """Copy a checkpoint and change its preprocessing."""
    target = tmp_path / "altered"
    shutil.copytree(checkpoint, target)
    path = target / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | processor))
    return target


def with_blocks_swapped(checkpoint: Path, tmp_path: Path) -> Path:
    target = altered(checkpoint, tmp_path)
    tensors = load_file(target / "model.safetensors")
    pairs = {"layers.1.": "layers.2.", "layers.2.": "layers.1."}

    def swapped(name: str) -> str:
        block = next((block for block in pairs if block in name), None)
        return name if block is None else name.replace(block, pairs[block])

    renamed = {swapped(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def load(checkpoint: Path, **options: Any) -> Encoder:
    return load_encoder(checkpoint, device="cpu", **options)


FAULTS: dict[str, Callable[[Path, Path], Encoder]] = {
    "bicubic": lambda a, to: load(altered(a, to, resample=3)),
    "inverted": lambda a, _: Inverted(load(a)),
    "mean": lambda a, to: load(altered(a, to, image_mean=[0.48] * 3)),
    "std": lambda a, to: load(altered(a, to, image_std=[0.45] * 3)),
    "blocks": lambda a, to: load(with_blocks_swapped(a, to)),
    "pad": lambda a, _: load(a, fit="pad"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_under_every_pooling(
    fault: str, checkpoint: Path, laid: dict[str, Any], tmp_path: Path
) -> None:
    encoder = FAULTS[fault](checkpoint, tmp_path)
    for pooling in POOLINGS:
        with pytest.raises(SpecMismatchError, match=f"in pooling {pooling} "):
            check(laid, encoder, poolings=(pooling,))
    with pytest.raises(SpecMismatchError):
        check(laid, encoder)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_another_batch_size_passes(checkpoint: Path, laid: Any, batch_size: int) -> None:
    assert check(laid, load(checkpoint), batch_size=batch_size) < 1e-4


def test_another_number_of_threads_passes(checkpoint: Path, laid: dict[str, Any]) -> None:
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if usual > 1 else 2)
        assert check(laid, load(checkpoint)) < 1e-4
    finally:
        torch.set_num_threads(usual)


def test_bfloat16_passes_under_every_pooling(checkpoint: Path, laid: dict[str, Any]) -> None:
    encoder = load(checkpoint, precision="bf16")
    for pooling in POOLINGS:
        assert 1e-4 < check(laid, encoder, poolings=(pooling,)) < TOLERANCE


def test_the_images_are_what_their_formulas_draw() -> None:
    assert tuple(canary_images.IMAGES) == CANARY_FILES
    for name, (draw, options) in canary_images.IMAGES.items():
        file = io.BytesIO()
        draw().save(file, {".png": "PNG", ".jpg": "JPEG"}[Path(name).suffix], **options)
        drawn = decode_image(file.getvalue()).pixels.astype(int)
        packaged = decode_image((ASSETS / name).read_bytes()).pixels.astype(int)
        assert np.mean(np.abs(drawn - packaged) > 3) < 1e-3  # a sine's last bit; a JPEG codec


def test_the_images_are_of_four_kinds_small_and_never_of_a_towers_size() -> None:
    images = [Image.open(io.BytesIO((ASSETS / name).read_bytes())) for name in CANARY_FILES]
    kinds = [(image.format, image.mode) for image in images]
    assert kinds == [("PNG", "L"), ("JPEG", "RGB"), ("PNG", "I;16"), ("PNG", "RGBA")]
    assert sum((ASSETS / name).stat().st_size for name in CANARY_FILES) < 150_000
    assert {path.name for path in ASSETS.iterdir()} == set(CANARY_FILES)
    for image in images:
        assert image.width != image.height
        assert not {112, 128, 224, 256, 384, 448, 512, 896} & set(image.size)


def gray_mean(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float64).mean((1, 2))


@dataclass
class GreyEncoder:
    """Embed an image as its mean grey value: small enough to compute by hand."""

    source: str = "grey"
    revision: str | None = None
    fingerprint: str = "ab" * 32
    preprocessing: Preprocessing = field(
        default_factory=lambda: Preprocessing(
            8, 12, "stretch", "bilinear", (0.5,) * 3, (0.5,) * 3, 1 / 255
        )
    )
    dimensions: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"mean": (1,)})
    device: str = "cpu"
    precision: str = "fp32"
    moved: float = 0.0  # added to the third image, which is the darkest
    seen: list[np.ndarray] = field(default_factory=list)

    def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
        self.seen.append(pixels)
        grey = gray_mean(pixels)
        dark = canary_pixels(self.preprocessing)[2]
        grey[(pixels == dark).all(axis=(1, 2))] += self.moved
        return {name: grey[:, None].astype(np.float32) for name in poolings}


def test_the_distance_is_in_medians_between_different_images() -> None:
    grey = gray_mean(canary_pixels(GreyEncoder().preprocessing))
    gaps = sorted(abs(a - b) for i, a in enumerate(grey) for b in grey[:i])
    yardstick = (gaps[2] + gaps[3]) / 2
    document = compute_canary(GreyEncoder(), ["mean"])
    for share in (0.0, 0.01, 0.0199):
        encoder = GreyEncoder(moved=share * yardstick)
        assert check(document, encoder, poolings=("mean",)) == pytest.approx(share, abs=1e-6)
    with pytest.raises(SpecMismatchError, match=r"rings\.png comes out 0\.020 median"):
        check(document, GreyEncoder(moved=0.0201 * yardstick), poolings=("mean",))


def test_canaries_are_laid_one_by_one_and_checked_in_full_batches() -> None:
    encoder = GreyEncoder()
    document = compute_canary(encoder, ["mean"])
    assert [pixels.shape for pixels in encoder.seen] == [(1, 8, 12)] * 4
    encoder.seen.clear()
    assert check(document, encoder, poolings=("mean",), batch_size=3) == 0.0
    assert [pixels.shape for pixels in encoder.seen] == [(3, 8, 12)] * 2
    assert not encoder.seen[1][1:].any()
    np.testing.assert_array_equal(
        np.concatenate(encoder.seen)[:4], canary_pixels(encoder.preprocessing)
    )


def test_the_worst_pooling_decides() -> None:
    class Two(GreyEncoder):
        def __init__(self, **known: Any) -> None:
            super().__init__(dimensions={"mean": (1,), "max": (1,)}, **known)

        def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
            steady = GreyEncoder().encode(pixels, ["mean"])
            return {**super().encode(pixels, ["max"]), **steady}

    document = compute_canary(Two(), ["mean", "max"])
    near = check(document, Two(moved=0.1), poolings=("mean", "max"))
    assert near == check(document, Two(moved=0.1), poolings=("max",)) > 0
    with pytest.raises(SpecMismatchError, match="in pooling max "):
        check(document, Two(moved=99.0), poolings=("mean", "max"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    document = compute_canary(GreyEncoder(), ["mean"])
    with pytest.raises(NonFiniteError, match="mean embeddings are not finite"):
        check(document, GreyEncoder(moved=value), poolings=("mean",))


def test_an_encoder_that_tells_no_images_apart_passes_only_if_equal() -> None:
    class Blind(GreyEncoder):
        def encode(self, pixels: np.ndarray, poolings: Sequence[str]) -> dict[str, np.ndarray]:
            return {name: np.full((len(pixels), 1), self.moved, np.float32) for name in poolings}

    document = compute_canary(Blind(), ["mean"])
    assert check(document, Blind(), poolings=("mean",)) == 0.0
    with pytest.raises(SpecMismatchError):
        check(document, Blind(moved=1e-6), poolings=("mean",))


REFUSALS = [
    (
        {},
        "What differs: none of library versions, precision and device, so the weights or the "
        "code. Choose another --cache.",
    ),
    (
        {"precision": "bf16"},
        "What differs: precision (fp32 for its canary, bf16 here). Choose another --cache, or "
        "give --precision fp32.",
    ),
    (
        {"device": "cuda", "versions": {"torch": "2.14.0", "numpy": "2.4"}},
        "What differs: device (cpu there, cuda here), torch (2.13.0 there, 2.14.0 here), pillow "
        "(13.0 there, none here), numpy (none there, 2.4 here). Choose another --cache, or "
        "compute as the cache's first run did.",
    ),
]


@pytest.mark.parametrize(("change", "text"), REFUSALS)
def test_a_refusal_is_one_line_that_names_what_differs(change: dict[str, Any], text: str) -> None:
    document = compute_canary(GreyEncoder(), ["mean"])
    with pytest.raises(SpecMismatchError) as caught:
        check(document, GreyEncoder(moved=99.0), poolings=("mean",), here=HERE | change)
    message = str(caught.value)
    assert message.startswith(
        "this run embeds otherwise than the first run of the cache at c: of its canary images, "
        "rings.png comes out "
    )
    assert message.endswith(text)
    assert "\n" not in message


def damage_numbers(document: dict[str, Any]) -> None:
    packed = document["embeddings"]["mean"]
    packed["float32"] = packed["float32"].replace(packed["float32"][3], "x", 1)


def damage_with_nan(document: dict[str, Any]) -> None:
    document["embeddings"]["mean"] = canary._pack(np.full((4, 1), np.nan))


def damage_shape(document: dict[str, Any]) -> None:
    document["embeddings"]["mean"]["shape"] = [5, 1]


DAMAGES: list[Callable[[dict[str, Any]], object]] = [
    damage_numbers,
    damage_with_nan,
    damage_shape,
    lambda document: document.pop("sha256"),
    lambda document: document.pop("version"),
    lambda document: document.pop("images"),
    lambda document: document["embeddings"].pop("mean"),
    lambda document: document.update(embeddings=[1, 2]),
    lambda document: document.update(images=None),
    lambda document: document["embeddings"]["mean"].update(float32="?"),
]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_canary_is_told_from_another_embedding(
    damage: Callable[[dict[str, Any]], object], hidden: bool
) -> None:
    document = compute_canary(GreyEncoder(), ["mean"])
    damage(document)
    if hidden and "sha256" in document:  # as if it had been written so
        content = {key: value for key, value in document.items() if key != "sha256"}
        document["sha256"] = json_digest(content)
        if damage is damage_numbers:
            return  # then it is another embedding
    with pytest.raises(CacheError, match="is damaged: ") as caught:
        check(document, GreyEncoder(), poolings=("mean",))
    assert not isinstance(caught.value, SpecMismatchError)


def test_other_canary_images_are_told_from_another_embedding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = compute_canary(GreyEncoder(), ["mean"])
    with pytest.raises(CacheError, match=r"of version 2; this medembed brings version 1"):
        check({**document, "version": 2}, GreyEncoder(), poolings=("mean",))
    images = document["images"] | {"haze.jpg": "00"}
    with pytest.raises(CacheError, match=r"another canary image haze\.jpg"):
        check({**document, "images": images}, GreyEncoder(), poolings=("mean",))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    spec = CacheSpec("ab" * 32, {"size": [8, 12]}, {"mean": (1,)}, "float32")
    document = compute_canary(GreyEncoder(), ["mean"])
    return create_cache(tmp_path / "cache", spec, HERE, document).path


def test_a_canary_lives_in_its_cache(made: Path) -> None:
    cache = open_cache(made)
    assert cache.card()["canary"] is True
    assert cache.canary == compute_canary(GreyEncoder(), ["mean"])
    other = copy.deepcopy(cache.canary)
    assert create_cache(made, cache.spec, HERE, {**other, "sha256": ""}).canary == cache.canary
    assert check(cache.canary, GreyEncoder(), poolings=("mean",)) == 0.0
