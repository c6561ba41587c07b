"""The oracle is transformers' own model and image processor, on small random checkpoints."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_gemma import SIZE, TEXT, VISION, make_gemma, quiet
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from medembed.core.errors import EncoderError
from medembed.encoders.devices import set_precision
from medembed.encoders.loading import choose_device, choose_precision, load_encoder, take_own_gpu
from medembed.encoders.preprocessing import Preprocessing, prepare
from medembed.encoders.protocol import Encoder
from medembed.encoders.siglip import SiglipEncoder
from medembed.extraction.canary import check_canary, compute_canary
from medembed.images.decode import decode_image


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("checkpoints") / "gemma"
    return directory, make_gemma(directory)


def rename(directory: Path, target: Path, name: Callable[[str], str]) -> Path:
    shutil.copytree(directory, target)
    tensors = load_file(directory / "model.safetensors")
    renamed = {name(key): value for key, value in tensors.items()}
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def as_4x(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def as_bare(name: str) -> str:
    return f"model.{name}"


def split(directory: Path, target: Path, n_shards: int) -> Path:
    """Spread tensors over shards, the tower's too, and add one that holds none of the tower."""
    shutil.copytree(directory, target)
    tensors = load_file(directory / "model.safetensors")
    (target / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(n_shards):
        names = [name for name in sorted(tensors) if "vision" in name][shard::n_shards]
        file = f"model-{shard + 1:05}-of-{n_shards + 1:05}.safetensors"
        save_file({name: tensors[name] for name in names}, target / file)
        weight_map |= dict.fromkeys(names, file)
    file = f"model-{n_shards + 1:05}-of-{n_shards + 1:05}.safetensors"
    names = [name for name in tensors if "vision" not in name]
    (target / file).write_bytes(b"not opened, since it holds no vision tensor")
    weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def random_images(n: int, shape: tuple[int, int] = (50, 41)) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(n)]


