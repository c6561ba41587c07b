"""Maps are the logit's own parts, and on images whose finding is known they peak on it."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_backbones import save
from made_finetuning import one_thread
from PIL import Image, ImageDraw
from scipy.special import expit
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from medembed.core.errors import EncoderError, ImageError, ModelError
from medembed.demo.cohort import DemoView, draw_cohort, render_view
from medembed.encoders.features import Features, pool, token_poolings
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import Preprocessing, place_image, prepare
from medembed.encoders.siglip import SiglipEncoder
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.heads.attention import AttentionHead
from medembed.heads.base import Head
from medembed.heads.lightgbm import LightGBMHead
from medembed.heads.linear import LogisticHead
from medembed.heads.mlp import MLPHead
from medembed.prediction.attribution import Explainer, differentiable_logit, logit, repool
from medembed.prediction.occlusion import occlude, spread, window_sides
from medembed.prediction.overlay import DISCLAIMER, draw_overlay, overlay_name, write_overlay
from medembed.results.predictions import image_code
from tools.bone_masks import locate_bones, pool_mask

HALF = (0.5, 0.5, 0.5)
SIDE = 16
GREY = Preprocessing(SIDE, SIDE, "stretch", "bilinear", HALF, HALF, 1 / 255)
WIDTH = 12
N_COVARIATES = 2
TREES: dict[str, Any] = {"n_trees": 20, "min_data_in_leaf": 5}


class Patches(torch.nn.Module):
    """A tower that gives each patch of 2 × 2 pixels its 12 values."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.unfold(pixel_values, 2, stride=2).transpose(1, 2)


class PatchEncoder(TorchEncoder):
    @property
    def dimensions(self) -> dict[str, tuple[int, ...]]:
        return token_poolings(WIDTH, (8, 8))

    def features(self, pixel_values: torch.Tensor) -> Features:
        return Features(self.tower(pixel_values), (8, 8))


@pytest.fixture(scope="module")
def patches() -> PatchEncoder:
    return PatchEncoder(Patches(), GREY, fingerprint="0" * 64, source="patches")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE), dtype=np.uint8)


def embed(encoder: TorchEncoder, pixels: np.ndarray, pooling: str) -> np.ndarray:
    rows = encoder.encode(pixels, pooling.split("+"))
    return np.hstack([rows[name].reshape(len(pixels), -1) for name in pooling.split("+")])


def labelled(d: int, n: int = 80) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(d)
    X = rng.normal(size=(n, d))
    return X, (X[:, 0] + X[:, -1] + rng.normal(size=n) > 0).astype(int)


HEADS: dict[str, Head] = {
    "logistic": LogisticHead(n_covariates=N_COVARIATES),
    "logistic, pca": LogisticHead(pca=5, n_covariates=N_COVARIATES),
    "mlp relu, pca": MLPHead((7, 5), pca=6, n_covariates=N_COVARIATES, epochs=3),
    "mlp gelu": MLPHead((7,), activation="gelu", scaling="global", epochs=3),
    "mlp silu": MLPHead((7,), activation="silu", scaling="none", epochs=3),
    "mlp tanh": MLPHead((7,), activation="tanh", epochs=3),
    "attention": AttentionHead(8, n_covariates=N_COVARIATES, epochs=2),
    "attention, cells": AttentionHead(8, n_cells=3, n_covariates=N_COVARIATES, pca=4, epochs=2),
}
D = 3 * 8 + N_COVARIATES


def fitted(head: Head, d: int = D) -> Head:
    head.fit(*labelled(d))
    return head


