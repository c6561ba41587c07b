"""The model card for people: what the model is, how well it performs, what it is not for."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NotRequired, TypedDict, cast, final

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from medembed.core.schema import AnyTable
from medembed.core.text import one_line, to_markdown
from medembed.dataset.manifest import count_rows
from medembed.evaluation.scores import SCORES
from medembed.heads.model_files import README_FILE
from medembed.heads.packaging import read_document, update_card
from medembed.results.comparison_schema import ComparisonResult
from medembed.results.model_card import DecisionEntries
from medembed.results.runs import Run

__all__ = [
    "CardData",
    "CardEncoder",
    "CardUse",
    "NewCard",
    "complete_cards",
    "count_trained",
    "describe_encoder",
    "describe_use",
    "write_readme",
]

HEALTH_AI = "https://developers.google.com/health-ai-developer-foundations/terms"
_GATED = re.compile(r"google/(medgemma|medsiglip)", re.IGNORECASE)
_INTENDED = (
    "Research on telling normal from abnormal studies, in images of the kind that it was trained "
    "on, embedded by the encoder named here."
)
_NOT_INTENDED = (
    "Diagnosis, triage or any other clinical decision: this is research software, not a medical "
    "device.",
    "Other regions, devices or institutions than those of its training data, before "
    "`medembed evaluate` has shown on labelled studies how it does there.",
    "Saying what is abnormal: it knows normal and abnormal only.",
)
_SYNTHETIC = "Anything about medicine: it was trained and tested on synthetic images."
_HOLDS_VECTORS = (
    "This model holds a vector of every training image. No vector names a patient, but vectors may "
    "reveal what an image looks like, and that a certain image was among them: before you pass the "
    "model on, make sure that you may pass on the embeddings themselves."
)
_TITLES = {
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "kappa": "Cohen's kappa",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "brier": "Brier score",
    "ece": "Calibration error",
}
_BY_REGION = ("auroc", "macro_f1", "sensitivity", "specificity")
_OF_POINT = {"sensitivity": "Sensitivity", "specificity": "Specificity", "ppv": "PPV", "npv": "NPV"}
_WORTH_AT = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Thresholds whose net benefit is listed."""


class CardUse(TypedDict):
    """A card's entry about use, in sentences."""

    intended: str
    not_intended: list[str]
    handling: NotRequired[str]
    """Only of a model that holds the vectors of its training images."""


class CardEncoder(TypedDict):
    """A card's entry about the encoder."""

    source: str | None
    revision: str | None
    path: str | None
    terms: str
    """A sentence: whose licence applies."""


class CardData(TypedDict):
    """A card's entry about the data: the rows of training, and the manifest as a run counts it."""

    trained: dict[str, object]
    manifest: AnyTable


@final
class NewCard(DecisionEntries):
    """The card of a model that is about to be saved, which `model_card.CardDocument` reads."""

    name: str
    spec: Mapping[str, object]
    """Empty for an ensemble."""
    pooling: str
    label_level: str
    views: Literal["mean", "attention"]
    metric: str
    cv: float | None
    cv_method: str
    n_tried: NotRequired[int | None]
    trial: int | None
    seed: int | None
    depth: NotRequired[int]
    encoder: CardEncoder
    sources: NotRequired[list[dict[str, Any]]]
    """The encoders of an ensemble."""
    members: NotRequired[list[dict[str, object]]]
    covariates: NotRequired[Mapping[str, object] | None]
    data: CardData
    use: CardUse
    manifest: str | None
    """Its digest."""
    synthetic: bool
    training_images: list[str]
    target: NotRequired[str]


def count_trained(rows: pd.DataFrame) -> dict[str, object]:
    """Return counts of the manifest rows that a model was trained on, overall and by region."""
    regions = {
        str(name): count_rows(own) for name, own in rows.groupby("region", sort=True, observed=True)
    }
    return {**count_rows(rows), "regions": regions}


def describe_encoder(
    source: str | None, revision: str | None, path: str | None = None
) -> CardEncoder:
    """Return a card's entry about the encoder.

    Parameters
    ----------
    source, revision : str, optional
        Of the encoder or its base, from `run.json`.
    path : str, optional
        Path from the model to an encoder that was adapted in the same run.
    """
    terms = _terms(source)
    if path is not None:
        terms = f"Its last blocks were changed by fine-tuning; it derives from {source}. {terms}"
    return {"source": source, "revision": revision, "path": path, "terms": terms}


