"""Fine-tuning as a run: what it writes, what its encoders give, and what it refuses."""

import hashlib
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from made_finetuning import QUICK, make_cohort, make_tower, state_of, tune
from made_sweeps import auroc_of
from safetensors.torch import load_file, save_file
from scipy.special import logit

from medembed.cache.embeddings import load_embeddings
from medembed.cli import main
from medembed.core.errors import (
    EncoderError,
    ManifestError,
    PathNotFoundError,
    RunError,
    TrainingDataError,
)
from medembed.core.schedule import rate_at
from medembed.dataset.manifest import make_manifest, read_manifest, write_manifest
from medembed.dataset.splits import fold_train_rows
from medembed.doctor import examine
from medembed.encoders.base_ref import (
    BASE_FILE,
    BASE_LINK,
    CHANGED_FILE,
    Origin,
    describe_base,
)
from medembed.encoders.checkpoint_files import canonical_name
from medembed.encoders.hub import Checkpoint
from medembed.encoders.loading import load_encoder
from medembed.extraction import extract
from medembed.finetuning import Hyperparameters, finetune, training
from medembed.finetuning.data_split import choose_rows
from medembed.finetuning.head_init import init_from_sweep
from medembed.finetuning.training import Trainer
from medembed.heads.packaging import load_model
from medembed.report.page import write_report
from medembed.results.comparison import compare
from medembed.results.runs import open_run
from medembed.sweeps import sweep


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cohort, a tower, its cache, a sweep on that, and a run of three depths."""
    home = tmp_path_factory.mktemp("finetuning")
    make_cohort(home, n_patients=48)
    make_tower(home / "tower")
    embed(home, home / "tower", home / "cache")
    sweep(home / "cache", home / "manifest.csv", home / "sweep", heads=("logistic", "mlp"),
          n_configs=1, jobs=1)  # fmt: skip
    tune(home, home / "tower", home / "run", unfreeze="0,1,2")
    return home


def embed(home: Path, encoder: Path, cache: Path) -> None:
    loaded = load_encoder(encoder, device="cpu", precision="fp32")
    extract(read_manifest(home / "manifest.csv"), home / "images", loaded, cache, dtype="float32")


def predictions(run: Path, head: str) -> pd.DataFrame:
    return open_run(run).predictions().query("head == @head").reset_index(drop=True)


def by_image(frame: pd.DataFrame) -> pd.Series:
    return frame.set_index("sha256")["probability"].sort_index()


# The run


def test_the_leaderboard_has_depth_and_seed_best_first(home: Path) -> None:
    run = open_run(home / "run")
    board = run.as_dict()["leaderboard"]
    assert (run.info.kind, run.is_complete) == ("finetune", True)
    assert {entry["head"] for entry in board} == {"unfreeze-0", "unfreeze-1", "unfreeze-2"}
    assert sorted(entry["depth"] for entry in board) == [0, 1, 2]
    assert [e["cv"] for e in board] == sorted((e["cv"] for e in board), reverse=True)
    for entry in board:
        assert {"pooling", "trial", "params", "seconds", "status", "error"} <= set(entry)
        assert (entry["seed"], entry["status"], entry["error"]) == (0, "ok", None)
        assert (entry["encoder"] is None) == (entry["depth"] == 0)


def test_held_out_patients_and_test_rows_are_predicted(home: Path) -> None:
    manifest = read_manifest(home / "manifest.csv")
    folds = fold_train_rows(manifest.rows, n_folds=5, seed=0)
    rows = manifest.rows.set_index("image")
    held = set(rows.loc[folds[folds == 0].index, "sha256"])
    tested = set(rows.loc[rows["split"] == "test", "sha256"])
    for depth in (0, 1, 2):
        own = predictions(home / "run", f"unfreeze-{depth}")
        train = own[own["split"] == "train"]
        assert set(train["sha256"]) == held
        assert (train["fold"] == 0).all()
        assert set(own.loc[own["split"] == "test", "sha256"]) == tested
        assert own.loc[own["split"] == "test", "fold"].isna().all()
        assert own["probability"].between(0, 1).all()


def test_the_priors_are_those_of_a_sweep(home: Path) -> None:
    for prior in ("class-prior", "region-prior"):
        ours, theirs = (by_image(predictions(home / name, prior)) for name in ("run", "sweep"))
        assert ours.equals(theirs)


def test_the_ledger_has_the_history_of_every_depth(home: Path) -> None:
    records = open_run(home / "run").trial_records()
    assert [record.depth for record in records] == [0, 1, 2]
    for record in records:
        assert len(record.history) == QUICK.epochs
        assert set(record.history[0]) == {"train_loss", "loss", "auroc"}
        best = max(record.history, key=lambda epoch: epoch["auroc"])
        assert record.history[record.best_epoch - 1]["auroc"] == best["auroc"]
        own = predictions(home / "run", record.head).query("split == 'train'")
        assert record.score == pytest.approx(auroc_of(own))


def test_who_decides_when_to_stop_is_neither_trained_on_nor_held_out(home: Path) -> None:
    manifest = read_manifest(home / "manifest.csv")
    rows = choose_rows(manifest, 5, 0)
    parts = [rows.fitted, rows.judging, rows.held, rows.tested]
    patients = [set(rows.rows["patient"].iloc[part]) for part in parts]
    assert all(patients)
    assert sum(map(len, patients)) == len(set.union(*patients)) == rows.rows["patient"].nunique()
    assert sum(map(len, parts)) == len(rows)


def test_a_held_out_label_decides_nothing_in_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is held out has another label: the same history, the same best epoch."""
    rows = choose_rows(read_manifest(home / "manifest.csv"), 5, 0)
    labels = rows.rows["label"].copy()
    labels.iloc[rows.held] = 1 - labels.iloc[rows.held]
    other = replace(rows, rows=rows.rows.assign(label=labels))
    monkeypatch.setattr("medembed.finetuning.job.choose_rows", lambda *_: other)
    tune(home, home / "tower", tmp_path / "run", unfreeze="0")
    first = open_run(home / "run").trial_records()[0]
    [found] = open_run(tmp_path / "run").trial_records()
    assert (found.history, found.best_epoch) == (first.history, first.best_epoch)
    assert found.score == pytest.approx(1 - first.score)


