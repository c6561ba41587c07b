"""The autoencoder baseline: what it reads, what it writes, and what becomes of its code."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from medembed.autoencoder import checkpoint, images, train_autoencoder, training
from medembed.cache.embeddings import load_embeddings
from medembed.cli import main
from medembed.core.errors import (
    DeviceMemoryError,
    EncoderError,
    ManifestError,
    MedembedError,
    PathNotFoundError,
    RunError,
    TrainingDataError,
)
from medembed.core.files import write_atomically
from medembed.dataset.manifest import Manifest, read_manifest, write_manifest
from medembed.dataset.splits import split_patients
from medembed.demo.cohort import draw_cohort, write_view
from medembed.encoders.autoencoder import (
    Architecture,
    Autoencoder,
    checkpoint_config,
    preprocessing_for,
    processor_config,
)
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import prepare, read_preprocessing
from medembed.encoders.protocol import PipelinedEncoder
from medembed.extraction import extract, image_store

FILES = ["config.json", "model.safetensors", "preprocessor_config.json", "training.json"]
SMALL: dict[str, Any] = {"size": 32, "widths": (8, 16), "latent_channels": 6, "batch_size": 8}
SMALL |= {"device": "cpu", "learning_rate": 5e-3}
QUICK = {**SMALL, "epochs": 3}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep the threads of small products from waiting for each other on a busy machine."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


def options(given: dict[str, Any]) -> list[str]:
    """Write keyword arguments as the command's options."""
    words = []
    for name, value in given.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += ["--lr" if name == "learning_rate" else f"--{name.replace('_', '-')}", text]
    return words


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a cohort of 48 patients: `images/` and `manifest.csv`."""
    home = tmp_path_factory.mktemp("autoencoder")
    rows = []
    for view in draw_cohort(48):
        name = f"{view.study.replace('/', '-')}-{view.projection}.png"
        (home / "images").mkdir(exist_ok=True)
        data = write_view(view, home / "images" / name, size=64)
        facts = {"image": name, "sha256": hashlib.sha256(data).hexdigest()}
        facts |= {"patient": view.patient, "study": view.study, "region": view.region}
        rows.append({**facts, "label": view.label, "split": ""})
    table = pd.DataFrame(rows).astype({"label": "Int8"})
    table["split"] = split_patients(table, fraction=0.3)
    table = table.sort_values("image").reset_index(drop=True)
    write_manifest(Manifest(table, "study"), home / "manifest.csv")
    return home


@pytest.fixture(scope="module")
def manifest(home: Path) -> Manifest:
    return read_manifest(home / "manifest.csv")


@pytest.fixture(scope="module")
def trained(home: Path) -> tuple[Path, dict[str, Any]]:
    """Train by the command; give the directory and the JSON document."""
    out = home / "encoder"
    asked = options({**SMALL, "epochs": 12})
    arguments = ("autoencoder", home / "manifest.csv", "--image-root", home / "images")
    return out, run_json(*arguments, "--out", out, *asked)


@pytest.fixture(scope="module")
def quick(home: Path, manifest: Manifest) -> Path:
    out = home / "quick"
    train_autoencoder(manifest, home / "images", out, **QUICK)
    return out


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def with_rows(manifest: Manifest, rows: pd.DataFrame) -> Manifest:
    return Manifest(rows.reset_index(drop=True), manifest.label_level)


def copied(directory: Path, target: Path, **changes: object) -> Path:
    """Copy an encoder, with other entries in its config."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


# Training


