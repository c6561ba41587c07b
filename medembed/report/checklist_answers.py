"""Answers to reporting guidelines from runs, manifests, builds, cards and comparisons."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medembed.core.errors import MedembedError, RunError
from medembed.core.text import counted
from medembed.dataset.targets import ClassNames, name_classes
from medembed.heads.packaging import read_document
from medembed.report.headline import write_headline
from medembed.report.tables import format_count, format_interval
from medembed.results.comparison_schema import ComparisonResult
from medembed.results.methods import describe_methods, name_compared_classes
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import Run

__all__ = [
    "METHODS",
    "RESULTS",
    "Fact",
    "FindFact",
    "Study",
]


@dataclass(frozen=True)
class Fact:
    """A known fact, its source, and whether it is complete."""

    text: str
    source: str
    is_whole: bool = True


@dataclass(frozen=True, eq=False)
class Study:
    """The contents of a page.

    Attributes
    ----------
    runs : dict of str to Run
        The runs, by their names in the comparison.
    result : mapping
        The comparison.
    elsewhere : mapping
        The `scores.json` of runs that evaluate a model elsewhere, by name.
    """

    runs: Mapping[str, Run]
    result: ComparisonResult
    elsewhere: Mapping[str, Mapping[str, Any]]

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The row of the best trained head."""
        return next((row for row in self.result["rows"] if not row["baseline"]), None)

    @property
    def classes(self) -> ClassNames:
        """What the classes of the comparison are called."""
        return name_compared_classes(self.result)

    @property
    def trained(self) -> dict[str, Run]:
        """Runs that trained a model."""
        return {name: run for name, run in self.runs.items() if name not in self.elsewhere}


FindFact = Callable[[Study], Fact | None]
"""Returns a study's fact, or None if it was not recorded."""


def _describe_each(
    runs: Mapping[str, Run], describe: Callable[[Run], str | None], source: str
) -> Fact | None:
    """Return the runs' answers, merged if all agree; complete if every run has an answer."""
    answers = {name: describe(run) for name, run in runs.items()}
    known = {name: text for name, text in answers.items() if text}
    if not known:
        return None
    texts = dict.fromkeys(known.values())
    if len(texts) == 1 and len(known) == len(answers):
        return Fact(next(iter(texts)), source)
    lines = [f"{name}: {text}" for name, text in known.items()]
    lines += [f"{name}: not recorded" for name, text in answers.items() if not text]
    return Fact("; ".join(lines), source, len(known) == len(answers))


def _join_runs(found: Sequence[tuple[str, str]]) -> str:
    """Return the runs' answers as text, merged if all agree."""
    texts = {text for _, text in found}
    if len(texts) == 1:
        return found[0][1]
    return "; ".join(f"{name}: {text}" for name, text in found)