def test_compare_and_report_take_it_beside_a_sweep(home: Path, tmp_path: Path) -> None:
    result = compare([home / "sweep", home / "run"])
    rows = {row["head"]: row for row in result["rows"] if not row["baseline"]}
    assert {"logistic", "mlp", "unfreeze-0", "unfreeze-1", "unfreeze-2"} <= set(rows)
    assert all(row["scores"]["auroc"]["value"] is not None for row in rows.values())
    assert [point["depth"] for point in result["depths"][0]["points"]] == [0, 1, 2]
    assert {run["dropped"] for run in result["runs"]} == {0}
    page = write_report([home / "sweep", home / "run"], tmp_path / "report", n_resamples=100)
    assert "unfreeze-2" in Path(page["page"]).read_text()


def test_the_run_names_no_path_and_no_patient(home: Path) -> None:
    text = (home / "run" / "run.json").read_text()
    assert str(home) not in text
    assert "patient000" not in text
    assert str(home) not in (home / "run" / "encoders" / "unfreeze-1" / BASE_FILE).read_text()


def test_the_same_command_again_trains_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (home / "run" / "predictions.parquet").read_bytes()
    monkeypatch.setattr(Trainer, "train", None)
    result = tune(home, home / "tower", home / "run", unfreeze="2,1,0")
    assert len(result["leaderboard"]) == 3
    assert (home / "run" / "predictions.parquet").read_bytes() == before


def test_several_seeds_have_names_of_their_own(home: Path, tmp_path: Path) -> None:
    recipe = replace(QUICK, epochs=1)
    result = tune(home, home / "tower", tmp_path / "run", unfreeze="0", n_seeds=2, config=recipe)
    found = {(entry["head"], entry["seed"]) for entry in result["leaderboard"]}
    assert found == {("unfreeze-0-s0", 0), ("unfreeze-0-s1", 1)}
    first, second = (predictions(tmp_path / "run", f"unfreeze-0-s{seed}") for seed in (0, 1))
    assert list(first["sha256"]) == list(second["sha256"])
    assert not first["probability"].equals(second["probability"])
    [spread] = compare([tmp_path / "run"])["seeds"]
    assert (spread["head"], spread["n_seeds"]) == ("unfreeze-0", 2)


# The head