def test_held_out_images_are_drawn_better_than_by_the_mean_image(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    _, document = trained
    assert 0 < document["held_out_loss"] < 0.5 * document["mean_image_loss"]
    assert {"encoder", "fingerprint", "epochs", "loss", "held_out_loss", "seconds"} <= set(document)
    assert document["failed"] == 0


def test_the_directory_holds_four_files_and_nothing_of_machine_or_patient(
    home: Path, trained: tuple[Path, dict[str, Any]], manifest: Manifest
) -> None:
    out, document = trained
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert not out.with_name("encoder.partial").exists()
    text = (out / "training.json").read_text()
    assert str(home) not in text
    assert "patient0" not in text
    card = json.loads(text)
    assert card["asked"]["manifest"] == manifest.digest()
    assert card["asked"]["seed"] == 0
    assert len(card["epochs"]) == document["epochs"]
    assert card["epochs"][card["best_epoch"] - 1]["held_out_loss"] == document["held_out_loss"]
    assert card["versions"]["torch"] == version("torch")


def test_the_loss_of_the_mean_image_is_that_of_numpy(home: Path, manifest: Manifest) -> None:
    shape = preprocessing_for(32, "stretch")
    read = images.read_images(manifest, home / "images", shape, seed=0)
    grey = read.pixels / 255
    expected = ((grey[read.held_out] - grey[read.learned].mean(axis=0)) ** 2).mean()
    assert training.mean_image_loss(read) == pytest.approx(expected, rel=1e-9)


def test_the_same_seed_gives_the_same_bytes_and_labels_change_nothing(
    home: Path, manifest: Manifest, quick: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)  # whatever the global state is
    train_autoencoder(manifest, home / "images", tmp_path / "again", **QUICK)
    assert weights(tmp_path / "again") == weights(quick)
    blind = manifest.rows.assign(label=pd.array([pd.NA] * len(manifest.rows), dtype="Int8"))
    blinded = with_rows(manifest, blind)
    train_autoencoder(blinded, home / "images", tmp_path / "blind", **QUICK)
    assert weights(tmp_path / "blind") == weights(quick)
    train_autoencoder(manifest, home / "images", tmp_path / "other", seed=1, **QUICK)
    assert weights(tmp_path / "other") != weights(quick)


@pytest.mark.parametrize("n_threads", [2, 3])
def test_the_number_of_cores_changes_no_bit(
    home: Path, manifest: Manifest, tmp_path: Path, n_threads: int
) -> None:
    asked = {**QUICK, "size": 64, "widths": (16, 32), "batch_size": 20, "epochs": 1}
    train_autoencoder(manifest, home / "images", tmp_path / "one", **asked)
    torch.set_num_threads(n_threads)
    train_autoencoder(manifest, home / "images", tmp_path / "several", **asked)
    assert torch.get_num_threads() == n_threads
    torch.set_num_threads(1)
    assert weights(tmp_path / "one") == weights(tmp_path / "several")


def test_the_gradient_of_parts_is_that_of_the_batch(home: Path, manifest: Manifest) -> None:
    shape = preprocessing_for(32, "stretch")
    read = images.read_images(manifest, home / "images", shape, seed=0)
    asked = training.TrainingConfig(Architecture(32, (8, 16), 4), 1, 20, 1e-3, "cpu", "fp32", 0)
    one = training.Training(asked, read, shape)
    loss = one._descend(read.learned[:20])
    grey = torch.from_numpy(read.pixels[read.learned[:20]])[:, None] / 255
    expected = ((one._model((grey - 0.5) / 0.5) - grey) ** 2).mean()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    whole = torch.autograd.grad(expected, list(one._model.parameters()))
    for parameter, gradient in zip(one._model.parameters(), whole, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_images_of_test_are_never_read(
    home: Path, manifest: Manifest, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()

    class Watched(image_store.Decoders):
        def read(self, contents: Any, *rest: Any) -> Iterator[Any]:
            asked.update(image for content in contents for image in content.images)
            return super().read(contents, *rest)

    monkeypatch.setattr(image_store, "Decoders", Watched)
    root = shutil.copytree(home / "images", tmp_path / "images")
    rows = manifest.rows
    for name in rows.image[rows.split == "test"]:
        (root / name).unlink()  # were one of these read, it would be among the failures
    report = train_autoencoder(manifest, root, tmp_path / "out", **QUICK)
    assert asked == set(rows.image[rows.split == "train"])
    assert report.failures == []
    assert weights(tmp_path / "out") == weights(quick)


def test_patients_held_out_are_others_and_a_tenth(home: Path, manifest: Manifest) -> None:
    rows = manifest.rows[manifest.rows.split == "train"]
    held_out = images.draw_held_out(rows, seed=0)
    assert not set(rows.patient[held_out]) & set(rows.patient[~held_out])
    assert 0.05 < rows.study[held_out].nunique() / rows.study.nunique() < 0.2
    shape = preprocessing_for(32, "stretch")
    read = images.read_images(manifest, home / "images", shape, seed=0)
    assert (len(read.learned), len(read.held_out)) == ((~held_out).sum(), held_out.sum())
    name = rows.image[held_out].iloc[0]
    pixels = prepare(np.array(Image.open(home / "images" / name)), shape)
    assert np.array_equal(read.pixels[read.held_out[0]], pixels)


@pytest.mark.parametrize("n_patients", range(2, 13))
def test_of_any_two_patients_one_is_held_out(n_patients: int) -> None:
    names = [f"p{number}" for number in range(n_patients)]
    rows = pd.DataFrame({"patient": names, "study": names, "region": names})
    assert 1 <= images.draw_held_out(rows, seed=0).sum() < n_patients


def test_a_content_that_is_learned_from_is_never_held_out(home: Path, manifest: Manifest) -> None:
    rows = manifest.rows[manifest.rows.split == "train"].reset_index(drop=True)
    held_out = images.draw_held_out(rows, seed=0)
    twin = rows[~held_out].iloc[0]  # somebody held out has the same bytes, under another name
    place = int(np.flatnonzero(held_out)[0])
    shared = rows.copy()
    shared.loc[place, ["image", "sha256"]] = [twin.image, twin.sha256]
    shape = preprocessing_for(32, "stretch")
    read = images.read_images(with_rows(manifest, shared), home / "images", shape, seed=0)
    assert len(read.held_out) == held_out.sum() - 1
    assert len(read.learned) == (~held_out).sum()


def test_training_ends_when_nothing_more_is_gained() -> None:
    class Idle(training.Training):
        def __init__(self) -> None:
            self._asked = training.TrainingConfig(
                Architecture(32, (8,), 4), 500, 8, 1e-3, "cpu", "fp32", 0
            )
            self.epochs = [{"loss": 1.0, "held_out_loss": loss} for loss in (3.0, 1.0, 1.0)]

    idle = Idle()
    assert idle.best_epoch == 2
    assert not idle.is_over
    idle.epochs += [{"loss": 0.1, "held_out_loss": 1.1}] * (training.PATIENCE - 1)
    assert idle.is_over


def test_the_best_epoch_is_kept_and_not_the_last(
    home: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter((3.0, 1.0, 2.0))
    monkeypatch.setattr(training.Training, "_look", lambda *_: next(losses))
    shape = preprocessing_for(32, "stretch")
    read = images.read_images(manifest, home / "images", shape, seed=0)
    asked = training.TrainingConfig(Architecture(32, (8,), 4), 3, 8, 1e-3, "cpu", "fp32", 0)
    one = training.Training(asked, read, shape)
    after = []
    while not one.is_over:
        one.run_epoch(lambda _: None)
        after.append(one.tensors()["model.encoder.code.weight"])
    assert (len(after), one.best_epoch) == (3, 2)
    kept = one.best["encoder.code.weight"]
    assert [torch.equal(kept, weight) for weight in after] == [False, True, False]


def test_bf16_learns_too(home: Path, manifest: Manifest, tmp_path: Path) -> None:
    asked = {**QUICK, "precision": "bf16"}
    report = train_autoencoder(manifest, home / "images", tmp_path / "out", **asked)
    assert np.isfinite(report.held_out_loss)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_a_collapse_is_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medembed.autoencoder.job.mean_image_loss", lambda _: 0.0)
    arguments = ("autoencoder", home / "manifest.csv", "--image-root", home / "images")
    result = run(*arguments, "--out", tmp_path / "out", *options({**QUICK, "epochs": 1}))
    assert result.exit_code == 0
    assert "no better than the mean image" in result.stderr
    assert result.stdout == ""


# Its code as embeddings


def by_hand(directory: Path, home: Path, names: list[str]) -> torch.Tensor:
    """Compute the code, (n, channels, side, side), by the whole module in the files' tensors."""
    model = Autoencoder(Architecture(32, (8, 16), 6))
    model.load_state_dict(load_file(directory / "model.safetensors"))
    greys = [np.array(Image.open(home / "images" / name)) for name in names]
    shape = preprocessing_for(32, "stretch")
    pixels = torch.from_numpy(np.stack([prepare(grey, shape) for grey in greys]))
    with torch.no_grad():
        code: torch.Tensor = model.encoder((pixels[:, None] / 255 - 0.5) / 0.5)
    return code


def test_extract_stores_what_the_module_itself_gives(
    home: Path, manifest: Manifest, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, document = trained
    encoder = load_encoder(out, device="cpu", poolings=["grid4"])
    assert encoder.dimensions == {"mean": (6,), "max": (6,), "grid4": (16, 6)}
    assert encoder.fingerprint == document["fingerprint"]
    assert encoder.source == "encoder"
    kept = ("mean", "max", "grid4")
    cache = tmp_path / "cache"
    report = extract(manifest, home / "images", encoder, cache, poolings=kept, dtype="float32")
    assert (report.embedded, report.failed) == (len(manifest.rows), 0)
    code = by_hand(out, home, list(manifest.rows.image))
    assert code.shape[1:] == (6, 8, 8)
    cells = torch.nn.functional.avg_pool2d(code, 2).flatten(2).transpose(1, 2)
    expected = {"mean": code.mean((2, 3)), "max": code.amax((2, 3)), "grid4": cells}
    for name, values in expected.items():
        rows = load_embeddings(cache, manifest, pool=name, cells=name == "grid4").X
        assert np.isfinite(rows).all()
        assert rows.shape == tuple(values.flatten(1).shape)
        assert np.abs(rows - values.flatten(1).numpy()).max() < 1e-5, name


def test_a_row_depends_neither_on_its_place_nor_on_its_neighbours(quick: Path) -> None:
    encoder = load_encoder(quick, device="cpu", precision="fp32")
    assert isinstance(encoder, PipelinedEncoder)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32), dtype=np.uint8)
    rows = encoder.encode(pixels, ["max", "mean"])
    other = encoder.encode(np.concatenate([pixels[3:], 255 - pixels[:3]]), ["max", "mean"])
    for name in rows:
        assert np.array_equal(rows[name][3:], other[name][:3])


def test_the_reference_of_bf16_is_the_same_encoder_in_fp32(quick: Path) -> None:
    encoder = load_encoder(quick, device="cpu", precision="bf16")
    assert isinstance(encoder, PipelinedEncoder)
    reference = encoder.reference()
    assert (reference.precision, reference.fingerprint) == ("fp32", encoder.fingerprint)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32), dtype=np.uint8)
    exact, near = (e.encode(pixels, ["mean"])["mean"] for e in (reference, encoder))
    assert 0 < np.abs(exact - near).max() < 0.1


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_extraction_prepares_images_as_training_did(fit: str, tmp_path: Path) -> None:
    asked = preprocessing_for(48, fit)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_config(asked)))
    assert read_preprocessing(tmp_path, fit) == asked