def _use(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        use = _card(run).get("use")
        return str(use["intended"]) if isinstance(use, dict) and use.get("intended") else None

    return _describe_each(study.trained, describe, "card: use") if study.trained else None


def _design(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        if run.info.kind == "evaluation":
            return "evaluation of an existing model on other images"
        return "development, with a test that neither training nor any choice has seen"

    return _describe_each(study.runs, describe, "run.json: kind")


def _data(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        build, digest = run.info.data.build, run.info.asked.manifest
        parts = [f"recipe {build.recipe.name}"] if build and build.recipe.name else []
        parts += [f"manifest {digest[:16]}"] if digest is not None else []
        parts += ["synthetic images"] if run.info.data.synthetic else []
        return ", ".join(parts)

    return _describe_each(study.runs, describe, "run.json: asked.manifest; build file: recipe")


def _licence(study: Study) -> Fact | None:
    return _describe_each(study.runs, lambda run: run.info.data.licence, "manifest: column licence")


def _preprocessing(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        known = run.info.encoder.preprocessing
        size = " × ".join(map(str, known.size or []))
        parts = [f"resized to {size}"] if size else []
        parts += [f"fit {known.fit}"] if known.fit else []
        parts += [f"resample {known.resample}"] if known.resample else []
        return ", ".join(parts)

    return _describe_each(study.runs, describe, "run.json: encoder.preprocessing")


def _label(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        level = run.info.data.label_level
        negative, positive = name_classes(run.info.asked.target)
        return f"two classes, {negative} and {positive}, labelled per {level}" if level else None

    return _describe_each(study.runs, describe, "manifest: column label_level")


def _predictors(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        named = (entry.pooling for entry in run.info.leaderboard)
        poolings = dict.fromkeys(pooling for pooling in named if pooling)
        parts = [f"embeddings of the image ({', '.join(poolings)})"] if poolings else []
        columns = run.info.asked.covariates
        parts += [f"columns of the manifest: {', '.join(columns)}"] if columns else []
        return " and ".join(parts)

    return _describe_each(study.runs, describe, "run.json: leaderboard, asked.covariates")


def _encoder(run: Run) -> str | None:
    encoder, digest = run.info.encoder, run.info.encoder.fingerprint
    if not encoder.source:
        return None
    revision = f"@{encoder.revision}" if encoder.revision else ""
    return f"encoder {encoder.source}{revision}" + (f", weights {digest[:16]}" if digest else "")


def _input(study: Study) -> Fact | None:
    return _describe_each(study.runs, _encoder, "run.json: encoder")


def _start(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        encoder, seed = _encoder(run), run.info.seed
        if encoder is None or seed is None:
            return encoder
        return f"{encoder}; all that is drawn is drawn from seed {seed}"

    return (
        _describe_each(study.trained, describe, "run.json: encoder, seed")
        if study.trained
        else None
    )


def _subsets(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        asked, known = run.info.asked, run.info.asked.model_fields_set
        if run.info.kind == "evaluation":
            if "split" not in known:
                return None
            return f"only rows of {asked.split}" if asked.split else "all rows"
        if "train_fraction" not in known:
            return None
        whole = asked.share == 1
        return "all training patients" if whole else f"{asked.share:.3g} of the training patients"

    return _describe_each(study.runs, describe, "run.json: asked")


def _partition(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        n, counts = run.info.asked.n_folds, run.info.data.splits
        images = {name: own.images for name, own in counts.items()}
        parts = [f"{name} {own:,} images" for name, own in images.items() if own is not None]
        parts += [f"{n} folds of train" if n is not None else ""]
        return ", ".join(filter(None, parts))

    return _describe_each(study.runs, describe, "manifest: column split; run.json: asked.n_folds")


def _disjoint(study: Study) -> Fact | None:
    text = "patients: a manifest with one patient in two splits is refused, and folds share none"
    return Fact(text, "manifest: columns patient, split")


def _models(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        kept = [path.name for path in _models_of(run)]
        return f"packaged with all parameters: {', '.join(kept)}" if kept else None

    return _describe_each(study.trained, describe, "models/*/model.json") if study.trained else None


def _training(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        heads = ", ".join(entry.head for entry in run.info.leaderboard)
        encoder = _encoder(run)
        kind = "fine-tuned with its" if run.info.kind == "finetune" else "frozen"
        where = f" on embeddings of {encoder}" if encoder else ""
        return f"{kind} encoder, classifiers {heads}{where}" if heads else None

    return (
        _describe_each(study.trained, describe, "run.json: leaderboard, encoder")
        if study.trained
        else None
    )


def _selection(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        metric, entries = run.info.asked.metric, run.info.leaderboard
        tried = [entry.n_tried for entry in entries if entry.n_tried]
        if not metric or run.info.cv_method != CV_METHOD:
            return None
        most = f" of up to {max(tried):,} configurations a head" if tried else ""
        return f"the best{most} by {metric}, on patients within the training folds"

    source = "run.json: asked.metric, cv_method, leaderboard"
    return _describe_each(study.trained, describe, source) if study.trained else None


def _software(study: Study) -> Fact | None:
    def describe(run: Run) -> str | None:
        return ", ".join(f"{name} {n}" for name, n in run.info.versions.items())

    return _describe_each(study.runs, describe, "run.json: versions")


def _command(study: Study) -> Fact | None:
    return _describe_each(study.runs, lambda run: run.info.command, "run.json: command")


def _card(run: Run) -> dict[str, Any]:
    """Return the card of the first model that has one; old runs may have none."""
    for path in _models_of(run):
        try:
            return read_document(path).card
        except (MedembedError, OSError):
            continue
    return {}


def _models_of(run: Run) -> list[Path]:
    """Return the directories of the run's packaged models, in the leaderboard's order."""
    found = []
    for entry in run.info.leaderboard:
        try:
            path = run.model_path(entry.head)
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


_MEASURES = (
    "AUROC, average precision, accuracy, macro-F1, Cohen's kappa, sensitivity, specificity, "
)
_MEASURES += "Brier score, calibration slope and intercept, calibration error (an upper bound)"
_TESTS = "Pairs: DeLong's test over patients by Student's t, with Holm's correction."


def _exclusions(study: Study) -> Fact | None:
    found = []
    for own in study.result["flow"]:
        if own["excluded"] is None:
            continue
        reasons = [f"{entry['images']:,} ({entry['reason']})" for entry in own["excluded"]]
        reasons += [f"{own['not_listed']:,} (not listed)"] if own["not_listed"] else []
        found.append((own["run"], f"images excluded: {', '.join(reasons) if reasons else 'none'}"))
    if not found:
        return None
    is_whole = len(found) == len(study.result["flow"])
    return Fact(_join_runs(found), "build file: counts.excluded", is_whole)


def _missing(study: Study) -> Fact | None:
    found = [
        (
            own["run"],
            f"{counted(own['failed'], 'image')} could not be embedded and {own['unlabelled']:,} "
            "had no label; they were neither trained on nor scored",
        )
        for own in study.result["flow"]
        if own["failed"] is not None and own["unlabelled"] is not None
    ]
    if not found:
        return None
    return Fact(_join_runs(found), "run.json: data", len(found) == len(study.result["flow"]))


def _metrics(study: Study) -> Fact | None:
    return Fact(_MEASURES, "scores.json")


def _statistics(study: Study) -> Fact | None:
    rows = study.result["rows"]
    text = describe_methods(rows)
    return Fact(f"{text} {_TESTS}" if study.result["paired"] else text, "scores.json: method")


def _groups(study: Study) -> Fact | None:
    best = study.best
    if best is None or len(best["regions"]) < 2:
        return None
    parts = [f"{name} {format_interval(own['auroc'])}" for name, own in best["regions"].items()]
    return Fact(f"AUROC of {_name(study)} by region: {', '.join(parts)}", "scores.json: regions")


def _updating(study: Study) -> Fact | None:
    found = []
    for name, scores in study.elsewhere.items():
        own = scores.get("recalibrated")
        if own:
            found.append((name, f"calibrated anew on {counted(own['n_patients'], 'patient')}"))
    return Fact(_join_runs(found), "scores.json: recalibrated") if found else None


def _evaluated(study: Study) -> Fact | None:
    evaluated = {name: study.runs[name] for name in study.elsewhere}
    return _describe_each(evaluated, lambda run: run.info.command, "run.json: command")


def _shift(study: Study) -> Fact | None:
    drifts = {
        name: (own.get("drift") or {}).get("sentence") for name, own in study.elsewhere.items()
    }
    found = [(name, sentence) for name, sentence in drifts.items() if sentence]
    return Fact(_join_runs(found), "scores.json: drift") if found else None


def _output(study: Study) -> Fact | None:
    best = study.best
    if best is None:
        return None
    positive = study.classes.positive
    text = (
        f"a calibrated probability of {positive} (Platt); {positive} from Youden's threshold on, "
        f"{best['threshold']:.3f} for {_name(study)}, both from out-of-fold predictions of train"
    )
    return Fact(text, "scores.json: threshold, calibration")


def _flow(study: Study) -> Fact | None:
    known = [own for own in study.result["flow"] if own["manifest"]["images"] is not None]
    found = []
    for own in known:
        used = own["used"]
        start = "found: not recorded" if own["found"] is None else f"{own['found']:,} images found"
        found.append(
            (
                own["run"],
                f"{start}, {own['manifest']['images']:,} in the manifest, {used['images']:,} used "
                f"({counted(used['studies'], 'study')}, {counted(used['patients'], 'patient')})",
            )
        )
    if not found:
        return None
    is_whole = all(own["found"] is not None for own in study.result["flow"])
    return Fact(_join_runs(found), "build file; run.json: data; predictions.parquet", is_whole)


def _characteristics(study: Study) -> Fact | None:
    return _sizes(study)


def _sizes(study: Study) -> Fact | None:
    found = []
    for own in study.result["flow"]:
        parts = [
            f"{part['split']}: {counted(part['used']['patients'], 'patient')}, "
            f"{counted(part['used']['studies'], 'study')}, "
            f"{part['classes']['abnormal']['studies']:,} {study.classes.positive}"
            for part in own["splits"]
        ]
        found += [(own["run"], "; ".join(parts))] if parts else []
    return Fact(_join_runs(found), "predictions.parquet") if found else None


def _internal(study: Study) -> Fact | None:
    if not study.trained:
        return None
    test = study.result["test"]
    text = (
        f"{counted(test['n'], study.result['level'])} of test "
        f"({test['n_abnormal']:,} {study.classes.positive}) of "
        f"{counted(test['n_patients'], 'patient')}"
    )
    return Fact(text, "scores.json: test")


def _external(study: Study) -> Fact | None:
    if not study.elsewhere:
        return None
    # a note marks a missing comparison, such as for images of the model's own test
    is_whole = not any((own.get("drop") or {}).get("note") for own in study.elsewhere.values())
    text = write_headline(study.result, study.elsewhere).text
    return Fact(text, "scores.json: drop", is_whole)


def _performance(study: Study) -> Fact | None:
    return _scores(study, {"auroc": "AUROC", "average_precision": "average precision",
                           "macro_f1": "macro-F1", "brier": "Brier score"})  # fmt: skip


def _accuracy(study: Study) -> Fact | None:
    return _scores(study, {name: name for name in ("sensitivity", "specificity", "accuracy")})


def _scores(study: Study, titles: Mapping[str, str]) -> Fact | None:
    best = study.best
    if best is None:
        return None
    scores = {title: best["scores"][name] for name, title in titles.items()}
    parts = [f"{title} {format_count(own)}" for title, own in scores.items()]
    is_whole = all(own["low"] is not None for own in scores.values())
    return Fact(f"{_name(study)}: {', '.join(parts)}", "scores.json", is_whole)


def _mistakes(study: Study) -> Fact | None:
    best = study.best
    if best is None:
        return None
    own = best["confusion"]
    negative, positive = study.classes
    text = (
        f"{_name(study)}: {own['fp']:,} {negative} called {positive}, {own['fn']:,} {positive} "
        f"called {negative}; the page shows the most confident"
    )
    return Fact(text, "scores.json: confusion")


def _name(study: Study) -> str:
    best = study.best or {}
    return f"{best.get('run')}/{best.get('head')}" if len(study.runs) > 1 else str(best.get("head"))


RESULTS: dict[str, FindFact] = {
    "accuracy": _accuracy,
    "characteristics": _characteristics,
    "evaluated": _evaluated,
    "exclusions": _exclusions,
    "external": _external,
    "flow": _flow,
    "groups": _groups,
    "internal": _internal,
    "metrics": _metrics,
    "missing": _missing,
    "mistakes": _mistakes,
    "output": _output,
    "performance": _performance,
    "shift": _shift,
    "sizes": _sizes,
    "statistics": _statistics,
    "updating": _updating,
}