@pytest.mark.parametrize("name", HEADS)
def test_a_logit_is_the_heads_and_its_gradient_that_of_finite_differences(name: str) -> None:
    head = fitted(HEADS[name])
    X, studies = labelled(D)[0][:6], np.array([0, 1, 0, 2, 1, 0])
    seen = head.predict_proba(*((X, studies) if head.study_level else (X,)))[:, 1]
    found = logit(head, X, studies)
    assert np.abs(expit(found) - seen).max() <= 1e-12

    rows = torch.from_numpy(X).requires_grad_()
    judged = differentiable_logit(head)(rows, torch.from_numpy(studies)).sum()
    (gradient,) = torch.autograd.grad(judged, rows)
    for row, column in [(0, 0), (2, 7), (3, D - 1), (5, D - N_COVARIATES)]:
        step = np.zeros_like(X)
        step[row, column] = 1e-6
        slope = (logit(head, X + step, studies) - logit(head, X - step, studies)).sum() / 2e-6
        assert gradient[row, column].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("pca", [0, 5])
def test_the_logit_of_trees_is_the_heads(pca: int) -> None:
    head = fitted(LightGBMHead(pca=pca, n_covariates=N_COVARIATES, **TREES))
    X, _ = labelled(D)
    assert np.abs(expit(logit(head, X)) - head.predict_proba(X)[:, 1]).max() <= 1e-12
    with pytest.raises(ModelError, match="LightGBMHead has no gradient"):
        differentiable_logit(head)


@pytest.mark.parametrize("pooling", ["mean+max", "grid4", "max"])
def test_a_maps_gradient_is_that_of_the_tokens(patches: PatchEncoder, pooling: str) -> None:
    pixels = images(2)
    head = fitted(
        MLPHead((9,), activation="tanh", epochs=3), len(embed(patches, pixels, pooling)[0])
    )
    explained = Explainer(patches, head, pooling, method="gradient").explain(pixels)
    tokens = patches.features(patches.normalise(torch.from_numpy(pixels))).tokens
    mean = tokens.mean(dim=1, keepdim=True)
    step = 1e-3
    for number, place in ((0, 0), (0, 37), (1, 63)):
        slopes = []
        for sign in (1, -1):
            changed = tokens.clone()
            changed[number, place] += sign * step * (tokens - mean)[number, place]
            rows = repool(patches, changed, (8, 8), pooling.split("+")).double().numpy()
            slopes.append(sign * logit(head, rows)[number])
        expected = sum(slopes) / (2 * step)
        assert explained.heat[number].ravel()[place] == pytest.approx(expected, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "mean+max", "grid4"])
@pytest.mark.parametrize(
    ("head", "tolerance"),
    [
        (LogisticHead(n_covariates=N_COVARIATES), 1e-5),
        (MLPHead((16,), n_covariates=N_COVARIATES, epochs=5), 0.02),
        (AttentionHead(8, n_covariates=N_COVARIATES, epochs=3), 0.02),
    ],
    ids=["logistic", "mlp", "attention"],
)
def test_a_map_sums_to_what_the_baseline_lacks(
    patches: PatchEncoder, head: Head, tolerance: float, pooling: str
) -> None:
    pixels, known = images(11), np.random.default_rng(1).normal(size=(11, N_COVARIATES))
    fitted(head, embed(patches, pixels, pooling).shape[1] + N_COVARIATES)
    studies = np.array([4, 4, 7, 1, 1, 1, 0, 2, 3, 5, 6]) if head.study_level else None
    explained = Explainer(patches, head, pooling).explain(pixels, known, studies)
    assert explained.method == "integrated"
    codes = np.arange(11) if studies is None else studies
    sums = np.bincount(codes, explained.heat.sum(axis=(1, 2)))
    lacking = explained.logit - explained.baseline
    assert np.abs(sums - lacking).max() <= tolerance * max(1, np.abs(lacking).max())
    rows = np.hstack([embed(patches, pixels, pooling), known])
    assert np.abs(explained.logit - logit(head, rows, studies)).max() <= 1e-5