def test_depth_0_is_a_head_trained_on_frozen_embeddings(home: Path, tmp_path: Path) -> None:
    """The oracle is torch's own loop, on what `extract` embeds, from the swept head's start."""
    recipe = Hyperparameters(epochs=3, batch_size=16, augment=False, lr=1e-2, patience=9)
    options = {"unfreeze": "0", "from_run": home / "sweep", "config": recipe}
    out = tmp_path / "run"
    shutil.copytree(home / "sweep", tmp_path / "sweep")
    keep_only(tmp_path / "sweep", "logistic")
    tune(home, home / "tower", out, **{**options, "from_run": tmp_path / "sweep"})
    found = load_embeddings(home / "cache", home / "manifest.csv", pool="mean+max")
    chosen = choose_rows(read_manifest(home / "manifest.csv"), 5, 0)
    names = chosen.rows["image"].iloc[chosen.fitted]
    fitted = np.flatnonzero(found.rows["image"].isin(names))
    swept = load_model(home / "sweep" / "models" / "logistic").head
    head = type(swept)(**swept.get_params()).fit(found.X[fitted], found.y[fitted])
    mean, scale = (np.float32(getattr(head.projection_, name)) for name in ("mean", "scale"))
    X = torch.from_numpy((found.X - mean) / scale)
    layer = torch.nn.Linear(X.shape[1], 1)
    layer.weight.data[:] = torch.from_numpy(head.coef_.astype(np.float32))
    layer.bias.data[:] = torch.from_numpy(head.intercept_.astype(np.float32))
    y = torch.from_numpy(found.y.astype(np.float32))
    n_abnormal = float(y[fitted].sum())
    share = {1.0: n_abnormal, 0.0: len(fitted) - n_abnormal}
    weight = torch.tensor([len(fitted) / (2 * share[float(v)]) for v in y.clamp(0)])
    optimizer = torch.optim.AdamW(
        [
            {"params": [layer.weight], "weight_decay": 0.01},
            {"params": [layer.bias], "weight_decay": 0.0},
        ],
        lr=recipe.lr,
    )
    n_steps = -(-len(fitted) // 16)
    states = []
    for epoch in (1, 2, 3):
        order = np.random.default_rng([0, 1 << 20, epoch]).permutation(fitted)
        for step, rows in enumerate(np.array_split(order, n_steps)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate_at((epoch - 1) * n_steps + step, 3 * n_steps, 0.1)
            losses = torch.nn.functional.binary_cross_entropy_with_logits(
                layer(X[rows])[:, 0], y[rows], weight[rows]
            )
            optimizer.zero_grad()
            losses.backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
        states.append(layer(X)[:, 0].detach().numpy())
    best = open_run(out).trial_records()[0].best_epoch
    wanted = pd.Series(states[best - 1], index=found.rows["sha256"])
    ours = by_image(predictions(out, "unfreeze-0"))
    assert np.abs(logit(ours) - wanted.loc[ours.index]).max() < 1e-4


def keep_only(run: Path, head: str) -> None:
    """Take all other heads off a run's leaderboard."""
    info = json.loads((run / "run.json").read_text())
    info["leaderboard"] = [entry for entry in info["leaderboard"] if entry["head"] == head]
    (run / "run.json").write_text(json.dumps(info))


def test_the_start_from_a_sweep_has_not_seen_the_held_out_patients(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is held out has another label: the same head begins."""
    starts = []
    monkeypatch.setattr(
        "medembed.finetuning.job.init_from_sweep",
        lambda *arguments: starts.append(arguments) or init_from_sweep(*arguments),
    )
    options = {"unfreeze": "0", "config": replace(QUICK, epochs=1)}
    tune(home, home / "tower", tmp_path / "run", from_run=home / "sweep", **options)
    swept, X, y, fitted, seed = starts[0]
    other = y.copy()
    unseen = np.setdiff1d(np.arange(len(y)), fitted)
    other[unseen] = 1 - other[unseen]
    ours, theirs = (
        init_from_sweep(swept, X, y, fitted, seed),
        init_from_sweep(swept, X, other, fitted, seed),
    )
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        assert np.array_equal(a, b)


def test_operating_points_are_packaged_and_are_part_of_the_question(
    home: Path, tmp_path: Path
) -> None:
    asked = {"unfreeze": "0", "operating_points": ["sensitivity=0.8"]}
    tune(home, home / "tower", tmp_path / "run", **asked)
    run = open_run(tmp_path / "run")
    assert "--operating-point sensitivity=0.8" in run.info.command
    card = json.loads((run.model_path("unfreeze-0") / "model.json").read_text())["card"]
    names = ["youden", "sensitivity=0.95", "specificity=0.9", "sensitivity=0.8"]
    assert [point["name"] for point in card["operating_points"]] == names
    assert card["operating_points"][0]["threshold"] == card["threshold"]
    assert not hasattr(open_run(home / "run").info.asked, "operating_points")
    with pytest.raises(RunError, match="answers another question: operating_points"):
        tune(home, home / "tower", tmp_path / "run", unfreeze="0")


def test_the_models_predict_on_embeddings_of_their_encoders(home: Path, tmp_path: Path) -> None:
    for name, encoder in (("unfreeze-0", home / "tower"), ("unfreeze-2", None)):
        encoder = encoder or home / "run" / "encoders" / name
        embed(home, encoder, tmp_path / name)
        found = load_embeddings(tmp_path / name, home / "manifest.csv", pool="mean+max")
        model = load_model(home / "run" / "models" / name)
        assert model.card["spec"]["encoder"] == found.spec.encoder
        assert model.card["spec"]["preprocessing"] == found.spec.preprocessing
        said = pd.Series(model.head.predict_proba(found.X)[:, 1], index=found.rows["sha256"])
        ours = by_image(predictions(home / "run", name))
        assert np.abs(logit(said.loc[ours.index]) - logit(ours)).max() < 1e-4


# Adapted encoders


def test_an_adapted_encoder_embeds_as_the_network_that_was_trained(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    train = Trainer.train

    def watched(trainer: Trainer, **known: Any) -> Any:
        trained = train(trainer, **known)
        rows = np.arange(len(trainer.rows))
        with torch.no_grad():
            vectors = trainer.network.vectors(trainer.images.take(rows, "cpu"))
        seen.update(X=vectors.numpy(), rows=trainer.rows.rows)
        return trained

    monkeypatch.setattr(Trainer, "train", watched)
    tune(home, home / "tower", tmp_path / "run", unfreeze="2")
    embed(home, tmp_path / "run" / "encoders" / "unfreeze-2", tmp_path / "cache")
    found = load_embeddings(tmp_path / "cache", home / "manifest.csv", pool="mean+max")
    assert list(found.rows["sha256"]) == list(seen["rows"]["sha256"])
    assert np.abs(found.X - seen["X"]).max() < 1e-5
    frozen = load_embeddings(home / "cache", home / "manifest.csv", pool="mean+max")
    assert np.abs(found.X - frozen.X).max() > 1e-3


def test_its_fingerprint_is_that_of_the_whole_tower_stored(home: Path, tmp_path: Path) -> None:
    adapted = home / "run" / "encoders" / "unfreeze-1"
    changed = load_file(adapted / CHANGED_FILE)
    whole = load_file(home / "tower" / "model.safetensors")
    for name in list(whole):
        whole[name] = changed.pop(str(canonical_name(name)), whole[name])
    assert not changed
    shutil.copytree(home / "tower", tmp_path / "whole")
    save_file(whole, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    both = (adapted, tmp_path / "whole")
    fingerprints = {load_encoder(path, device="cpu").fingerprint for path in both}
    assert len(fingerprints) == 1
    board = {e["head"]: e["encoder"] for e in open_run(home / "run").as_dict()["leaderboard"]}
    assert fingerprints == {board["unfreeze-1"]}


def test_the_checkpoint_holds_the_changed_blocks_alone(home: Path) -> None:
    directory = home / "run" / "encoders" / "unfreeze-1"
    names = set(load_file(directory / CHANGED_FILE))
    assert names
    assert all(name.startswith(("encoder.layers.2.", "post_layernorm.")) for name in names)
    assert {path.name for path in directory.iterdir()} >= {BASE_FILE, CHANGED_FILE, "config.json"}
    assert not (directory / "model.safetensors").exists()


def test_a_base_that_moved_is_one_error_with_the_way_out(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "tower", tmp_path / "tower")
    tune(home, tmp_path / "tower", tmp_path / "run", unfreeze="1", config=replace(QUICK, epochs=1))
    adapted = tmp_path / "run" / "encoders" / "unfreeze-1"
    before = load_encoder(adapted, device="cpu").fingerprint
    shutil.move(tmp_path / "tower", tmp_path / "elsewhere")
    with pytest.raises(EncoderError, match=r"\.\./\.\./\.\./tower, is not there.*ln -s BASE"):
        load_encoder(adapted)
    (adapted / BASE_LINK).symlink_to(tmp_path / "elsewhere")
    assert load_encoder(adapted, device="cpu").fingerprint == before


def test_another_base_or_other_changed_tensors_are_refused(home: Path, tmp_path: Path) -> None:
    adapted = shutil.copytree(home / "run" / "encoders" / "unfreeze-1", tmp_path / "adapted")
    make_tower(tmp_path / "other", n_layers=3)
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    first = next(name for name in tensors if "vision" in name)
    tensors[first] = tensors[first] + 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    (adapted / BASE_LINK).symlink_to(tmp_path / "other")
    with pytest.raises(EncoderError, match="adapted rests on an encoder of fingerprint"):
        load_encoder(adapted)
    (adapted / BASE_LINK).unlink()
    (adapted / BASE_LINK).symlink_to(home / "tower")
    changed = load_file(adapted / CHANGED_FILE)
    changed["post_layernorm.bias"] += 1
    save_file(changed, adapted / CHANGED_FILE)
    with pytest.raises(EncoderError, match=f"{CHANGED_FILE} of adapted is not what training wrote"):
        load_encoder(adapted)


def test_a_base_of_the_hub_is_named_with_its_commit(tmp_path: Path) -> None:
    hub = Checkpoint(tmp_path / "snapshots" / "abc", "google/medgemma-4b-pt", "a" * 40)
    document = describe_base(Origin(hub, hub.path, "f" * 64), tmp_path / "run", "e" * 64)
    assert document["base"] == "google/medgemma-4b-pt@" + "a" * 40
    assert document["base_directory"] is None
    demo = load_encoder("demo", device="cpu")
    assert describe_base(demo.origin, tmp_path, "e" * 64)["base"] == "demo"  # type: ignore[attr-defined]


def test_doctor_asks_for_the_base_of_an_adapted_encoder(home: Path) -> None:
    checks = {check.name: check for check in examine(home / "run" / "encoders" / "unfreeze-1")}
    assert checks["encoder"].ok
    assert "tower" in checks["encoder"].detail


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"format": "else"}, "is not that of an adapted encoder"),
        ({"version": 2}, "is version 2 of medembed-adapted-encoder; this medembed reads 1"),
        ({"base": "demo"}, "does not name its base"),
        ({"fingerprint": ""}, "does not name its base"),
    ],
)
def test_a_damaged_base_file_is_one_error(
    home: Path, tmp_path: Path, document: dict[str, Any], said: str
) -> None:
    adapted = shutil.copytree(home / "run" / "encoders" / "unfreeze-1", tmp_path / "adapted")
    whole = json.loads((adapted / BASE_FILE).read_text())
    (adapted / BASE_FILE).write_text(json.dumps({**whole, **document}))
    with pytest.raises(EncoderError, match=said):
        load_encoder(adapted)


def test_an_adapted_encoder_is_fine_tuned_in_turn(home: Path, tmp_path: Path) -> None:
    adapted = home / "run" / "encoders" / "unfreeze-1"
    tune(home, adapted, tmp_path / "run", unfreeze="1", config=replace(QUICK, epochs=1))
    again = tmp_path / "run" / "encoders" / "unfreeze-1"
    fingerprints = {load_encoder(path, device="cpu").fingerprint for path in (adapted, again)}
    assert len(fingerprints) == 2
    assert "tower" in json.loads((again / BASE_FILE).read_text())["base_directory"]


# Training


def test_a_batch_in_parts_makes_the_same_step(home: Path, tmp_path: Path) -> None:
    found = []
    recipe = replace(QUICK, epochs=1)
    for parts in (1, 4):
        out = tmp_path / str(parts)
        own = replace(recipe, accumulate=parts)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Dropout, "forward", lambda self, values: values)
            tune(home, home / "tower", out, unfreeze="1", config=own)
        found.append(by_image(predictions(out, "unfreeze-1")))
    assert np.abs(logit(found[0]) - logit(found[1])).max() < 1e-4


def test_bf16_is_taken_on_a_cpu_where_it_is_asked_for(home: Path, tmp_path: Path) -> None:
    recipe = replace(QUICK, epochs=1)
    tune(home, home / "tower", tmp_path / "auto", unfreeze="1", precision="auto", config=recipe)
    assert open_run(tmp_path / "auto").info.encoder.precision == "fp32"
    tune(home, home / "tower", tmp_path / "bf16", unfreeze="1", precision="bf16", config=recipe)
    assert open_run(tmp_path / "bf16").info.encoder.precision == "bf16"
    exact, near = (by_image(predictions(tmp_path / n, "unfreeze-1")) for n in ("auto", "bf16"))
    assert 0 < np.abs(exact - near).max() < 0.1
    stored = load_file(tmp_path / "bf16" / "encoders" / "unfreeze-1" / CHANGED_FILE)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_augmented_training_differs_and_repeats(home: Path, tmp_path: Path) -> None:
    recipe = Hyperparameters(epochs=1, batch_size=16)
    for name, own in (("a", recipe), ("b", recipe), ("plain", replace(recipe, augment=False))):
        tune(home, home / "tower", tmp_path / name, unfreeze="0,1", config=own)
    files = [(tmp_path / name / "predictions.parquet").read_bytes() for name in ("a", "b", "plain")]
    assert files[0] == files[1] != files[2]


def test_from_scratch_every_seed_draws_its_own_weights(home: Path, tmp_path: Path) -> None:
    recipe = replace(QUICK, epochs=1, from_scratch=True)
    options = {"unfreeze": "0,all", "n_seeds": 2, "config": recipe}
    for name in ("a", "b"):
        tune(home, home / "tower", tmp_path / name, **options)
    files = [(tmp_path / name / "predictions.parquet").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    before = state_of(home / "tower")
    drawn = [state_of(tmp_path / "a" / "encoders" / f"unfreeze-3-s{seed}") for seed in (0, 1)]
    name = "embeddings.patch_embedding.weight"
    apart = [(a[name] - b[name]).abs().mean() for a, b in ((before, drawn[0]), tuple(drawn))]
    assert min(apart) > 0.02  # more than an epoch moves


def test_a_depth_that_breaks_does_not_stop_the_others(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Trainer._losses

    def broken(trainer: Trainer, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found = losses(trainer, logits, y)
        return found * float("nan") if trainer._name == "unfreeze-1" else found

    monkeypatch.setattr(Trainer, "_losses", broken)
    result = tune(home, home / "tower", tmp_path / "run", unfreeze="0,1,2")
    board = {entry["head"]: entry for entry in result["leaderboard"]}
    assert result["leaderboard"][-1]["head"] == "unfreeze-1"
    assert board["unfreeze-1"]["status"] == "error"
    said = "the loss of unfreeze-1 is not a finite number at epoch 1, step 1. Lower --lr"
    assert said in board["unfreeze-1"]["error"]
    assert board["unfreeze-2"]["cv"] is not None
    assert set(open_run(tmp_path / "run").predictions()["head"]) == {
        *("unfreeze-0", "unfreeze-2", "class-prior", "region-prior")
    }


def test_a_gradient_that_is_not_finite_is_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inf = torch.tensor(float("inf"))
    monkeypatch.setattr(training.torch.nn.utils, "clip_grad_norm_", lambda *_: inf)
    with pytest.raises(RunError, match=r"every depth failed .* the gradient of unfreeze-0 is not"):
        tune(home, home / "tower", tmp_path / "run", unfreeze="0")


def test_a_test_image_without_a_finite_score_is_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = Trainer.logits

    def broken(trainer: Trainer, rows: Any) -> Any:
        found = logits(trainer, rows)
        found[np.isin(rows, trainer.rows.tested[:1])] = np.nan
        return found

    monkeypatch.setattr(Trainer, "logits", broken)
    with pytest.raises(
        RunError, match=r"predictions of unfreeze-0 for some images are not finite numbers"
    ):
        tune(home, home / "tower", tmp_path / "run", unfreeze="0")


def test_training_stops_after_epochs_without_a_better_one(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, seen = iter([0.6, 0.9, 0.8, 0.7, 0.99]), []
    judge = Trainer._judge

    def watched(trainer: Trainer, loss: float) -> None:
        judge(trainer, loss)
        seen.append(trainer.logits(trainer.rows.held))

    monkeypatch.setattr(Trainer, "_judge", watched)
    study_auroc = "medembed.finetuning.data_split.TrainRows.study_auroc"
    monkeypatch.setattr(study_auroc, lambda *_: next(scores))
    recipe = replace(QUICK, epochs=5, patience=2)
    tune(home, home / "tower", tmp_path / "run", unfreeze="0", config=recipe)
    record = open_run(tmp_path / "run").trial_records()[0]
    # the last score is that of the held-out patients, at the end
    assert (record.best_epoch, len(record.history), record.score) == (2, 4, 0.99)
    held = predictions(tmp_path / "run", "unfreeze-0").query("split == 'train'")
    assert np.abs(logit(held["probability"]) - seen[1]).max() < 1e-5
    assert np.abs(logit(held["probability"]) - seen[3]).max() > 1e-3


def test_rates_rise_and_fall() -> None:
    rates = [rate_at(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 1e-3


# What is left out, and what is refused


def test_images_that_cannot_be_decoded_are_left_out_and_counted(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "images", tmp_path / "images")
    table = read_manifest(home / "manifest.csv").rows.copy()
    image = table.loc[table["split"] == "test", "image"].iloc[0]
    broken = (tmp_path / "images" / image).read_bytes()[:90]
    (tmp_path / "images" / image).write_bytes(broken)
    table.loc[table["image"] == image, "sha256"] = hashlib.sha256(broken).hexdigest()
    table["label"] = table["label"].astype(str)
    write_manifest(make_manifest(table, "study"), tmp_path / "manifest.csv")
    tune(tmp_path, home / "tower", tmp_path / "run", unfreeze="0")
    info = open_run(tmp_path / "run").info
    assert (info.data.left_out, info.data.left_out_test) == (1, 1)
    assert info.left_out[0].stage == "decode"
    predicted = set(predictions(tmp_path / "run", "unfreeze-0")["sha256"])
    assert info.left_out[0].sha256 not in predicted


def test_other_bytes_than_the_manifests_are_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "images", tmp_path / "images")
    shutil.copy(home / "manifest.csv", tmp_path)
    image = read_manifest(home / "manifest.csv").rows["image"].iloc[3]
    other = home / "images" / read_manifest(home / "manifest.csv").rows["image"].iloc[4]
    shutil.copy(other, tmp_path / "images" / image)
    with pytest.raises(ManifestError, match=f"1 image.* hold other bytes(.|\n)*{image}: sha256"):
        tune(tmp_path, home / "tower", tmp_path / "run", unfreeze="0")


def change(home: Path, target: Path, edit: Any) -> Path:
    table = read_manifest(home / "manifest.csv").rows.copy()
    table["label"] = table["label"].astype("string").fillna("")
    write_manifest(make_manifest(edit(table).astype(str), "study"), target / "manifest.csv")
    (target / "images").symlink_to(home / "images")
    return target


def abnormal(table: pd.DataFrame) -> str:
    """Name a patient that could be trained on."""
    return str(table.loc[(table["split"] == "train") & (table["label"] == "1"), "patient"].iloc[0])


def set_labels(table: pd.DataFrame, split: str, label: str) -> pd.DataFrame:
    return table.assign(label=table["label"].where(table["split"] != split, label))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t[t["split"] == "test"], "the manifest has no train rows"),
        (lambda t: set_labels(t, "train", ""), r"none of the \d+ train rows has a label"),
        (lambda t: set_labels(t, "train", "1"), r"only abnormal \(label 1\) rows"),
        (lambda t: set_labels(t, "test", ""), "no labelled test rows"),
        (lambda t: t[(t["split"] == "test") | (t["label"] == "0") | (t["patient"] == abnormal(t))],
         "abnormal studies come from 1 patients, too few for 5 folds"),
    ],
)  # fmt: skip
def test_labels_that_allow_no_training_are_refused_before_any(
    home: Path, tmp_path: Path, edit: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medembed.finetuning.job.resolve_config", None)  # before the encoder loads
    with pytest.raises(TrainingDataError, match=said):
        tune(change(home, tmp_path, edit), home / "tower", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"unfreeze": "0,7"}, TrainingDataError, "deeper than tower, which has 3 blocks"),
        ({"unfreeze": "some"}, TrainingDataError, "is not a depth"),
        ({"trunk_cache": "t", "unfreeze": "all"}, TrainingDataError, "asks for all 3"),
        ({"trunk_cache": "t", "unfreeze": "0"}, TrainingDataError, "serves depths of 1 and more"),
        ({"trunk_cache": "t", "config": Hyperparameters()}, TrainingDataError, "Add --no-augment"),
        ({"pool": "grid4"}, TrainingDataError, "--pool grid4 cannot be trained"),
        ({"pool": "mean,mean"}, TrainingDataError, "names a pooling twice"),
        ({"pool": "cls"}, EncoderError, "pooling cls is not offered by tower"),
        ({"config": replace(QUICK, lr=0.0)}, TrainingDataError, "lr must be above 0, not 0.0"),
        (
            {"config": replace(QUICK, lr=float("inf"))},
            TrainingDataError,
            "lr must be a finite number, not inf",
        ),
        ({"config": replace(QUICK, accumulate=17)}, TrainingDataError, "--accumulate is 17"),
        ({"n_seeds": 0}, TrainingDataError, "--seeds must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_training(
    home: Path, tmp_path: Path, options: dict[str, Any], kind: Any, said: str
) -> None:
    with pytest.raises(kind, match=said):
        tune(home, home / "tower", tmp_path / "run", **{"unfreeze": "1", **options})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["images/absent", "tower"])
def test_an_image_root_that_holds_none_is_refused(home: Path, tmp_path: Path, place: str) -> None:
    with pytest.raises(PathNotFoundError, match="--image-root"):
        finetune(home / "manifest.csv", home / place, home / "tower", tmp_path / "run")


def test_a_run_that_answers_another_question_is_refused(home: Path) -> None:
    with pytest.raises(RunError, match=r"answers another question: depths was \[0, 1, 2\]"):
        tune(home, home / "tower", home / "run", unfreeze="0,1")
    with pytest.raises(RunError, match="answers another question: depths was null"):
        tune(home, home / "tower", home / "sweep", unfreeze="0")
    own = replace(QUICK, lr=0.004)
    with pytest.raises(RunError, match=r"recipe\.lr was 0\.003 there and is 0\.004 here"):
        tune(home, home / "tower", home / "run", unfreeze="0,1,2", config=own)


def test_a_held_out_fold_of_one_class_is_refused(home: Path, tmp_path: Path) -> None:
    """All its abnormal images are broken."""
    shutil.copytree(home / "images", tmp_path / "images")
    table = read_manifest(home / "manifest.csv").rows.copy()
    folds = fold_train_rows(table, n_folds=5, seed=0)
    for place in table.index[table["image"].isin(folds[folds == 0].index) & (table["label"] == 1)]:
        path = tmp_path / "images" / table.loc[place, "image"]
        path.write_bytes(f"no image {place}".encode())
        table.loc[place, "sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    table["label"] = table["label"].astype(str)
    write_manifest(make_manifest(table, "study"), tmp_path / "manifest.csv")
    with pytest.raises(TrainingDataError, match=r"the held-out fold .* only normal \(label 0\)"):
        tune(tmp_path, home / "tower", tmp_path / "run", unfreeze="0")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda run, card: card.update(spec={**card["spec"], "encoder": "0" * 64}),
         "another encoder than this"),
        (lambda run, card: card.update(manifest="0" * 64), "on another manifest"),
    ],
)  # fmt: skip
def test_a_sweep_that_does_not_fit_is_refused(
    home: Path, tmp_path: Path, edit: Any, said: str
) -> None:
    shutil.copytree(home / "sweep", tmp_path / "sweep")
    best = open_run(tmp_path / "sweep").as_dict()["leaderboard"][0]["head"]
    path = tmp_path / "sweep" / "models" / best / "model.json"
    document = json.loads(path.read_text())
    edit(tmp_path / "sweep", document["card"])
    path.write_text(json.dumps(document))
    with pytest.raises(RunError, match=said):
        tune(home, home / "tower", tmp_path / "run", unfreeze="0", from_run=tmp_path / "sweep")


def test_a_head_on_components_is_refused(home: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.toml"
    space.write_text("[logistic]\nconfigs = 1\npca = 4\n")
    sweep(home / "cache", home / "manifest.csv", tmp_path / "sweep", heads=("logistic",),
          space=space, jobs=1)  # fmt: skip
    with pytest.raises(RunError, match=r"head logistic .* reads 4 principal components"):
        tune(home, home / "tower", tmp_path / "run", unfreeze="0", from_run=tmp_path / "sweep")


def test_the_command_prints_one_document(home: Path, tmp_path: Path) -> None:
    arguments = ["finetune", home / "manifest.csv", "--image-root", home / "images", "--encoder"]
    arguments += [home / "tower", "--unfreeze", "0", "--epochs", "1", "--no-augment", "--json"]
    arguments += ["--device", "cpu", "--out", tmp_path / "run"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [entry["depth"] for entry in document["leaderboard"]] == [0]
    command = open_run(tmp_path / "run").info.command.split()
    again = CliRunner().invoke(main, [*command[1:3], *command[3:], "--help"])
    assert again.exit_code == 0, again.output