def transformers_tokens(model: Any, directory: Path, images: list[np.ndarray]) -> np.ndarray:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    processor = Gemma3ImageProcessorPil.from_pretrained(directory)
    copies = [Image.fromarray(image).convert("RGB") for image in images]
    inputs = processor(copies, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = model.model.vision_tower(pixel_values=inputs).last_hidden_state
    return np.asarray(tokens.numpy())


def embed(encoder: Encoder, images: list[np.ndarray]) -> dict[str, np.ndarray]:
    prepared = np.stack([prepare(image, encoder.preprocessing) for image in images])
    return encoder.encode(prepared, ["mean", "max"])


def assert_same_direction_and_size(ours: np.ndarray, theirs: np.ndarray) -> None:
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    assert ((ours * theirs).sum(axis=1) / norms).min() >= 0.99999
    assert np.abs(ours - theirs).max() <= 1e-5  # asked: 2e-3; measured: 0


@pytest.mark.parametrize("layout", ["as saved", "4.x", "bare", "sharded", "4.x sharded"])
def test_an_embedding_equals_transformers(
    gemma: tuple[Path, Any], tmp_path: Path, layout: str
) -> None:
    directory, model = gemma
    images = random_images(5)
    tokens = transformers_tokens(model, directory, images)
    if layout.startswith("4.x"):
        directory = rename(directory, tmp_path / "a", as_4x)
    if layout == "bare":
        directory = rename(directory, tmp_path / "b", as_bare)
    if layout.endswith("sharded"):
        directory = split(directory, tmp_path / "c", 3)
    encoder = load_encoder(directory, device="cpu", precision="fp32")
    ours = embed(encoder, images)
    assert_same_direction_and_size(ours["mean"], tokens.mean(axis=1))
    assert_same_direction_and_size(ours["max"], tokens.max(axis=1))
    assert ours["mean"].dtype == np.float32
    assert isinstance(encoder, Encoder)
    usual = {name: shape for name, shape in encoder.dimensions.items() if "@" not in name}
    assert usual == {"mean": (32,), "max": (32,), "grid4": (16, 32)}


def test_real_radiographs_embed_as_in_transformers(
    gemma: tuple[Path, Any], shared_data: Path
) -> None:
    directory, model = gemma
    paths = sorted((shared_data / "fracatlas" / "images" / "Fractured").glob("*.jpg"))[:4]
    images = [decode_image(path.read_bytes()).pixels for path in paths]
    ours = embed(load_encoder(directory, device="cpu"), images)
    tokens = transformers_tokens(model, directory, images)
    assert_same_direction_and_size(ours["mean"], tokens.mean(axis=1))


def test_a_shard_layout_of_transformers_is_read(gemma: tuple[Path, Any], tmp_path: Path) -> None:
    directory, model = gemma
    with quiet():
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(directory / "preprocessor_config.json", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert load_encoder(tmp_path).fingerprint == load_encoder(directory).fingerprint


def test_the_fingerprint_is_of_the_tower_and_not_of_its_storage(
    gemma: tuple[Path, Any], tmp_path: Path
) -> None:
    directory, _ = gemma
    layouts = [
        directory,
        rename(directory, tmp_path / "hub", as_4x),
        rename(directory, tmp_path / "bare", as_bare),
        split(directory, tmp_path / "shards", 2),
    ]
    fingerprints = {load_encoder(layout).fingerprint for layout in layouts}
    assert len(fingerprints) == 1
    assert len(fingerprints.pop()) == 64


@pytest.mark.parametrize("change", ["bit", "dtype", "architecture", "language model"])
def test_the_fingerprint_changes_with_the_tower_alone(
    gemma: tuple[Path, Any], tmp_path: Path, change: str
) -> None:
    directory, _ = gemma
    target = tmp_path / "changed"
    shutil.copytree(directory, target)
    tensors = load_file(directory / "model.safetensors")
    name = "vision_tower.encoder.layers.1.mlp.fc2.bias"
    if change == "bit":
        tensors[name].view(torch.int32)[3] ^= 1
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.bfloat16)
    elif change == "language model":
        tensors["language_model.model.norm.weight"] += 1
    else:
        config = json.loads((target / "config.json").read_text())
        config["vision_config"]["layer_norm_eps"] = 1e-5
        (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")
    same = load_encoder(target).fingerprint == load_encoder(directory).fingerprint
    assert same == (change == "language model")


def test_the_same_bytes_under_another_dtype_are_another_tower(
    gemma: tuple[Path, Any], tmp_path: Path
) -> None:
    half = torch.linspace(0.5, 1.5, 32).to(torch.float16)
    fingerprints = set()
    for kind in (half, half.view(torch.bfloat16)):
        target = tmp_path / str(kind.dtype)
        edit_tensors(gemma[0], target, lambda tensors, kind=kind: tensors.update({BIAS: kind}))
        fingerprints.add(load_encoder(target).fingerprint)
    assert len(fingerprints) == 2


def test_defaults_left_out_of_the_config_are_the_same_architecture(
    gemma: tuple[Path, Any], tmp_path: Path
) -> None:
    directory, _ = gemma
    target = tmp_path / "short"
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    for key in ("hidden_act", "layer_norm_eps", "num_channels", "attention_dropout"):
        del config["vision_config"][key]
    (target / "config.json").write_text(json.dumps(config))
    assert load_encoder(target).fingerprint == load_encoder(directory).fingerprint


@pytest.mark.parametrize("kind", ["siglip", "siglip_vision_model"])
def test_siglip_itself_is_read_with_its_head(tmp_path: Path, kind: str) -> None:
    from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    vision = {**VISION, "vision_use_head": True}
    text = {key: TEXT[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "siglip":
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        tower = model.vision_model
    else:
        model = tower = SiglipVisionModel(SiglipVisionConfig(**vision))
    with quiet():
        model.save_pretrained(tmp_path)
        SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, device="cpu")
    assert isinstance(encoder, SiglipEncoder)
    images = np.stack(random_images(3, (SIZE, SIZE)))
    inputs = torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1) / 255 * 2 - 1
    with torch.no_grad():
        seen = tower.eval()(pixel_values=inputs)
    ours = encoder.encode(images, ["max", "pooler"])
    assert np.abs(ours["max"] - seen.last_hidden_state.numpy().max(axis=1)).max() <= 1e-5
    assert np.abs(ours["pooler"] - seen.pooler_output.numpy()).max() <= 1e-5
    assert encoder.dimensions["pooler"] == (32,)


def with_projector(directory: Path, precision: str = "fp32") -> SiglipEncoder:
    encoder = load_encoder(
        directory, device="cpu", precision=precision, poolings=["mean", "projector"]
    )
    assert isinstance(encoder, SiglipEncoder)
    return encoder


@pytest.mark.parametrize("layout", ["as saved", "4.x", "bare"])
def test_the_projector_equals_transformers(
    gemma: tuple[Path, Any], tmp_path: Path, layout: str
) -> None:
    directory, model = gemma
    if layout != "as saved":
        directory = rename(directory, tmp_path / "named", as_4x if layout == "4.x" else as_bare)
    images = np.stack(random_images(3, (SIZE, SIZE)))
    inputs = torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1) / 255 * 2 - 1
    with torch.no_grad():
        tokens = model.get_image_features(inputs).pooler_output
    encoder = with_projector(directory)
    ours = encoder.encode(images, ["projector"])["projector"]
    assert tokens.shape == (3, 4, 16)
    assert encoder.dimensions["projector"] == (16,)
    assert np.abs(ours - tokens.mean(dim=1).numpy()).max() <= 1e-5
    assert encoder.fingerprint == with_projector(gemma[0]).fingerprint


def test_the_fingerprint_covers_the_projector_only_where_it_is_loaded(
    gemma: tuple[Path, Any], tmp_path: Path
) -> None:
    name = "multi_modal_projector.mm_input_projection_weight"
    moved = edit_tensors(gemma[0], tmp_path / "moved", lambda tensors: tensors[name].add_(1))
    fewer = tmp_path / "fewer"
    shutil.copytree(gemma[0], fewer)
    config = json.loads((fewer / "config.json").read_text())
    (fewer / "config.json").write_text(json.dumps({**config, "mm_tokens_per_image": 1}))
    layouts = [gemma[0], moved, fewer]
    assert len({load_encoder(layout).fingerprint for layout in layouts}) == 1
    assert len({with_projector(layout).fingerprint for layout in layouts}) == 3
    assert "projector" not in load_encoder(gemma[0]).dimensions


def test_a_projector_that_is_not_there_is_refused(gemma: tuple[Path, Any], tmp_path: Path) -> None:
    def remove(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "projector" in name]:
            del tensors[name]

    tower = edit_tensors(gemma[0], tmp_path / "tower", remove)
    assert load_encoder(tower).fingerprint == load_encoder(gemma[0]).fingerprint
    with pytest.raises(EncoderError, match="tower holds no projector"):
        with_projector(tower)
    config = json.loads((tower / "config.json").read_text())
    vision = {**config["vision_config"], "model_type": "siglip_vision_model"}
    (tower / "config.json").write_text(json.dumps(vision))
    with pytest.raises(EncoderError, match="describes no projector"):
        with_projector(tower)
    wide = edit_tensors(gemma[0], tmp_path / "wide", lambda tensors: None)
    (wide / "config.json").write_text(json.dumps({**config, "mm_tokens_per_image": 4096}))
    with pytest.raises(EncoderError, match="mm_tokens_per_image 4096"):
        with_projector(wide)


def test_the_reference_of_bf16_is_the_checkpoint_in_fp32(gemma: tuple[Path, Any]) -> None:
    encoder = with_projector(gemma[0], "bf16")
    reference = encoder.reference()
    assert (reference.precision, reference.fingerprint) == ("fp32", encoder.fingerprint)
    exact = with_projector(gemma[0])
    assert exact.reference() is exact
    images = np.stack(random_images(2, (SIZE, SIZE)))
    for pooling, rows in exact.encode(images, ["mean", "projector"]).items():
        assert np.array_equal(reference.encode(images, [pooling])[pooling], rows)
        assert 0 < np.abs(encoder.encode(images, [pooling])[pooling] - rows).max() < 0.2


def test_an_unknown_pooling_is_refused_before_anything_is_fetched(gemma: tuple[Path, Any]) -> None:
    with pytest.raises(EncoderError, match=r"pooling median is unknown. Choose from: mean, max,"):
        load_encoder("someone/not-asked-for", poolings=["mean", "median"])
    with pytest.raises(EncoderError, match=r"cls is not offered by gemma\. .* mean, max, grid4, "):
        load_encoder(gemma[0], poolings=["cls"])


def test_the_demo_encoder_is_the_one_that_caches_were_made_with() -> None:
    fingerprint = "23087cfb9ae3e958970c81ad0b622eef61df5875ddf18b274fe0b2fa475ec6d1"
    assert load_encoder("demo").fingerprint == fingerprint


@pytest.mark.parametrize("shape", ["tiny", "demo"])
def test_a_row_depends_neither_on_its_place_nor_on_its_neighbours(
    gemma: tuple[Path, Any], tmp_path: Path, shape: str
) -> None:
    """What lets a resumed cache equal an uninterrupted one byte for byte."""
    directory = gemma[0]
    if shape == "demo":
        directory = tmp_path / "wider"
        make_gemma(directory, hidden_size=128, intermediate_size=384, patch_size=4)
    encoder = load_encoder(directory, device="cpu", precision="fp32")
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, (16, SIZE, SIZE), dtype=np.uint8)
    whole = encoder.encode(batch, ["mean", "max"])
    order = rng.permutation(16)
    moved = encoder.encode(batch[order], ["mean", "max"])
    among_zeros = np.zeros_like(batch)
    among_zeros[11] = batch[3]
    alone = encoder.encode(among_zeros, ["mean", "max"])
    for pooling in ("mean", "max"):
        assert np.array_equal(moved[pooling], whole[pooling][order])
        assert np.array_equal(alone[pooling][11], whole[pooling][3])