@pytest.mark.parametrize("change", ["weight", "architecture", "decoder", "layout", "card"])
def test_the_fingerprint_is_that_of_the_encoder_alone(
    quick: Path, tmp_path: Path, change: str
) -> None:
    other = {"norm_groups": 4} if change == "architecture" else {}
    target = copied(quick, tmp_path / "changed", **other)
    tensors = load_file(target / "model.safetensors")
    if change == "weight":
        tensors["encoder.code.bias"].view(torch.int32)[1:2].add_(1)
    if change == "decoder":
        tensors = {n: t for n, t in tensors.items() if n != "decoder.grey.1.bias"}
        tensors["decoder.grey.1.weight"].fill_(torch.nan)
    save_file(tensors, target / "model.safetensors")
    if change == "layout":
        split_in_two(target)
    if change == "card":
        (target / "training.json").unlink()
    same = load_encoder(target, device="cpu").fingerprint == load_encoder(quick).fingerprint
    assert same == (change not in ("weight", "architecture"))


def split_in_two(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": 40}, "makes images of 32 x 32, but its encoder reads 40 x 40"),
        ({"image_size": "many"}, "image_size 'many' is not a whole number"),
        ({"image_size": 33}, "cannot be halved 2 times"),
        ({"widths": 16}, "widths 16 is no list"),
        ({"widths": []}, "1 to 10 widths; this one has 0"),
        ({"widths": [8, True]}, "widths True is not a whole number"),
        ({"widths": [8, 10**30]}, "is not a whole number from 1 to 16384"),
        ({"widths": [8, 12]}, "multiples of 8"),
        ({"widths": [8, 24]}, r"has shape .*, its config asks for"),
        ({"latent_channels": None}, "latent_channels None"),
        ({"norm_groups": 0}, "norm_groups 0"),
        ({"fit": "pad"}, "trained on images brought to its size by --fit pad"),
        ({"model_type": "autoencoder"}, "medembed-autoencoder"),
    ],
)
def test_a_damaged_config_is_one_clear_error(
    quick: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(EncoderError, match=said):
        load_encoder(copied(quick, tmp_path / "damaged", **changes), device="cpu")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("encoder.code.bias"), r"the encoder lacks code\.bias, one of 1"),
        (lambda t: t.update({"encoder.more": torch.ones(2)}), "the encoder holds more, one of 1"),
        (lambda t: t["encoder.code.bias"].fill_(torch.inf), r"encoder\.code\.bias holds values"),
        (lambda t: [t.pop(n) for n in list(t) if n[0] == "e"], "holds no encoder: .* Train it"),
    ],
)
def test_weights_that_are_not_whole_are_refused(
    quick: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    target = copied(quick, tmp_path / "damaged")
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    with pytest.raises(EncoderError, match=said):
        load_encoder(target, device="cpu")


def test_colours_of_different_scale_are_refused(quick: Path, tmp_path: Path) -> None:
    target = copied(quick, tmp_path / "coloured")
    path = target / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "image_mean": [0.4, 0.5, 0.6]}))
    with pytest.raises(EncoderError, match="one grey channel"):
        load_encoder(target, device="cpu")