def test_views_of_a_study_are_explained_together(patches: PatchEncoder) -> None:
    head = fitted(AttentionHead(8, epochs=3), 2 * WIDTH)
    explainer, pixels = Explainer(patches, head, "mean+max"), images(3)
    together = explainer.heat_maps(pixels, studies=[0, 0, 1])
    alone = explainer.heat_maps(pixels)
    assert np.allclose(together[2], alone[2], atol=1e-6)
    assert not np.allclose(together[0], alone[0], atol=1e-3)


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (4, 4)])
@pytest.mark.parametrize("sides", [(1, 1), (2, 3), (3, 3), (4, 4)])
def test_occlusion_without_a_loop_equals_one(
    patches: PatchEncoder, grid: tuple[int, int], sides: tuple[int, int]
) -> None:
    rng = np.random.default_rng(grid[1])
    tokens = rng.normal(size=(*grid, 6)).astype(np.float32)
    names = ["mean", "max", "grid4"]

    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("these poolings take no tower")

    found = list(occlude(tokens, sides, names, refuse))
    assert len(found) == grid[0] - sides[0] + 1
    for top, left in np.ndindex(len(found), grid[1] - sides[1] + 1):
        changed = tokens.copy()
        changed[top : top + sides[0], left : left + sides[1]] = tokens.mean(axis=(0, 1))
        seen = pool(Features(torch.from_numpy(changed.reshape(1, -1, 6)), grid), names)
        expected = np.concatenate([seen[name].numpy().ravel() for name in names])
        assert np.abs(found[top][left] - expected).max() <= 1e-6


def test_the_map_of_trees_is_what_a_loop_over_windows_gives(patches: PatchEncoder) -> None:
    pixels, known = images(60), np.random.default_rng(1).normal(size=(60, 1))
    X = np.hstack([embed(patches, pixels, "mean+max"), known])
    head = LightGBMHead(n_covariates=1, **TREES)
    head.fit(X, (X[:, 3] + 0.1 * X[:, -1] > np.median(X[:, 3])).astype(int))
    explained = Explainer(patches, head, "mean+max").explain(pixels[:2], known[:2])
    assert explained.method == "occlusion"
    assert window_sides((8, 8)) == (2, 2)
    assert window_sides((64, 64)) == (12, 12)
    tokens = patches.features(patches.normalise(torch.from_numpy(pixels[:2]))).tokens
    total, count = np.zeros((2, 8, 8)), np.zeros((8, 8))
    for top, left in np.ndindex(7, 7):
        changed = tokens.clone().unflatten(1, (8, 8))
        changed[:, top : top + 2, left : left + 2] = tokens.mean(dim=1)[:, None, None]
        rows = repool(patches, changed.flatten(1, 2), (8, 8), ["mean", "max"]).numpy()
        drop = logit(head, X[:2]) - logit(head, np.hstack([rows, known[:2]]))
        total[:, top : top + 2, left : left + 2] += drop[:, None, None] / 4
        count[top : top + 2, left : left + 2] += 1
    assert np.abs(total).max() > 0
    assert np.abs(explained.heat - total / count).max() <= 1e-6


def test_a_drop_is_shared_among_a_windows_cells() -> None:
    drops = np.zeros((2, 3))
    drops[0, 0] = 6.0
    shared = spread(drops, (3, 2))
    assert shared.shape == (4, 4)
    assert shared[0, 0] == 1.0  # under this window alone
    assert shared[1, 1] == 0.25  # under four
    assert not shared[3].any()


