"""Yield answers as they become ready: a row per image, and per study after its last view."""

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np

from medembed.core.errors import EncoderError, ManifestError, MissingRowsError
from medembed.core.locations import Location
from medembed.evaluation.drift.embedding_space import measure_remoteness
from medembed.evaluation.thresholds import OperatingPoint
from medembed.extraction.image_store import refuse_empty_root
from medembed.heads.packaging import Model
from medembed.prediction.decisions import Scored, decide
from medembed.prediction.encode import (
    CachedRows,
    Embedder,
    Encoded,
    File,
    JoinedRows,
    encode_files,
)
from medembed.prediction.inputs import Requests
from medembed.results.decisions import NamedThreshold
from medembed.results.model_card import Card
from medembed.results.predictions import image_code

__all__ = [
    "Draw",
    "PredictedRow",
    "PredictionJob",
    "Remoteness",
    "Verdict",
    "predict_rows",
]

WINDOW = 4096
"""Rows of a cache in memory at a time; each such window verifies every shard once."""


class Remoteness(TypedDict):
    """How far an embedding is from the training images; all None without a reference."""

    distance: float | None
    distance_p: float | None
    far: bool | None


class Verdict(TypedDict):
    """A probability and what it decides; all None where there is none."""

    probability: float | None
    decision: str | None
    operating_point: NamedThreshold | None
    set: list[str] | None
    coverage: str | None


class PredictedRow(Verdict, Remoteness):
    """A row of an image, or of a study, whose `image` is None."""

    image: str | None
    study: str
    n_views: int | None
    n_failed: int | None
    trained_on: bool | None
    error: str | None
    explanation: NotRequired[str | None]


class Draw(Protocol):
    """Draws a picture of an answer; implemented and described in `overlay.Pictures.draw`."""

    def __call__(  # noqa: D102 - described there
        self,
        path: Location,
        sha256: str,
        pixels: np.ndarray,
        covariates: np.ndarray,
        probability: float,
    ) -> str | None: ...


@dataclass(frozen=True, eq=False)
class PredictionJob:
    """A model, and its source of embeddings.

    Attributes
    ----------
    embedders : sequence of Embedder
        One, or of an ensemble one for each encoder.
    cached : CachedRows, JoinedRows or None
        Searched before the encoder is used; ignored for explanations, which need tokens.
    alpha : float
        See `decisions.decide`.
    point : OperatingPoint, optional
        The operating point for decisions; by default the card's Youden point.
    draw : Draw, optional
        Explains every image that has an answer.
    on_status : callable, optional
        Called with sentences on what cannot be answered, and how many images are encoded.
    """

    model: Model
    card: Card
    embedders: Sequence[Embedder]
    cached: CachedRows | JoinedRows | None = None
    alpha: float = 0.1
    point: OperatingPoint | None = None
    draw: Draw | None = None
    on_status: Callable[[str], None] | None = None


@dataclass(frozen=True)
class _Plan:
    """Which source answers for which image."""

    cached: np.ndarray
    errors: dict[int, str]
    files: list[File]


def predict_rows(requests: Requests, job: PredictionJob) -> Iterator[PredictedRow]:
    """Yield a row per image, in the order of the requests, and per study after its last view.

    Rows are described in `Predictor.predict_images`.

    Raises
    ------
    MissingRowsError, EncoderError, ModelError, PathNotFoundError
        No image could be answered: none is in the cache, and the encoder cannot be loaded or the
        files are missing; raised before the first row.
    """
    plan = _make_plan(requests, job)
    answers = _Answers(requests, job)
    encoded: deque[Encoded] = deque()
    with contextlib.closing(encode_files(plan.files, job.embedders)) as batches:
        for start in range(0, len(requests), WINDOW):
            numbers = np.arange(start, min(start + WINDOW, len(requests)))
            rows = _read_cached(requests, job, numbers[plan.cached[numbers]])
            ready: list[Encoded] = []
            for number in numbers.tolist():
                if number in rows:
                    ready.append(Encoded(number, rows[number]))
                elif number in plan.errors:
                    ready.append(Encoded(number, error=plan.errors[number]))
                else:
                    if not encoded:
                        # Ready rows are not held back by those being computed.
                        yield from answers.add(ready)
                        ready = []
                        encoded.extend(next(batches))
                    ready.append(encoded.popleft())
            yield from answers.add(ready)