def describe_use(*, synthetic: bool, keeps_rows: bool = False) -> CardUse:
    """Return a card's entry about use; `keeps_rows` is a model's that holds training vectors."""
    more = [_SYNTHETIC] if synthetic else []
    use = CardUse(intended=_INTENDED, not_intended=[*_NOT_INTENDED, *more])
    return {**use, "handling": _HOLDS_VECTORS} if keeps_rows else use


def write_readme(card: NewCard) -> dict[str, str]:
    """Return the content of README.md for a card, by file name, for `save_model`."""
    scores = card["scores"]
    text = _template().render(
        card=card,
        encoder=card["encoder"],
        trained=card["data"]["trained"],
        manifest=card["data"]["manifest"],
        test=scores.get("test"),
        out_of_fold=scores["out_of_fold"],
        titles={name: _TITLES[name] for name in SCORES},
        by_region=_BY_REGION,
        points=_list_points(card, scores.get("test")),
        of_point=_OF_POINT,
        worth=_list_worth((scores.get("test") or {}).get("net_benefit")),
    )
    return {README_FILE: text}


def complete_cards(run: Run, scores: ComparisonResult) -> None:
    """Write the scores of test, with intervals, to the cards and READMEs of a run's models.

    Parameters
    ----------
    run : Run
        A run whose models are saved.
    scores : ComparisonResult
        What `comparison.score_run` returned.
    """
    for row in scores["rows"]:
        path = run.model_path(row["head"])
        if not path.is_dir():
            continue  # a prior
        card = cast("NewCard", read_document(path).card)
        test = {
            "level": scores["level"],
            **scores["test"],
            "n_resamples": scores["n_resamples"],
            "threshold": row["threshold"],
            "scores": row["scores"],
            "regions": row["regions"],
            "mean_over_regions": row["mean_over_regions"],
            "views": row["views"],
            "fit": row["fit"],
            "operating_points": row["operating_points"],
            "net_benefit": row["net_benefit"],
        }
        card["scores"] = {**card["scores"], "test": test}
        update_card(path, write_readme(card), scores=card["scores"])


def _list_points(card: NewCard, test: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the packaged operating points, with their scores on test if known."""
    told = {own["name"]: own for own in (test or {}).get("operating_points", [])}
    nothing = {"scores": None, "confusion": None}
    packaged = card.get("operating_points", [])
    return [{**nothing, **told.get(point["name"], {}), **point} for point in packaged]


def _list_worth(curve: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return points of a decision curve: ``threshold``, ``model`` and ``treat_all`` (scores)."""
    if not curve:
        return []
    found = []
    for k, threshold in enumerate(curve["thresholds"]):
        if threshold in _WORTH_AT:
            score = {name: curve[name][k] for name in ("value", "low", "high")}
            treat_all = {"value": curve["treat_all"][k]}
            found.append({"threshold": threshold, "model": score, "treat_all": treat_all})
    return found


def _terms(source: str | None) -> str:
    if source and _GATED.match(source):
        return (
            f"{source} is governed by the Health AI Developer Foundations terms of use "
            f"({HEALTH_AI}), which whoever uses it accepts on the Hugging Face hub, where it is "
            "gated. Its weights are not part of this model, which is of no use without them."
        )
    if source == "demo":
        return "The demo's encoder comes with medembed, under medembed's own licence (Apache 2.0)."
    return (
        f"medembed does not know the terms of {source or 'this encoder'}. Read them where it comes "
        "from, before this model is used or passed on."
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("medembed", "results/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": _escape, "score": _write_score, "count": _write_count}
    return environment.get_template("model.md.j2")


def _escape(value: Any) -> Markup:
    """Return text from data as plain text in Markdown: no markup, no HTML, no line breaks."""
    safe = to_markdown(one_line(value))
    return Markup(safe)  # nosec B704 # escaped there


def _write_score(entry: Mapping[str, Any] | None) -> str:
    if not entry or entry.get("value") is None:
        return "not estimable"
    value, low, high = (entry.get(name) for name in ("value", "low", "high"))
    counts = f", {entry['k']:,}/{entry['n']:,}" if entry.get("n") else ""
    if low is None and high is not None:
        return f"{value:.3f} (at most {high:.3f})"
    if low is None or high is None:
        return f"{value:.3f}{counts}"
    return f"{value:.3f} ({low:.3f} to {high:.3f}){counts}"


def _write_count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"
