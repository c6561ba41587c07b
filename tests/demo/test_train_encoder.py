"""The training script writes MedGemma's checkpoint layout, and so is the tower that is shipped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, SiglipVisionConfig, SiglipVisionModel

import medembed
from medembed.demo.synthetic import TRIAL_SEEDS
from tools.demo_encoder import __main__ as train_encoder
from tools.demo_encoder.card import describe
from tools.demo_encoder.teacher import Batches, Teacher
from tools.demo_encoder.training_set import draw_training_set

SHIPPED = Path(medembed.__file__).parent / "encoders" / "assets" / "demo"
FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
PREFIX = "vision_tower.vision_model."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "demo"
    train_encoder.main(
        ["--out", str(out), "--images", "16", "--steps", "1", "--trial-images", "48", "--jobs", "1"]
    )
    return out


@pytest.fixture(params=["trained", "shipped"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return SHIPPED if request.param == "shipped" else request.getfixturevalue("trained")


def test_a_checkpoint_has_the_files_of_the_hub_and_is_small(checkpoint: Path) -> None:
    assert sorted(path.name for path in checkpoint.iterdir()) == FILES
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 6_000_000


def test_tensors_have_the_hubs_names_and_finite_half_precision_values(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    assert f"{PREFIX}encoder.layers.0.self_attn.q_proj.weight" in tensors
    assert f"{PREFIX}post_layernorm.weight" in tensors
    for name, tensor in tensors.items():
        assert name.startswith(PREFIX)
        assert tensor.dtype == torch.float16
        assert torch.isfinite(tensor).all(), name


def test_transformers_reads_the_config_and_the_tower_fits_it(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    assert config.architectures == ["Gemma3ForConditionalGeneration"]
    assert config.model_type == "gemma3"
    vision = config.vision_config
    assert isinstance(vision, SiglipVisionConfig)
    assert (vision.image_size, vision.patch_size, vision.hidden_size) == (128, 8, 128)
    assert vision.vision_use_head is False
    _load(checkpoint)  # strict: no name too few or too many


def test_the_processor_config_says_how_images_were_prepared(checkpoint: Path) -> None:
    document = json.loads((checkpoint / "preprocessor_config.json").read_bytes())
    assert document["image_processor_type"] == "Gemma3ImageProcessor"
    assert document["size"] == {"height": 128, "width": 128}
    assert document["resample"] == 2
    assert document["image_mean"] == document["image_std"] == [0.5, 0.5, 0.5]
    assert document["rescale_factor"] == pytest.approx(1 / 255)


def test_the_card_says_that_the_model_knows_nothing_of_medicine(checkpoint: Path) -> None:
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert "knows nothing of medicine" in card
    assert "only on synthetic images" in card
    assert "license: apache-2.0" in card
    assert "| any finding, `mean` and `max` |" in card


def test_an_early_card_claims_no_figures() -> None:
    assert "Not measured" in describe({}, n_images=1, n_steps=1)


def test_training_lowers_the_loss_and_repeats_itself() -> None:
    data = draw_training_set(range(24), jobs=1)

    def run() -> tuple[list[float], torch.Tensor]:
        losses: list[float] = []
        teacher = train_encoder.train(
            data, n_steps=10, batch_size=8, progress=lambda *step: losses.append(step[2])
        )
        return losses, teacher.tower.state_dict()["post_layernorm.weight"]

    torch.manual_seed(1)  # whatever the global state is
    losses, weight = run()
    torch.manual_seed(2)
    again, weight_again = run()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    np.testing.assert_allclose(losses, again, rtol=1e-3)
    torch.testing.assert_close(weight, weight_again, rtol=1e-3, atol=1e-4)


def test_a_time_limit_shortens_the_schedule() -> None:
    steps: list[int] = []
    data = draw_training_set(range(16), jobs=1)
    train_encoder.train(
        data,
        n_steps=10_000,
        batch_size=4,
        seconds=0.5,
        progress=lambda done, *_: steps.append(done),
    )
    assert 1 <= len(steps) < 10_000


def test_the_shipped_tower_tells_findings_from_normal_images_far_above_chance() -> None:
    teacher = Teacher()
    teacher.tower = _load(SHIPPED)
    data = draw_training_set(TRIAL_SEEDS[-240:], severities=(0.9, 1.0), jobs=1)
    pooled = train_encoder.embed(teacher, data.images)
    X = np.concatenate([pooled["mean"], pooled["max"]], 1)
    assert np.isfinite(X).all()
    y, half = data.kinds > 0, 120
    # A nearest-mean rule with shrunk covariance: no fitted head is needed to see the difference.
    scatter = np.cov(X[:half].T) + 0.05 * np.eye(X.shape[1])
    direction = np.linalg.solve(scatter, X[:half][y[:half]].mean(0) - X[:half][~y[:half]].mean(0))
    score = X[half:] @ direction
    above = score[y[half:]][:, None] > score[~y[half:]][None, :]
    assert above.mean() > 0.9


def test_a_window_holds_the_finding_and_knows_its_place() -> None:
    data = draw_training_set(range(30), jobs=1)
    batches = Batches(data, torch.Generator().manual_seed(3))
    batch = batches.take(torch.arange(30), windows=True)
    assert batch.images.shape == (30, 64, 64)
    assert torch.equal(batch.patches.any(1), batch.kinds > 0)
    whole = batches.take(torch.arange(30), windows=False)
    assert whole.images.shape == (30, 128, 128)
    assert torch.equal(whole.positions, torch.arange(256).expand(30, -1))
    rows, columns = batch.positions // 16, batch.positions % 16
    assert torch.equal(rows.amax(1) - rows.amin(1), torch.full((30,), 7))
    assert torch.equal(columns.amax(1) - columns.amin(1), torch.full((30,), 7))


def test_whole_images_get_the_same_tokens_by_either_way() -> None:
    data = draw_training_set(range(4), jobs=1)
    teacher = Teacher().eval()
    batch = Batches(data, torch.Generator().manual_seed(0)).take(torch.arange(4), windows=False)
    with torch.inference_mode():
        windowed = teacher._window_tokens(batch.images, batch.positions)
        torch.testing.assert_close(windowed, teacher.tokens(batch.images), rtol=1e-4, atol=1e-4)


def test_the_patch_embedding_starts_white() -> None:
    data = draw_training_set(range(60), jobs=1)
    teacher = Teacher()
    teacher.whiten(torch.from_numpy(data.images), torch.Generator().manual_seed(0))
    embed = teacher.tower.get_submodule("embeddings.patch_embedding")
    pixels = (torch.from_numpy(data.images).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        values = embed(pixels[:, None].expand(-1, 3, -1, -1)).flatten(2).transpose(1, 2)
    body = pixels.unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4)).flatten(1) > -0.85
    variances = torch.linalg.eigvalsh(torch.cov(values[body].T)).flip(0)
    assert variances[0] == pytest.approx(2.0, rel=0.02)
    assert variances[20] > 0.9 * 2  # from a usual start, a ten-thousandth of the first
    assert variances[64:].max() < 1e-3  # 64 pixels cannot fill more than 64 directions


def _load(directory: Path) -> torch.nn.Module:
    document = json.loads((directory / "config.json").read_bytes())
    tower = SiglipVisionModel(SiglipVisionConfig(**document["vision_config"]))
    tensors = load_file(directory / "model.safetensors")
    tower.load_state_dict({n.removeprefix(PREFIX): t.float() for n, t in tensors.items()})
    return tower.eval()