def _make_plan(requests: Requests, job: PredictionJob) -> _Plan:
    errors = dict(requests.errors)
    cached = np.zeros(len(requests), bool)
    if job.cached is not None and job.draw is None:
        cached = job.cached.has(requests.digests)
        known = job.cached.failures() if not cached.all() else {}
        for number in np.flatnonzero(~cached).tolist():
            failure = known.get(requests.digests[number])
            if failure is not None:
                errors.setdefault(
                    number, f"failed in the cache ({failure.stage}): {failure.reason}"
                )
    missing = [n for n in np.flatnonzero(~cached).tolist() if n not in errors]
    files = _find_files(requests, job, missing, errors, any_cached=bool(cached.any()))
    return _Plan(cached, errors, files)


def _find_files(
    requests: Requests,
    job: PredictionJob,
    missing: Sequence[int],
    errors: dict[int, str],
    *,
    any_cached: bool,
) -> list[File]:
    """Return the files to embed; if that is impossible, report why, if a cache has the rest."""
    if not missing:
        return []
    said = f"{len(missing)} of {len(requests)} images are not in the cache"
    if job.draw is not None:
        said = "what images are explained by is not in a cache"
    try:
        if not requests.has_files:
            raise MissingRowsError(
                f"{said}, and without their files they cannot be embedded. Give --image-root DIR."
            )
        if requests.root is not None and not any_cached:
            images = (requests.images[number] for number in missing)
            refuse_empty_root(requests.root, images, len(missing), "to answer for")
        sources = [embedder.encoder.source for embedder in job.embedders]
    except (EncoderError, MissingRowsError) as error:
        if not any_cached:
            raise
        _notify(job, f"Not answered: {said}: {error}")
        errors.update(
            dict.fromkeys(missing, f"is not in the cache, and cannot be embedded: {error}")
        )
        return []
    if job.cached is not None and job.draw is None:
        _notify(job, f"{said}; they are embedded by {' and '.join(sources)} now, and not kept.")
    return list(_resolve(requests, missing, errors))


def _resolve(requests: Requests, missing: Sequence[int], errors: dict[int, str]) -> Iterator[File]:
    for number in missing:
        try:
            yield File(number, requests.path(number), requests.digests[number])
        except ManifestError as error:
            errors[number] = str(error)


def _read_cached(
    requests: Requests, job: PredictionJob, numbers: np.ndarray
) -> dict[int, np.ndarray]:
    if job.cached is None or not len(numbers):
        return {}
    X = job.cached.read([requests.digests[number] for number in numbers])
    return dict(zip(numbers.tolist(), X, strict=True))


def _notify(job: PredictionJob, words: str) -> None:
    if job.on_status:
        job.on_status(words)


@dataclass(eq=False)
class _Study:
    """The views of a study so far."""

    n_left: int
    n_views: int = 0
    n_failed: int = 0
    trained_on: bool = False
    views: list[Any] = field(default_factory=list)
    places: list[Remoteness] = field(default_factory=list)


