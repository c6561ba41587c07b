"""What runs, manifests, builds and cards tell of the methods that a guideline asks for."""

from pathlib import Path
from typing import Any

from medembed.core.errors import MedembedError, RunError
from medembed.heads.packaging import read_document
from medembed.report.checklist_study import Fact, FindFact, Study, entry_of, tell_each
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import Run

__all__ = ["METHODS"]


def _use(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        use = _card(run).get("use")
        return str(use["intended"]) if isinstance(use, dict) and use.get("intended") else None

    return tell_each(study.trained, tell, "card: use") if study.trained else None


def _design(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        if run.info["kind"] == "evaluation":
            return "evaluation of an existing model on other images"
        return "development, with a test that neither training nor any choice has seen"

    return tell_each(study.runs, tell, "run.json: kind")


def _data(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        data, digest = entry_of(run, "data"), entry_of(run, "asked").get("manifest")
        recipe = (data.get("build") or {}).get("recipe") or {}
        parts = [f"recipe {recipe['name']}"] if recipe.get("name") else []
        parts += [f"manifest {digest[:16]}"] if isinstance(digest, str) else []
        parts += ["synthetic images"] if data.get("synthetic") else []
        return ", ".join(parts)

    return tell_each(study.runs, tell, "run.json: asked.manifest; build file: recipe")


def _licence(study: Study) -> Fact | None:
    return tell_each(
        study.runs, lambda run: entry_of(run, "data").get("licence"), "manifest: column licence"
    )


def _preprocessing(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        known = entry_of(run, "encoder").get("preprocessing") or {}
        size = " × ".join(map(str, known.get("size", [])))
        parts = [f"resized to {size}"] if size else []
        parts += [f"{name} {known[name]}" for name in ("fit", "resample") if known.get(name)]
        return ", ".join(parts)

    return tell_each(study.runs, tell, "run.json: encoder.preprocessing")


def _label(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        level = entry_of(run, "data").get("label_level")
        return f"two classes, normal and abnormal, labelled per {level}" if level else None

    return tell_each(study.runs, tell, "manifest: column label_level")


def _predictors(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        asked = entry_of(run, "asked")
        poolings = dict.fromkeys(
            entry["pooling"] for entry in run.info.get("leaderboard", []) if entry.get("pooling")
        )
        parts = [f"embeddings of the image ({', '.join(poolings)})"] if poolings else []
        columns = asked.get("covariates")
        parts += [f"columns of the manifest: {', '.join(columns)}"] if columns else []
        return " and ".join(parts)

    return tell_each(study.runs, tell, "run.json: leaderboard, asked.covariates")


def _encoder(run: Run) -> str | None:
    encoder = entry_of(run, "encoder")
    if not encoder.get("source"):
        return None
    revision = f"@{encoder['revision']}" if encoder.get("revision") else ""
    digest = encoder.get("fingerprint")
    return f"encoder {encoder['source']}{revision}" + (f", weights {digest[:16]}" if digest else "")


def _input(study: Study) -> Fact | None:
    return tell_each(study.runs, _encoder, "run.json: encoder")


def _start(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        encoder, seed = _encoder(run), run.info.get("seed")
        if encoder is None or seed is None:
            return encoder
        return f"{encoder}; all that is drawn is drawn from seed {seed}"

    return tell_each(study.trained, tell, "run.json: encoder, seed") if study.trained else None


def _subsets(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        asked = entry_of(run, "asked")
        if run.info["kind"] == "evaluation":
            if "split" not in asked:
                return None
            return f"only rows of {asked['split']}" if asked["split"] else "all rows"
        if "train_fraction" not in asked:
            return None
        share = asked["train_fraction"]
        return "all training patients" if share == 1 else f"{share:.3g} of the training patients"

    return tell_each(study.runs, tell, "run.json: asked")


def _partition(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        n, splits = entry_of(run, "asked").get("n_folds"), entry_of(run, "data").get("splits", {})
        parts = [
            f"{name} {own['images']:,} images" for name, own in splits.items() if "images" in own
        ]
        parts += [f"{n} folds of train" if isinstance(n, int) else ""]
        return ", ".join(filter(None, parts))

    return tell_each(study.runs, tell, "manifest: column split; run.json: asked.n_folds")


def _disjoint(study: Study) -> Fact | None:
    text = "patients: a manifest with one patient in two splits is refused, and folds share none"
    return Fact(text, "manifest: columns patient, split")


def _models(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        kept = [path.name for path in _models_of(run)]
        return f"packaged with all parameters: {', '.join(kept)}" if kept else None

    return tell_each(study.trained, tell, "models/*/model.json") if study.trained else None


def _training(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        entries = run.info.get("leaderboard", [])
        heads = ", ".join(str(entry["head"]) for entry in entries)
        encoder = _encoder(run)
        kind = "fine-tuned with its" if run.info["kind"] == "finetune" else "frozen"
        where = f" on embeddings of {encoder}" if encoder else ""
        return f"{kind} encoder, classifiers {heads}{where}" if heads else None

    return (
        tell_each(study.trained, tell, "run.json: leaderboard, encoder") if study.trained else None
    )


def _selection(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        metric, entries = entry_of(run, "asked").get("metric"), run.info.get("leaderboard", [])
        tried = [entry["n_tried"] for entry in entries if entry.get("n_tried")]
        if not metric or run.info.get("cv_method") != CV_METHOD:
            return None
        most = f" of up to {max(tried):,} configurations a head" if tried else ""
        return f"the best{most} by {metric}, on patients within the training folds"

    source = "run.json: asked.metric, cv_method, leaderboard"
    return tell_each(study.trained, tell, source) if study.trained else None


def _software(study: Study) -> Fact | None:
    def tell(run: Run) -> str | None:
        return ", ".join(f"{name} {n}" for name, n in entry_of(run, "versions").items())

    return tell_each(study.runs, tell, "run.json: versions")


def _command(study: Study) -> Fact | None:
    return tell_each(study.runs, lambda run: run.info.get("command"), "run.json: command")


def _card(run: Run) -> dict[str, Any]:
    """Return the card of the first model that has one; old runs may have none."""
    for path in _models_of(run):
        try:
            card = read_document(path).get("card")
        except (MedembedError, OSError):
            continue
        if isinstance(card, dict):
            return card
    return {}


def _models_of(run: Run) -> list[Path]:
    """Return the directories of the run's packaged models, in the leaderboard's order."""
    found = []
    for entry in run.info.get("leaderboard", []):
        try:
            path = run.model_path(str(entry["head"]))
        except RunError:  # a name that no run writes
            continue
        if (path / "model.json").is_file():
            found.append(path)
    return found


METHODS: dict[str, FindFact] = {
    "command": _command,
    "data": _data,
    "design": _design,
    "disjoint": _disjoint,
    "input": _input,
    "label": _label,
    "licence": _licence,
    "models": _models,
    "partition": _partition,
    "predictors": _predictors,
    "preprocessing": _preprocessing,
    "selection": _selection,
    "software": _software,
    "start": _start,
    "subsets": _subsets,
    "training": _training,
    "use": _use,
}