def test_an_autoencoder_has_no_base(quick: Path, tmp_path: Path) -> None:
    base = {"format": "medembed-adapted-encoder", "version": 1, "base": "demo"}
    base |= {"base_fingerprint": "0", "fingerprint": "1", "base_directory": str(quick)}
    target = copied(quick, tmp_path / "adapted")
    save_file({"code.bias": torch.zeros(6)}, target / "changed.safetensors")
    (target / "base.json").write_text(json.dumps({**base, "base": None}))
    with pytest.raises(EncoderError, match="Keep one of the two"):
        load_encoder(target, device="cpu")


def test_weights_cut_off_are_refused(quick: Path, tmp_path: Path) -> None:
    target = copied(quick, tmp_path / "cut")
    (target / "model.safetensors").write_bytes(weights(quick)[:-10])
    with pytest.raises(EncoderError, match="not a whole safetensors file"):
        load_encoder(target, device="cpu")


# What is refused, and what is left behind


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"size": 100, "widths": (8, 8, 8)}, EncoderError, "Give --size 96 or 104"),
        ({"size": 4}, EncoderError, "Give --size 8 or 12"),
        ({"widths": (8, 12)}, EncoderError, "--widths that are multiples of 8"),
        ({"widths": ()}, EncoderError, "this one has 0"),
        ({"device": "tpu"}, EncoderError, "device 'tpu' is unknown. Choose one of: auto, cpu"),
        ({"precision": "fp16"}, EncoderError, "Choose one of: auto, fp32, bf16"),
        ({"fit": "crop"}, EncoderError, "Choose one of: stretch, pad"),
        ({"learning_rate": float("nan")}, EncoderError, "--lr is nan"),
        ({"epochs": 0}, EncoderError, "epochs is 0"),
        ({"batch_size": 0}, EncoderError, "batch_size is 0"),
        ({"learning_rate": 1e30}, EncoderError, "in epoch 1: .* Give a smaller --lr than 1e"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_error_and_leaves_nothing(
    home: Path,
    manifest: Manifest,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        train_autoencoder(manifest, home / "images", tmp_path / "out", **{**QUICK, **changes})
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_without_train_or_hashes_is_refused(
    home: Path, manifest: Manifest, tmp_path: Path
) -> None:
    for rows, error, said in (
        (manifest.rows[manifest.rows.split == "test"], TrainingDataError, "0 images of 0 patients"),
        (manifest.rows[:1].assign(split="train"), TrainingDataError, "1 images of 1 patients"),
        (manifest.rows.assign(sha256=""), ManifestError, "without --structure-only"),
    ):
        with pytest.raises(error, match=said):
            train_autoencoder(with_rows(manifest, rows), home / "images", tmp_path / "o", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_not_the_images_is_refused(
    home: Path, manifest: Manifest, tmp_path: Path
) -> None:
    refused = ((tmp_path / "no", "no directory at"), (tmp_path, "none of the .* images"))
    for root, said in refused:
        with pytest.raises(PathNotFoundError, match=said):
            train_autoencoder(manifest, root, tmp_path / "out", **QUICK)
    with pytest.raises(PathNotFoundError, match="Create it"):
        train_autoencoder(manifest, home / "images", tmp_path / "no" / "out", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_images_of_other_bytes_are_all_named_and_nothing_is_trained(
    home: Path, manifest: Manifest, tmp_path: Path
) -> None:
    root = shutil.copytree(home / "images", tmp_path / "images")
    names = manifest.rows.image[manifest.rows.split == "train"].iloc[[0, 5]].tolist()
    for name in names:
        Image.new("L", (64, 64), 9).save(root / name)
    with pytest.raises(ManifestError, match=r"2 image.* nothing was trained") as raised:
        train_autoencoder(manifest, root, tmp_path / "out", **QUICK)
    assert [problem.split(":")[0] for problem in raised.value.problems] == names
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_images_that_fail_are_left_out_counted_and_named(
    home: Path, manifest: Manifest, tmp_path: Path
) -> None:
    root = shutil.copytree(home / "images", tmp_path / "images")
    rows = manifest.rows.copy()
    absent, broken, twin = np.flatnonzero(rows.split == "train")[[1, 3, 4]].tolist()
    rows.loc[twin, ["label", "patient", "study", "region"]] = rows.loc[
        broken, ["label", "patient", "study", "region"]
    ]
    (root / rows.image[absent]).unlink()
    for row in (broken, twin):
        (root / rows.image[row]).write_bytes(b"no image")
        rows.loc[row, "sha256"] = hashlib.sha256(b"no image").hexdigest()
    write_manifest(with_rows(manifest, rows), tmp_path / "m.csv")
    arguments = ("autoencoder", tmp_path / "m.csv", "--image-root", root)
    result = run(*arguments, "--out", tmp_path / "out", *options({**QUICK, "epochs": 1}), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    stages = {failure["image"]: failure["stage"] for failure in document["failures"]}
    assert stages == {
        rows.image[absent]: "read",
        rows.image[broken]: "decode",
        rows.image[twin]: "decode",
    }
    assert document["failed"] == 2  # contents
    n_train = (rows.split == "train").sum()
    assert document["images"] + document["held_out_images"] == n_train - 3
    for name in stages:
        assert name in result.stderr
        assert name not in (tmp_path / "out" / "training.json").read_text()


def test_where_the_images_do_not_fit_the_size_is_said(
    home: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MedembedError, match=r"no room for \d+ MB of .* smaller --size"):
        train_autoencoder(manifest, home / "images", tmp_path / "out", **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("_loss", torch.OutOfMemoryError("CUDA out of memory")),
        ("_compute", RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),  # not in a lane
    ],
)
def test_a_batch_that_does_not_fit_names_the_option(
    home: Path,
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: RuntimeError,
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(training.Training, where, full)
    with pytest.raises(DeviceMemoryError, match="smaller --batch-size"):
        train_autoencoder(manifest, home / "images", tmp_path / "out", **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["encoder", "empty", "file"])
def test_what_is_there_is_never_written_over(
    home: Path, manifest: Manifest, quick: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    if kind == "encoder":
        shutil.copytree(quick, out)
    elif kind == "empty":
        out.mkdir()
    else:
        out.write_text("mine")
    with pytest.raises(RunError, match=r"already exists.* Choose another --out"):
        train_autoencoder(manifest, home / "images", out, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Stop:
    """Interrupt in the middle of an epoch, as Ctrl-C would."""

    def __init__(self, epoch: int) -> None:
        self._epoch, self._told = epoch, ""

    def show_status(self, words: str) -> None:
        self._told = words

    def __call__(self, done: int, total: int) -> None:
        if self._told.startswith("Training") and done / total * QUICK["epochs"] > self._epoch - 0.5:
            raise KeyboardInterrupt


def interrupt(manifest: Manifest, home: Path, out: Path, epoch: int) -> KeyboardInterrupt:
    stop = Stop(epoch)
    with pytest.raises(KeyboardInterrupt) as raised:
        train_autoencoder(
            manifest, home / "images", out, **QUICK, progress=stop, on_status=stop.show_status
        )
    return raised.value


def test_an_interrupted_training_goes_on_to_the_same_bytes(
    home: Path, manifest: Manifest, quick: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    error = interrupt(manifest, home, out, 3)
    assert error.__notes__ == ["2 epochs of this training are kept."]
    assert not out.exists()
    words: list[str] = []
    train_autoencoder(manifest, home / "images", out, **QUICK, on_status=words.append)
    assert "Training on from epoch 2" in words
    assert weights(out) == weights(quick)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    cards = [json.loads((path / "training.json").read_text()) for path in (out, quick)]
    assert cards[0]["epochs"] == cards[1]["epochs"]


def test_a_memory_that_fills_later_costs_no_epoch(
    home: Path,
    manifest: Manifest,
    quick: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_epoch = training.Training.run_epoch

    def full(own: training.Training, tick: Any) -> None:
        if len(own.epochs) == 2:
            raise DeviceMemoryError("full")
        run_epoch(own, tick)

    out, words = tmp_path / "out", []
    with monkeypatch.context() as patched:
        patched.setattr(training.Training, "run_epoch", full)
        with pytest.raises(DeviceMemoryError):
            train_autoencoder(manifest, home / "images", out, **QUICK)
    train_autoencoder(manifest, home / "images", out, **QUICK, on_status=words.append)
    assert "Training on from epoch 2" in words
    assert weights(out) == weights(quick)


@pytest.mark.parametrize("at", ["config.json", "model.safetensors", "training.json", "rename"])
def test_an_end_while_the_encoder_is_written_leaves_none_and_is_made_good(
    home: Path,
    manifest: Manifest,
    quick: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    def end(path: Path, *rest: Any) -> None:
        if path.name == at or at == "rename" == rest[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomically(path, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_atomically", end)
        patched.setattr(checkpoint.os, "rename", lambda path, _: end(path, "rename"))
        with pytest.raises(OSError, match="No space left"):
            train_autoencoder(manifest, home / "images", out, **QUICK)
    assert not out.exists()
    with pytest.raises(EncoderError):
        load_encoder(tmp_path / "out.partial")
    words: list[str] = []
    train_autoencoder(manifest, home / "images", out, **QUICK, on_status=words.append)
    assert "Training on from epoch 3" in words
    assert weights(out) == weights(quick)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_before_the_first_epoch_leaves_nothing(
    home: Path, manifest: Manifest, tmp_path: Path
) -> None:
    interrupt(manifest, home, tmp_path / "out", 1)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_training_that_was_asked_otherwise_is_refused(
    home: Path, manifest: Manifest, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(manifest, home, out, 2)
    for changes, said in (
        ({"latent_channels": 4}, "with --latent-channels 6; this one asks for --latent-channels 4"),
        ({"widths": (8, 8)}, "with --widths 8,16; this one asks for --widths 8,8"),
        ({"learning_rate": 0.1}, "with --lr 0.005; .* or remove"),
        ({"seed": 3}, "--seed 0"),
    ):
        with pytest.raises(RunError, match=said):
            train_autoencoder(manifest, home / "images", out, **{**QUICK, **changes})
    fewer = with_rows(manifest, manifest.rows[2:])
    with pytest.raises(RunError, match=f"a manifest of digest {manifest.digest()[:12]}"):
        train_autoencoder(fewer, home / "images", out, **QUICK)
    with pytest.raises(EncoderError, match="holds neither preprocessor_config"):
        load_encoder(out.with_name("out.partial"))


def test_a_state_that_is_damaged_or_of_other_images_is_begun_anew(
    home: Path, manifest: Manifest, quick: Path, tmp_path: Path
) -> None:
    out, state = tmp_path / "out", tmp_path / "out.partial" / "state.safetensors"
    interrupt(manifest, home, out, 2)
    state.write_bytes(state.read_bytes()[:-3])
    words: list[str] = []
    train_autoencoder(manifest, home / "images", out, **QUICK, on_status=words.append)
    assert "Training" in words
    assert weights(out) == weights(quick)
    shutil.rmtree(out)
    root = shutil.copytree(home / "images", tmp_path / "images")
    lost = root / manifest.rows.image[manifest.rows.split == "train"].iloc[0]
    lost.rename(tmp_path / "lost")
    interrupt(manifest, tmp_path, out, 2)  # one image less
    (tmp_path / "lost").rename(lost)
    train_autoencoder(manifest, root, out, **QUICK)
    assert weights(out) == weights(quick)


@pytest.mark.parametrize(
    "notes",
    ["[]", "{}", '{"epochs": 3, "n_steps": 1, "images": "", "asked": {}}',
     '{"epochs": [{"loss": "low", "held_out_loss": 0.5}], "n_steps": 1, "images": "", "asked": {}}',
     '{"epochs": [], "n_steps": -1, "images": "", "asked": {}}',
     '{"epochs": [], "n_steps": 1, "images": "", "asked": [], "more": 1}'],
)  # fmt: skip
def test_a_state_that_no_training_saves_counts_as_none(notes: str, tmp_path: Path) -> None:
    work = checkpoint.CheckpointDir(tmp_path / "out", {"seed": 1})
    with work.locked():
        work.save({"model.weight": torch.zeros(2)}, epochs=[], n_steps=0, images="0")
        assert work.load() is not None
        state = work.path / "state.safetensors"
        state.write_bytes(save({"model.weight": torch.zeros(2)}, {"notes": notes}))
        assert work.load() is None


def test_tensors_of_another_training_are_not_resumed(
    home: Path, manifest: Manifest, quick: Path, tmp_path: Path
) -> None:
    out, state = tmp_path / "out", tmp_path / "out.partial" / "state.safetensors"
    interrupt(manifest, home, out, 2)
    with safe_open(state, "pt") as file:
        notes = file.metadata()["notes"]
    state.write_bytes(save({"model.weight": torch.zeros(2)}, {"notes": notes}))
    train_autoencoder(manifest, home / "images", out, **QUICK)
    assert weights(out) == weights(quick)


def test_a_training_is_refused_where_another_process_trains(
    home: Path, manifest: Manifest, tmp_path: Path
) -> None:
    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(RunError, match="written by another process"):
            train_autoencoder(manifest, home / "images", tmp_path / "out", **QUICK)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(manifest, home / "images", tmp_path / "out", **QUICK, progress=meanwhile)


# `medembed autoencoder` as its entry point runs it, with epochs that take their time.
COMMAND = """
    import time

    from medembed.__main__ import run
    from medembed.autoencoder import job, training

    class Slow(training.Training):
        def run_epoch(self, tick):
            super().run_epoch(tick)
            time.sleep(0.2)

    job.Training = Slow
    run()
"""


def start(home: Path, out: Path) -> "subprocess.Popen[str]":
    """Train in another process until two epochs are kept."""
    arguments = ["autoencoder", "manifest.csv", "--image-root", "images", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(COMMAND), *arguments, *options(QUICK)],
        cwd=home,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    state = out.with_name(f"{out.name}.partial") / "state.safetensors"
    while not state.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def test_a_killed_training_leaves_nothing_that_loads_and_goes_on(
    home: Path, manifest: Manifest, quick: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(home, out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with pytest.raises(EncoderError):
        load_encoder(tmp_path / "out.partial")
    words: list[str] = []
    train_autoencoder(manifest, home / "images", out, **QUICK, on_status=words.append)
    assert any(word.startswith("Training on from epoch") for word in words)
    assert weights(out) == weights(quick)


def test_sigterm_says_what_is_kept(home: Path, tmp_path: Path) -> None:
    process = start(home, tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "epochs of this training are kept" in messages
    assert "Traceback" not in messages


def test_the_command_refuses_widths_that_are_no_numbers(home: Path, tmp_path: Path) -> None:
    arguments = ("autoencoder", home / "manifest.csv", "--image-root", home / "images")
    for widths in ("8,x", "8,,16", "8,-16"):
        assert run(*arguments, "--out", tmp_path / "o", "--widths", widths).exit_code == 2


def test_the_config_is_the_architecture_and_the_fit() -> None:
    config = checkpoint_config(Architecture(64, (8, 16, 24), 5), "pad")
    assert config == {
        "model_type": "medembed-autoencoder",
        "image_size": 64,
        "widths": [8, 16, 24],
        "latent_channels": 5,
        "norm_groups": 8,
        "fit": "pad",
    }