class _Answers:
    """Builds rows from ready images, and keeps the views of incomplete studies."""

    def __init__(self, requests: Requests, job: PredictionJob) -> None:
        self._requests, self._job = requests, job
        self._point = job.card.point() if job.point is None else job.point
        self._trained = job.card.training_images
        self._by_attention = job.card.views == "attention"
        counts = Counter(requests.studies.tolist())
        self._counts: Mapping[int, int] = counts
        self._open: dict[int, _Study] = {}

    def add(self, ready: Sequence[Encoded]) -> Iterator[PredictedRow]:
        """Yield the rows of these images, and of studies that they complete."""
        answered = [outcome for outcome in ready if outcome.x is not None]
        raw, scored = self._score(answered)
        where = self._place(answered)
        places = {outcome.number: place for place, outcome in enumerate(answered)}
        ended = self._add(ready, places, raw, where)
        studies = self._judge(ended)
        for outcome in ready:
            place = places.get(outcome.number)
            far = _NOWHERE if place is None else where[place]
            yield self._image_row(outcome, None if place is None else scored, place, far)
            if outcome.number in ended:
                yield studies[outcome.number]

    def _score(self, answered: Sequence[Encoded]) -> tuple[np.ndarray, Scored | None]:
        if not answered:
            return np.empty(0), None
        raw = self._predict(np.stack([self._row(outcome) for outcome in answered]))
        regions = [self._requests.regions[outcome.number] for outcome in answered]
        return raw, self._decide(raw, np.array(regions, object))

    def _decide(self, raw: np.ndarray, regions: np.ndarray) -> Scored:
        return decide(self._job.card, raw, regions, self._job.alpha, self._point.threshold)

    def _place(self, answered: Sequence[Encoded]) -> list[Remoteness]:
        """Return each image's distance from the training images."""
        model, head = self._job.model, self._job.model.head
        if not answered:
            return []
        X = np.stack([self._row(outcome) for outcome in answered])
        if not model.members:
            return _measure(model.reference, X, len(_embedding(answered[0])))
        places = []
        own: Sequence[np.ndarray] = head.columns
        for member, columns in zip(model.members, own, strict=True):
            n_own = int((columns < len(_embedding(answered[0]))).sum())
            places.append(_measure(member.reference, X[:, columns], n_own))
        return [_furthest(every) for every in zip(*places, strict=True)]

    def _predict(self, X: np.ndarray, *studies: np.ndarray) -> np.ndarray:
        return np.asarray(self._job.model.head.predict_proba(X, *studies)[:, 1], np.float64)

    def _row(self, outcome: Encoded) -> np.ndarray:
        return np.concatenate([_embedding(outcome), self._requests.covariates[outcome.number]])

    def _add(
        self,
        ready: Sequence[Encoded],
        places: Mapping[int, int],
        raw: np.ndarray,
        where: Sequence[Remoteness],
    ) -> dict[int, tuple[int, _Study]]:
        """Add views to their studies; return completed studies, keyed by their last view."""
        ended = {}
        for outcome in ready:
            code = int(self._requests.studies[outcome.number])
            study = self._open.setdefault(code, _Study(self._counts[code]))
            study.n_left -= 1
            study.n_views += 1
            if outcome.x is None:
                study.n_failed += 1
            else:
                study.trained_on |= bool(self._was_trained_on(outcome.number))
                # A head that judges studies reads all views; other heads need only their scores.
                alone = float(raw[places[outcome.number]])
                study.views.append(self._row(outcome) if self._by_attention else alone)
                study.places.append(where[places[outcome.number]])
            if not study.n_left:
                ended[outcome.number] = (code, self._open.pop(code))
        return ended

    def _judge(self, ended: Mapping[int, tuple[int, _Study]]) -> dict[int, PredictedRow]:
        """Return the rows of completed studies, keyed by their last view."""
        seen = {number: pair for number, pair in ended.items() if pair[1].views}
        scored = None
        if seen:
            views = [study.views for _, study in seen.values()]
            if self._by_attention:
                codes = np.repeat(np.arange(len(views)), [len(own) for own in views])
                raw = self._predict(np.stack([row for own in views for row in own]), codes)
            else:
                raw = np.array([np.mean(own) for own in views])
            regions = np.array([self._requests.regions[number] for number in seen], object)
            scored = self._decide(raw, regions)
        places = {number: place for place, number in enumerate(seen)}
        return {
            number: self._study_row(code, study, scored, places.get(number))
            for number, (code, study) in ended.items()
        }

    def _image_row(
        self, outcome: Encoded, scored: Scored | None, place: int | None, far: Remoteness
    ) -> PredictedRow:
        requests, number = self._requests, outcome.number
        row: PredictedRow = {
            "image": requests.images[number],
            "study": requests.names[requests.studies[number]],
            **_describe(scored, place, self._point, self._job.card.classes),
            **far,  # type: ignore[typeddict-item]
            "n_views": None,
            "n_failed": None,
            "trained_on": self._was_trained_on(number),
            "error": outcome.error,
        }
        if self._job.draw is not None:
            probability, row["explanation"] = row["probability"], None
            if outcome.pixels is not None and probability is not None:
                row["explanation"] = self._job.draw(
                    requests.path(number),
                    requests.digests[number],
                    outcome.pixels,
                    requests.covariates[number],
                    probability,
                )
        return row

    def _study_row(
        self, code: int, study: _Study, scored: Scored | None, place: int | None
    ) -> PredictedRow:
        error = None if study.views else f"none of its {study.n_views} views could be answered"
        row: PredictedRow = {
            "image": None,
            "study": self._requests.names[code],
            **_describe(scored, place, self._point, self._job.card.classes),
            **_furthest(study.places),  # type: ignore[typeddict-item]
            "n_views": study.n_views,
            "n_failed": study.n_failed,
            "trained_on": study.trained_on,
            "error": error,
        }
        return row if self._job.draw is None else {**row, "explanation": None}

    def _was_trained_on(self, number: int) -> bool | None:
        digest = self._requests.digests[number]
        return image_code(digest) in self._trained if digest else None