@pytest.fixture(scope="module")
def siglip() -> SiglipEncoder:
    """A tower of 4 × 4 patches with SigLIP's pooling head and Gemma's projector."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "image_size": SIDE, "patch_size": 4}
    config = SiglipVisionConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, vision_use_head=True
    )
    text = type("Text", (), {"hidden_size": 10})()
    both = {"vision_config": config, "text_config": text, "mm_tokens_per_image": 4}
    projector = Gemma3MultiModalProjector(type("Config", (), both)())
    torch.nn.init.normal_(projector.mm_input_projection_weight)
    return SiglipEncoder(
        SiglipVisionModel(config), GREY, projector=projector, fingerprint="0" * 64, source="siglip"
    )


def assert_repooled(encoder: TorchEncoder, pixels: np.ndarray, poolings: Sequence[str]) -> None:
    with torch.no_grad():
        seen = encoder.features(encoder.normalise(torch.from_numpy(pixels)))
        again = repool(encoder, seen.tokens, seen.grid, poolings)
    expected = embed(encoder, pixels, "+".join(poolings))
    assert np.abs(again.numpy() - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


def test_what_a_tower_pools_itself_is_had_of_its_tokens(siglip: SiglipEncoder) -> None:
    assert_repooled(siglip, images(2), ["mean", "pooler", "grid4", "projector"])


@pytest.mark.parametrize("family", ["ResNet", "ConvNext", "Swin"])
def test_a_backbones_pooler_is_had_of_its_last_feature_map(tmp_path: Path, family: str) -> None:
    save(tmp_path, family)
    encoder: Any = load_encoder(tmp_path, device="cpu", precision="fp32")
    size = encoder.preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (2, size.height, size.width), dtype=np.uint8)
    assert_repooled(encoder, pixels, ["pooler", "max"])
    head = fitted(LogisticHead(), encoder.dimensions["pooler"][0])
    explained = Explainer(encoder, head, "pooler").explain(pixels)
    assert (
        explained.heat.shape[1:]
        == encoder.features(encoder.normalise(torch.from_numpy(pixels))).grid
    )


@pytest.mark.parametrize("pooling", ["pooler", "projector"])
def test_a_towers_own_pooling_is_explained_in_full(siglip: SiglipEncoder, pooling: str) -> None:
    head = fitted(LogisticHead(), siglip.dimensions[pooling][0])
    explained = Explainer(siglip, head, pooling).explain(images(3))
    lacking = explained.logit - explained.baseline
    assert np.abs(explained.heat.sum(axis=(1, 2)) - lacking).max() <= 0.01 * np.abs(lacking).max()
    trees = fitted(LightGBMHead(**TREES), siglip.dimensions[pooling][0])
    assert np.isfinite(Explainer(siglip, trees, pooling).heat_maps(images(1))).all()


@pytest.mark.parametrize("pooling", ["cls", "mean+pooler"])
def test_a_class_token_is_refused_with_the_reason(tmp_path: Path, pooling: str) -> None:
    save(tmp_path, "DeiT")
    encoder: Any = load_encoder(tmp_path, device="cpu", precision="fp32")
    head = fitted(LogisticHead(), sum(encoder.dimensions[p][0] for p in pooling.split("+")))
    with pytest.raises(EncoderError, match=r"is its class token.*Explain a model on mean, max"):
        Explainer(encoder, head, pooling)


def test_what_does_not_fit_is_refused(patches: PatchEncoder) -> None:
    head = fitted(LogisticHead(), WIDTH + 1)
    explainer = Explainer(patches, head, "mean")
    with pytest.raises(ModelError, match="reads 1 covariates of each of 2 images"):
        explainer.explain(images(2))
    with pytest.raises(EncoderError, match="reads uint8"):
        explainer.explain(images(2).astype(float), np.zeros((2, 1)))
    with pytest.raises(ModelError, match="no images"):
        explainer.explain(images(0), np.zeros((0, 1)))
    with pytest.raises(ModelError, match=r"the head reads 13 columns; mean\+max of patches are 24"):
        Explainer(patches, head, "mean+max")
    with pytest.raises(ModelError, match="unknown method 'x'; choose among integrated"):
        Explainer(patches, head, "mean", method="x")
    with pytest.raises(ModelError, match="judges studies"):
        Explainer(patches, fitted(AttentionHead(4, epochs=1), WIDTH), "mean", method="occlusion")
    with pytest.raises(EncoderError, match="pooling cls is not offered"):
        Explainer(patches, head, "cls")


N_TRAINED, N_PATIENTS = 45, 85


@dataclass(frozen=True)
class Cohort:
    """The demo's encoder on its cohort: `inside` the cells of findings, `bones` those of bones."""

    encoder: TorchEncoder
    X: np.ndarray
    y: np.ndarray
    shown: np.ndarray
    inside: np.ndarray
    bones: np.ndarray