def test_bf16_computes_in_bf16_and_pools_in_fp32(gemma: tuple[Path, Any]) -> None:
    directory, _ = gemma
    images = random_images(3)
    exact = embed(load_encoder(directory, device="cpu", precision="fp32"), images)
    encoder = load_encoder(directory, device="cpu", precision="bf16")
    rough = embed(encoder, images)
    assert encoder.precision == "bf16"
    assert rough["mean"].dtype == np.float32
    assert 0 < np.abs(rough["mean"] - exact["mean"]).max() < 0.1
    rounded = torch.from_numpy(rough["mean"]).to(torch.bfloat16).float().numpy()
    assert not np.array_equal(rounded, rough["mean"])  # a mean taken in bf16 would be


def test_bf16_rounds_factors_and_never_the_residual_stream(gemma: tuple[Path, Any]) -> None:
    encoder: Any = load_encoder(gemma[0], device="cpu", precision="bf16")
    seen: dict[str, torch.dtype] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                seen[name] = output.dtype

        return hook

    for name, module in encoder.model.named_modules():
        module.register_forward_hook(watch(name))
    embed(encoder, random_images(1))
    products = [n for n in seen if n.endswith(("_proj", "fc1", "fc2"))]
    exact = [n for n in seen if "norm" in n or n.rpartition(".")[2].isdigit() or n == "embeddings"]
    assert len(products) > 6
    assert {seen[n] for n in products} == {torch.bfloat16}
    assert len(exact) > 4
    assert {seen[n] for n in exact} == {torch.float32}