def _measure(
    reference: Mapping[str, np.ndarray] | None, X: np.ndarray, n_own: int
) -> list[Remoteness]:
    """Return the distance of each row from training; the first `n_own` columns are embeddings."""
    found = None
    if reference is not None:
        # computed on embeddings without covariates, unless the reference was fitted on both
        n_columns = len(reference.get("space_centre", X[0]))
        found = measure_remoteness(reference, X[:, :n_own] if n_columns == n_own else X)
    if found is None:
        return [_NOWHERE] * len(X)
    columns = zip(found.distance, found.p, found.far, strict=True)
    return [
        {"distance": float(distance), "distance_p": float(p), "far": bool(far)}
        for distance, p, far in columns
    ]


_NOWHERE: Remoteness = {"distance": None, "distance_p": None, "far": None}


def _embedding(outcome: Encoded) -> np.ndarray:
    assert outcome.x is not None
    return outcome.x


def _furthest(views: Sequence[Remoteness]) -> Remoteness:
    """Return the distance of the furthest of several views, or of an image in several spaces.

    p is Bonferroni-corrected over them.
    """
    if not views or any(view["far"] is None for view in views):
        return _NOWHERE
    most = max(views, key=lambda view: float(view["distance"] or 0.0))
    p = min(1.0, len(views) * float(most["distance_p"] or 0.0))
    return {"distance": most["distance"], "distance_p": p, "far": most["far"]}


_NO_VERDICT: Verdict = {
    "probability": None,
    "decision": None,
    "operating_point": None,
    "set": None,
    "coverage": None,
}


def _describe(
    scored: Scored | None, place: int | None, point: OperatingPoint, classes: tuple[str, str]
) -> Verdict:
    if scored is None or place is None:
        return _NO_VERDICT
    inside = coverage = None
    if scored.set is not None and scored.is_marginal is not None:
        inside = [name for name, is_in in zip(classes, scored.set[place], strict=True) if is_in]
        coverage = "marginal" if scored.is_marginal[place] else "region"
    return {
        "probability": float(scored.probability[place]),
        "decision": classes[int(scored.decision[place])],
        "operating_point": {"name": point.name, "threshold": point.threshold},
        "set": inside,
        "coverage": coverage,
    }