def first_patients(n: int) -> list[DemoView]:
    return [view for view in draw_cohort(N_PATIENTS, 1) if int(view.patient[-4:]) <= n]


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    encoder: Any = load_encoder("demo", device="cpu", precision="fp32")
    trained = first_patients(N_TRAINED)
    others = [view for view in draw_cohort(N_PATIENTS, 1) if view not in set(trained)]
    with one_thread():
        drawn = [prepare(render_view(view).pixels, encoder.preprocessing) for view in trained]
        X = embed(encoder, np.stack(drawn), "mean+max")
    shown, inside, bones = [], [], []
    for view in others:
        if view.label:
            rendered = render_view(view)
            if rendered.mask.any():
                shown.append(prepare(rendered.pixels, encoder.preprocessing))
                inside.append(pool_mask(rendered.mask, (16, 16)))
                bones.append(pool_mask(locate_bones(view), (16, 16)))
    return Cohort(
        encoder,
        X,
        np.array([view.label for view in trained]),
        np.stack(shown),
        np.stack(inside),
        np.stack(bones),
    )


@pytest.mark.parametrize(
    "head", [LogisticHead(), MLPHead((64,), epochs=15), LightGBMHead(60)], ids=["log", "mlp", "lgb"]
)
def test_a_map_peaks_on_the_finding_three_times_as_often_as_by_chance(
    cohort: Cohort, head: Head
) -> None:
    # Chance is the finding's share of the cells with bone or finding in them, image by image: of
    # the whole frame it is a third of that. A cell counts as the finding's if it touches it.
    head.fit(cohort.X, cohort.y)
    heat = Explainer(cohort.encoder, head, "mean+max").heat_maps(cohort.shown)
    peaks = heat.reshape(len(heat), -1).argmax(axis=1)
    inside = cohort.inside.reshape(len(heat), -1)
    hit = inside[np.arange(len(heat)), peaks].mean()
    chance = (cohort.inside.sum((1, 2)) / (cohort.bones | cohort.inside).sum((1, 2))).mean()
    assert len(heat) >= 30
    assert chance > 2 * inside.mean()
    print(f"hit {hit:.3f}, chance {chance:.3f} of bones, {inside.mean():.3f} of the frame")
    assert hit >= 3 * chance


def test_a_finding_lies_on_the_bones_that_are_located() -> None:
    views = [view for view in draw_cohort(30, 2) if view.kind in ("line", "lesion")][:8]
    for view in views:
        mask, bones = render_view(view).mask, locate_bones(view)
        assert bones.dtype == np.bool_
        assert 0.02 < bones.mean() < 0.7
        assert (mask & bones).sum() >= 0.99 * mask.sum()


