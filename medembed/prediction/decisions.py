"""Turn rows of embeddings into a model's answers, per image and per study."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from medembed.cache.spec import CacheSpec
from medembed.core.errors import CacheError, ModelError
from medembed.heads.packaging import Model
from medembed.results.model_card import Card

__all__ = ["ALPHA", "Scored", "check_spec", "decide", "raw_scores", "score_rows", "spec_of_card"]

ALPHA = 0.1
"""The default share of studies whose prediction set may miss the truth."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A model's answers for n images or studies.

    Attributes
    ----------
    raw : float64 (n,)
        The head's probability of abnormal.
    probability : float64 (n,)
        The calibrated probability of abnormal.
    decision : int8 (n,)
        1 if the calibrated probability reaches the threshold, else 0.
    set : bool (n, 2) or None
        Whether normal and abnormal are in the prediction set; None if the model has no conformal
        scores.
    is_marginal : bool (n,) or None
        Whether coverage is promised only over all regions together; None without a set.
    """

    raw: np.ndarray
    probability: np.ndarray
    decision: np.ndarray
    set: np.ndarray | None
    is_marginal: np.ndarray | None = None

    def table(self) -> pd.DataFrame:
        """Return a table of `raw`, `probability`, `decision`, and the set in two columns.

        `normal_in_set` and `abnormal_in_set` are nullable booleans, missing without a set.
        """
        absent = np.full((len(self.raw), 2), pd.NA, object)
        columns = absent if self.set is None else self.set.astype(object)
        return pd.DataFrame(
            {
                "raw": self.raw,
                "probability": self.probability,
                "decision": self.decision,
                "normal_in_set": pd.array(columns[:, 0], "boolean"),
                "abnormal_in_set": pd.array(columns[:, 1], "boolean"),
            }
        )


def score_rows(
    model: Model,
    card: Card,
    X: np.ndarray,
    studies: np.ndarray,
    regions: np.ndarray,
    *,
    alpha: float = ALPHA,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the answers for every image, and for every study from its views.

    An image's answer is that of a study with this image as its only view. A study's raw score is
    the mean over its views, or the head's own if it judges studies.

    Parameters
    ----------
    X : float32 (n, d)
        The head's input: the poolings of the card joined, covariates last.
    studies : int64 (n,)
        The study of each row.
    regions : (n,) of str
        The region of each row, equal within a study.

    Returns
    -------
    images : DataFrame
        In the order of X: the columns of `Scored.table`.
    studies : DataFrame
        In ascending order of `study`: `study`, `n_views`, `region`, and the columns of
        `Scored.table`.
    """
    images, of_studies = raw_scores(model, card, X, studies)
    names, first, counts = np.unique(studies, return_index=True, return_counts=True)
    known = pd.DataFrame({"study": names, "n_views": counts, "region": np.asarray(regions)[first]})
    answers = decide(card, of_studies, np.asarray(regions)[first], alpha).table()
    return decide(card, images, np.asarray(regions), alpha).table(), known.join(answers)


def raw_scores(
    model: Model, card: Card, X: np.ndarray, studies: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the head's probabilities of abnormal, before calibration.

    Parameters
    ----------
    X, studies
        See `score_rows`.

    Returns
    -------
    images : float64 (n,)
        The probability of each image alone.
    studies : float64 (m,)
        The probability of each study, in ascending order of `studies`.

    Raises
    ------
    ModelError
        The number of columns of X differs from that of the head's training.
    """
    if X.shape[1] != model.head.n_features_in_:
        raise ModelError(
            f"the model reads {model.head.n_features_in_} columns ({card.pooling} and covariates), "
            f"and these embeddings have {X.shape[1]}. Use the poolings that it was trained on."
        )
    images = np.asarray(model.head.predict_proba(X)[:, 1], np.float64)
    if not np.isfinite(images).all():
        raise ModelError("the model's probabilities are not finite numbers; train or copy it again")
    _, codes = np.unique(studies, return_inverse=True)
    if card.views == "attention":
        judged = model.head.predict_proba(X, codes)  # type: ignore[call-arg]
        return images, np.asarray(judged[:, 1], np.float64)
    return images, np.bincount(codes, weights=images) / np.bincount(codes)


def decide(
    card: Card,
    raw: np.ndarray,
    regions: np.ndarray,
    alpha: float = ALPHA,
    threshold: float | None = None,
) -> Scored:
    """Return calibrated probabilities, decisions and prediction sets of raw scores (n,).

    Parameters
    ----------
    regions : (n,) of str
        A region without scores of its own, or "", is compared with the scores of all regions.
    alpha : float
        The share of sets that may miss the truth, above 0 and below 1.
    threshold : float, optional
        Threshold of calibrated scores, abnormal at or above it; by default the card's.
    """
    probability = card.calibration.apply(raw)
    conformal = card.conformal
    cut = card.threshold if threshold is None else threshold
    decision = (probability >= cut).astype(np.int8)
    if conformal is None:
        return Scored(raw, probability, decision, None)
    names = np.asarray(regions)
    sets = conformal.sets(raw, names, alpha)
    return Scored(raw, probability, decision, sets, conformal.is_marginal(names))


def spec_of_card(card: Card) -> CacheSpec:
    """Return the spec of the embeddings that a model was trained on.

    Raises
    ------
    ModelError
        The card holds no valid spec.
    """
    try:
        return CacheSpec.from_dict(card.spec)
    except (KeyError, TypeError, ValueError, AttributeError, CacheError) as error:
        raise ModelError(
            f"the model's card has a spec of embeddings that cannot be read ({error}). "
            "Train or copy the model again."
        ) from error


def check_spec(card: Card, spec: CacheSpec, what: str = "these embeddings") -> None:
    """Refuse embeddings that were made differently from those of the model's training.

    The encoder's fingerprint, the preprocessing, and the shapes of the poolings that the head reads
    are compared. There may be more poolings, and they may be stored in another dtype.

    Parameters
    ----------
    what : str
        The origin of the embeddings, for the message.

    Raises
    ------
    ModelError
        The specs differ; the message names the first difference and both values.
    """
    names = card.pooling.split("+")
    wanted, found = (_narrowed(whole, names) for whole in (spec_of_card(card), spec))
    difference = wanted.first_difference(found)
    if difference is None:
        return
    name, ours, theirs = difference
    source = card.encoder.source or "an unknown encoder"
    raise ModelError(
        f"the model reads embeddings of {source} with {name}={_shown(ours)}, and {what} have "
        f"{name}={_shown(theirs)}. {_remedy(name)}"
    )


def _narrowed(spec: CacheSpec, names: list[str]) -> CacheSpec:
    """Return a spec with only the poolings `names`, or unchanged if it has none of them."""
    poolings = {name: spec.poolings[name] for name in names if name in spec.poolings}
    return CacheSpec(spec.encoder, spec.preprocessing, poolings or spec.poolings, "float32")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{name} {tuple(shape)}" for name, shape in value.items())
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def _remedy(name: str) -> str:
    if name == "encoder":
        return "Use the encoder that it was trained on, or a model that was trained on this one."
    if name == "images_version":
        return "Images are decoded differently since then: extract and train again."
    return "Extract with the options that it was trained on, or train on these."