def test_fp32_sums_bring_bf16_nearer_to_fp32() -> None:
    """Against the same tower with everything in bfloat16, as the canary measures it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 12}
    config = SiglipVisionConfig(
        **sizes, num_attention_heads=4, image_size=112, patch_size=14, vision_use_head=False
    )
    model = SiglipVisionModel(config).to(torch.bfloat16).float()  # as checkpoints are stored
    half = (0.5, 0.5, 0.5)
    known = {
        "preprocessing": Preprocessing(112, 112, "stretch", "bilinear", half, half, 1 / 255),
        "fingerprint": "0" * 64,
        "source": "made",
    }

    class AllRounded(SiglipEncoder):
        def see(self, pixels: torch.Tensor) -> Any:
            return self.features(self.normalise(pixels).to(torch.bfloat16))

    poolings = ["mean", "max", "grid4"]
    document = compute_canary(SiglipEncoder(copy.deepcopy(model), **known), poolings)
    rounded = AllRounded(copy.deepcopy(model).to(torch.bfloat16), precision="bf16", **known)
    set_precision(model, "bf16")
    ours = SiglipEncoder(model, precision="bf16", **known)
    for pooling in poolings:
        far, near = (
            check_canary(
                document, encoder, [pooling], batch_size=4, there={}, here={}, cache_path="cache"
            )
            for encoder in (rounded, ours)
        )
        assert near < 0.7 * far


def edit_tensors(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


BIAS = "vision_tower.post_layernorm.bias"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensors: tensors.pop(BIAS), r"lacks post_layernorm.bias, one of 1 missing"),
        (lambda tensors: tensors.update({as_4x(BIAS): tensors[BIAS].clone()}), "twice"),
        (
            lambda tensors: tensors.update({"vision_tower.head.probe": torch.zeros(1, 1, 32)}),
            "holds head.probe, one of 1",
        ),
        (lambda tensors: tensors.update({BIAS: torch.zeros(31)}), r"shape \(31,\)"),
        (lambda tensors: tensors.update({BIAS: torch.full((32,), torch.inf)}), "not finite"),
        (lambda tensors: tensors.update({BIAS: torch.zeros(32, dtype=torch.int8)}), "quantised"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision" in name],
            "holds no vision tower: no tensor named",
        ),
    ],
)
def test_a_tower_that_is_not_exactly_its_configs_is_refused(
    gemma: tuple[Path, Any],
    tmp_path: Path,
    edit: Callable[[dict[str, Any]], None],
    said: str,
) -> None:
    target = edit_tensors(gemma[0], tmp_path / "edited", edit)
    with pytest.raises(EncoderError, match=said):
        load_encoder(target)


def test_a_constant_that_early_releases_saved_is_ignored(
    gemma: tuple[Path, Any], tmp_path: Path
) -> None:
    ids = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(16)[None]}
    target = edit_tensors(gemma[0], tmp_path / "old", lambda tensors: tensors.update(ids))
    assert load_encoder(target).fingerprint == load_encoder(gemma[0]).fingerprint


def test_a_missing_or_damaged_file_is_named(gemma: tuple[Path, Any], tmp_path: Path) -> None:
    sharded = split(gemma[0], tmp_path / "shards", 2)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"lacks model-00002-of-00003\.safetensors"):
        load_encoder(sharded)
    damaged = edit_tensors(gemma[0], tmp_path / "damaged", lambda tensors: None)
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EncoderError, match="not a whole safetensors file"):
        load_encoder(damaged)
    (damaged / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"neither model\.safetensors nor"):
        load_encoder(damaged)
    (damaged / "config.json").unlink()
    with pytest.raises(EncoderError, match=r"damaged holds no config.json"):
        load_encoder(damaged)


def test_an_index_cannot_point_out_of_its_directory(
    gemma: tuple[Path, Any], tmp_path: Path
) -> None:
    sharded = split(gemma[0], tmp_path / "shards", 2)
    index = {"weight_map": {BIAS: "../gemma/model.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EncoderError, match="not an index"):
        load_encoder(sharded)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bert"}, "type 'bert'"),
        ({"model_type": "clip"}, "describes no image tower"),
        ({"model_type": "gemma3"}, "describes no vision tower"),
        ({"model_type": "gemma3", "vision_config": {"model_type": "clip"}}, "type clip"),
        ({"model_type": "gemma3", "vision_config": {**VISION, "hidden_size": "8"}}, "not a SigLIP"),
        ({"model_type": "gemma3", "vision_config": {**VISION, "patch_size": 0}}, "patch_size 0"),
        ({"model_type": "gemma3", "vision_config": {**VISION, "num_attention_heads": 5}}, "5 head"),
        ({"model_type": "gemma3", "vision_config": {**VISION, "image_size": 64}}, "64 x 64"),
        ([], "type None"),
    ],
)
def test_a_config_of_something_else_is_refused(
    gemma: tuple[Path, Any], tmp_path: Path, config: object, said: str
) -> None:
    target = tmp_path / "other"
    shutil.copytree(gemma[0], target)
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=said):
        load_encoder(target)


@pytest.mark.parametrize(
    ("pixels", "poolings", "said"),
    [
        (np.zeros((2, SIZE, SIZE), np.float32), ["mean"], r"reads uint8 \(n, 32, 32\)"),
        (np.zeros((2, SIZE, 31), np.uint8), ["mean"], "prepare"),
        (np.zeros((SIZE, SIZE), np.uint8), ["mean"], "prepare"),
        (np.zeros((2, SIZE, SIZE), np.uint8), ["median"], "pooling median .* mean, max"),
        (np.zeros((2, SIZE, SIZE), np.uint8), [], r"pooling \(none\)"),
    ],
)
def test_encode_says_what_it_reads(
    gemma: tuple[Path, Any], pixels: np.ndarray, poolings: list[str], said: str
) -> None:
    with pytest.raises(EncoderError, match=said):
        load_encoder(gemma[0]).encode(pixels, poolings)


def test_no_images_give_no_rows(gemma: tuple[Path, Any]) -> None:
    rows = load_encoder(gemma[0]).encode(np.zeros((0, SIZE, SIZE), np.uint8), ["mean"])
    assert rows["mean"].shape == (0, 32)


def test_embeddings_that_are_not_finite_are_refused(
    gemma: tuple[Path, Any], tmp_path: Path
) -> None:
    def overflow(tensors: dict[str, Any]) -> None:
        tensors["vision_tower.post_layernorm.weight"].fill_(3e38)

    encoder = load_encoder(edit_tensors(gemma[0], tmp_path / "huge", overflow))
    with pytest.raises(EncoderError, match="not finite in fp32"):
        embed(encoder, random_images(2))


def test_precision_and_device_are_asked_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(EncoderError, match="device cuda was asked for"):
        choose_device("cuda")
    with pytest.raises(EncoderError, match="device 'tpu' is unknown"):
        choose_device("tpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"

    for has_bf16, expected in [(True, "bf16"), (False, "fp32")]:
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has
        )
        assert choose_precision("auto", "cuda") == expected
        assert choose_precision("auto", "cpu") == "fp32"
    with pytest.raises(EncoderError, match="'fp16' is not on offer"):
        choose_precision("fp16", "cuda")


def test_a_local_source_is_a_name_and_not_a_path(gemma: tuple[Path, Any]) -> None:
    encoder = load_encoder(gemma[0])
    assert (encoder.source, encoder.revision) == ("gemma", None)


@pytest.mark.parametrize(
    ("environ", "n_gpus", "expected"),
    [
        ({"LOCAL_RANK": "3"}, 8, 3),
        ({"SLURM_LOCALID": "5"}, 4, 1),
        ({"LOCAL_RANK": "2", "SLURM_LOCALID": "0"}, 4, 2),
        ({"LOCAL_RANK": "3"}, 1, None),
        ({"LOCAL_RANK": "x"}, 8, None),
        ({}, 8, None),
    ],
)
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(
    environ: dict[str, str],
    n_gpus: int,
    expected: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert take_own_gpu(environ) == expected
    assert chosen == ([] if expected is None else [expected])