@pytest.mark.parametrize("shape", [(256, 256), (100, 70)])
def test_a_mask_is_pooled_to_the_cells_that_it_touches(shape: tuple[int, int]) -> None:
    mask = np.zeros(shape, np.bool_)
    row, column = shape[0] // 3, shape[1] // 2
    mask[row, column] = True
    cells = pool_mask(mask, (16, 16))
    assert cells[row * 16 // shape[0], column * 16 // shape[1]]
    assert cells.sum() <= 4
    assert pool_mask(np.ones(shape, np.bool_), (16, 16)).all()


def test_a_pixel_between_two_cells_belongs_to_both() -> None:
    mask = np.zeros((100, 100), np.bool_)
    mask[6, 0] = True  # the first cell ends at 6.25
    assert np.argwhere(pool_mask(mask, (16, 16))).tolist() == [[0, 0], [1, 0]]


FITS = {
    fit: Preprocessing(64, 64, fit, "bilinear", HALF, HALF, 1 / 255) for fit in ("stretch", "pad")
}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(300, 120), (90, 200), (64, 64)])
def test_an_image_is_placed_where_it_was_prepared(fit: str, shape: tuple[int, int]) -> None:
    seen = prepare(np.full(shape, 200, np.uint8), FITS[fit])
    rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
    found = (rows[0], columns[0], len(rows), len(columns))
    assert place_image(shape, FITS[fit]) == found


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(300, 120), (90, 200)])
def test_a_cell_is_drawn_and_written_where_its_pixels_are(
    tmp_path: Path, fit: str, shape: tuple[int, int]
) -> None:
    heat = np.zeros((8, 8), np.float32)
    heat[3, 4], heat[5, 3] = 0.5, -0.5
    path = tmp_path / overlay_name("ab" * 32)
    image = np.full(shape, 100, np.uint8)
    write_overlay(path, image, heat, FITS[fit])
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.with_suffix(".csv").name, path.name]
    with open(path.with_suffix(".csv")) as file:
        table = {(int(r["row"]), int(r["column"])): r for r in csv.DictReader(file)}
    assert len(table) == 64
    assert float(table[3, 4]["logit"]) == 0.5
    drawn = np.asarray(Image.open(path)).astype(int)
    scale = 896 / max(shape)
    left = (drawn.shape[1] - round(shape[1] * scale)) // 2
    warm = drawn[:896, :, 0] - drawn[:896, :, 2]
    for cell, sign in (((3, 4), 1), ((5, 3), -1)):
        # The same place by way of `prepare`: paint the cell's pixels of the image.
        edges = {key: float(table[cell][key]) for key in ("left", "top", "right", "bottom")}
        painted = np.zeros(shape, np.uint8)
        painted[
            round(edges["top"]) : round(edges["bottom"]),
            round(edges["left"]) : round(edges["right"]),
        ] = 255
        held = prepare(painted, FITS[fit]).reshape(8, 8, 8, 8).mean(axis=(1, 3))
        assert held[cell] > 170
        assert np.delete(held.ravel(), cell[0] * 8 + cell[1]).max() < 60
        rows, columns = np.nonzero(sign * warm[: round(shape[0] * scale)] > 30)
        found = np.array(
            [rows.min(), rows.max() + 1, columns.min() - left, columns.max() + 1 - left]
        )
        expected = np.array([edges[key] for key in ("top", "bottom", "left", "right")]) * scale
        expected[:2] = expected[:2].clip(0, shape[0] * scale)  # the rest is the frame's
        assert np.abs(found - expected).max() <= 2.5


def test_a_picture_says_what_it_is_and_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    plain = ImageDraw.ImageDraw.text

    def listen(self: Any, xy: Any, text: str, *args: Any, **known: Any) -> None:
        words.append(text)
        plain(self, xy, text, *args, **known)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", listen)
    heat = np.array([[0.123456, -0.2], [0, 0]])
    picture = draw_overlay(np.full((50, 40), 9, np.uint8), heat, FITS["stretch"], notes=["A note"])
    assert not picture.info
    assert {DISCLAIMER, "A note", "-0.2 normal", "abnormal +0.2"} <= set(words)
    name = overlay_name("ab" * 32)
    assert name == f"{image_code('ab' * 32)}.png"
    assert "abab" not in name
    draw_overlay(np.zeros((50, 40), np.uint8), np.zeros((2, 2)), FITS["stretch"])  # nothing to say


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    heat, image = np.zeros((2, 2)), np.zeros((5, 5), np.uint8)
    with pytest.raises(ImageError, match="is uint8"):
        write_overlay(tmp_path / "a.png", image.astype(float), heat, FITS["pad"])
    with pytest.raises(ImageError, match="finite numbers"):
        write_overlay(tmp_path / "a.png", image, heat * np.nan, FITS["pad"])
    assert not list(tmp_path.iterdir())
