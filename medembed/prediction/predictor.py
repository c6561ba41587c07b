"""A packaged model, ready for prediction."""

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pandas as pd

from medembed.cache.store import Cache
from medembed.core.errors import ArgumentError, MedembedError, ModelError
from medembed.core.files import as_path
from medembed.core.text import Summarised, Summary, counted
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.encoders.protocol import Encoder
from medembed.evaluation.thresholds import OperatingPoint
from medembed.heads.model_files import MEMBERS
from medembed.heads.packaging import Model, load_model
from medembed.images.load import DEFAULT_LIMITS, Limits
from medembed.prediction.decisions import ALPHA
from medembed.prediction.encode import CachedRows, Embedder, JoinedRows, open_caches
from medembed.prediction.inputs import Requests, request_images, request_manifest
from medembed.prediction.rows import Draw, PredictedRow, PredictionJob, predict_rows
from medembed.results.model_card import Card, read_card
from medembed.results.runs import Run, open_run
from medembed.results.targets import holds_targets

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Predictor", "find_model"]

_COLUMNS = (
    *("image", "probability", "decision", "set", "coverage"),
    *("distance", "distance_p", "far", "trained_on", "error"),
)
_Progress = Callable[[int, int], None]
CacheLike = Cache | str | os.PathLike[str]
EncoderLike = Encoder | str | os.PathLike[str]


class Predictor(Summarised):
    """A packaged model that predicts images; model and encoder are loaded once.

    Nothing is read before the first prediction, or `load`.

    >>> predictor = Predictor("run/models/logistic")  # doctest: +SKIP
    >>> predictor.predict("wrist.dcm")["decision"]  # doctest: +SKIP
    'abnormal'
    >>> table = predictor.predict(["wrist.dcm", "hand.png"])  # doctest: +SKIP

    Parameters
    ----------
    model : Model, Run or path
        A directory that `sweep` or `finetune` left in `models/`, or what `Run.model` read from it;
        of a run the best head by cross-validation.
    encoder : Encoder, str or path, optional
        The encoder or a reference to it; by default the one named by the model's card. It must be
        the one that the model was trained on. Of an ensemble a list, in the order of its card.
    cache : Cache or path, optional
        Embeddings to look images up in, by the SHA-256 of their bytes, before using the encoder; if
        the cache holds all images, the encoder is not loaded. Of an ensemble a list, in any order.
    device, precision : str
        Where and in which precision to encode, see `encoders.loading.load_encoder`. How images are
        fitted and which window of a DICOM is used is determined by the model.
    alpha : float
        Above 0 and below 1: prediction sets hold the true label for a share of at least 1 - alpha
        of studies like those of the model's training, among normal and abnormal ones alike.
    operating_point : str, optional
        The rule for decisions: one that the model was packaged with, such as ``sensitivity=0.95``,
        or ``threshold=0.3`` of calibrated probabilities; by default Youden's.
    limits : Limits
        Limits on size and time beyond which an image counts as failed. Time is not limited for up
        to 8 small files, which are decoded in this process.
    fetching : callable, optional
        Called as fetching(done, total) with bytes, while the encoder's weights are downloaded.
    on_status : callable, optional
        Called with sentences that accompany the answers.
    """

    def __init__(
        self,
        model: "Model | Predictor | Run | str | os.PathLike[str]",
        *,
        encoder: EncoderLike | Sequence[EncoderLike] | None = None,
        cache: CacheLike | Sequence[CacheLike] | None = None,
        device: str = "auto",
        precision: str = "auto",
        alpha: float = ALPHA,
        operating_point: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        fetching: _Progress | None = None,
        on_status: Callable[[str], None] | None = None,
    ) -> None:
        self.path, self.encoder, self.cache = find_model(model), encoder, cache
        self.device, self.precision, self.alpha = device, precision, alpha
        self.operating_point = operating_point
        self.limits, self.fetching, self.on_status = limits, fetching, on_status

    @cached_property
    def model(self) -> Model:
        """The head and the document that was saved with it."""
        return load_model(self.path)

    @cached_property
    def card(self) -> Card:
        """The model's card."""
        return read_card(self.model, self.path)

    @cached_property
    def point(self) -> OperatingPoint:
        """The operating point that determines decisions."""
        return self.card.point(self.operating_point)

    @cached_property
    def embedders(self) -> list[Embedder]:
        """The encoder, or those of an ensemble, not loaded yet.

        Raises
        ------
        ArgumentError
            The number of encoders given is not the model's.
        """
        cards, given = self.card.by_encoder(), self.encoder
        references: Sequence[EncoderLike | None]
        if given is None:
            references = [None] * len(cards)
        else:
            several = isinstance(given, list | tuple)
            references = given if several else [given]  # type: ignore[assignment, list-item]
        if len(references) != len(cards):
            raise ArgumentError(
                f"the model reads embeddings of {counted(len(cards), 'encoder')} "
                f"({', '.join(str(card.encoder.source) for card in cards)}), and "
                f"{len(references)} were given. Give one for each, in this order."
            )
        return [
            Embedder(
                self.path,
                card,
                reference=reference,
                device=self.device,
                precision=self.precision,
                limits=self.limits,
                progress=self.fetching,
            )
            for card, reference in zip(cards, references, strict=True)
        ]

    @cached_property
    def cached(self) -> CachedRows | JoinedRows | None:
        """The cache, or those of an ensemble, if given."""
        return None if self.cache is None else open_caches(self.cache, self.card)

    def load(self) -> "Predictor":
        """Load model and encoder now, so that the first prediction is as quick as later ones."""
        _ = self.model.head, self.point, [embedder.encoder for embedder in self.embedders]
        return self

    @overload
    def predict(self, images: str | os.PathLike[str]) -> PredictedRow: ...

    @overload
    def predict(
        self, images: "list[Any] | tuple[Any, ...] | np.ndarray | pd.Series[Any]"
    ) -> pd.DataFrame: ...

    def predict(self, images: Any) -> PredictedRow | pd.DataFrame:
        """Return predictions for one file or several.

        Once loaded, a call takes only the time of decoding and encoding the files.

        Parameters
        ----------
        images : path, or list or other sequence of path

        Returns
        -------
        dict or DataFrame
            For one path its row, as described in `predict_images`. For several a table with a row
            per image, in their order, and the columns ``image, probability, decision, set,
            coverage, distance, distance_p, far, trained_on, error``.

        Raises
        ------
        ArgumentError
            `images` is neither.
        MedembedError
            See `predict_images`.
        """
        if isinstance(images, str | os.PathLike):
            return next(self.predict_images([as_path(images, "an image")]))
        if isinstance(images, Manifest | Mapping) or not isinstance(images, Iterable):
            raise ArgumentError(
                "predict takes the path of an image, or a list of such paths; this is of type "
                f"{type(images).__name__}. For a manifest there is predict_manifest."
            )
        paths = [as_path(image, "an image") for image in images]
        rows = [row for row in self.predict_images(paths) if row["image"] is not None]
        return pd.DataFrame(rows, columns=_COLUMNS)

    def summarise(self) -> Summary:
        """Return the model's inputs and decision rule, or only the reason if it is unreadable."""
        try:
            about, card = self.model.summarise(), self.card
        except MedembedError as error:
            return Summary(f"Predictor of {self.path.resolve().name}", {"error": str(error)})
        facts = {**about.facts, "threshold": f"{card.threshold:.3f}", "views": card.views}
        sets = "none" if card.conformal is None else f"promise {100 * (1 - self.alpha):g} %"
        return Summary(
            about.title.replace("Model", "Predictor", 1), {**facts, "prediction sets": sets}
        )

    def predict_images(
        self,
        images: Sequence[str | os.PathLike[str]],
        *,
        explain: str | os.PathLike[str] | None = None,
        progress: _Progress | None = None,
    ) -> Generator[PredictedRow]:
        """Yield predictions for files, each a separate study of unknown region.

        Parameters
        ----------
        images : sequence of path
            The paths, which also name the studies; duplicates are allowed.
        explain : path, optional
            A directory, created if missing, for a picture of each image with its heat map, and
            the map's numbers. All images are then encoded, even if a cache holds them.
        progress : callable, optional
            Called as progress(done, total) with files, while they are hashed.

        Yields
        ------
        dict
            A row per image as soon as it is available, and after a study's last view one for the
            study, whose `image` is None. JSON values:

            image, study : str or None
                The image and its study.
            probability : float or None
                Calibrated probability of abnormal; for an image as if it were the study's only
                view. None if the image failed.
            decision : str or None
                Whether the probability reaches the threshold of the operating point: "abnormal" or
                "normal"; of a target's model the target's name, such as "metal", or "no metal".
            operating_point : dict or None
                ``name`` and ``threshold`` of the operating point.
            set : list of str or None
                The classes that cannot be ruled out at `alpha`; both if the model is uncertain,
                neither if the image is unlike its training images. None if the image failed, or
                for models without conformal scores.
            coverage : {"region", "marginal"} or None
                The scope of the promise of `alpha`: the row's region, which had enough training
                patients, or only all regions together, so that a harder region gets less. None
                without a set.
            distance, distance_p, far : float, float, bool, or None
                The embedding's distance from the training patients' embeddings, where 1 is the
                edge of the range that holds 95 % of them; the share of training patients at least
                as far (see `evaluation.drift.embedding_space`); whether that share is so small that
                neither the probability nor the set can be relied on. For a study, the furthest
                view, with p multiplied by the number of views. None if the image failed, or for
                models without statistics of their training.
            n_views, n_failed : int or None
                For a study: its number of images, and how many of them failed. The answer is based
                on the others.
            trained_on : bool or None
                Whether the image, or a view of the study, was among the model's training images,
                which makes the probability too optimistic. None if its bytes are unknown.
            error : str or None
                Why there is no answer.
            explanation : str or None
                Path of the picture, if requested.

        Raises
        ------
        MedembedError
            Raised before the first row: the model, the cache or the encoder do not match or cannot
            be read; the model reads covariates, which files lack. If the cache holds some of the
            images, an encoder that cannot be loaded fails only the others.
        """
        yield from self._answer(request_images(images, self.card, progress), explain)

    def predict_manifest(
        self,
        manifest: Manifest | str | os.PathLike[str],
        image_root: str | os.PathLike[str] | None = None,
        *,
        explain: str | os.PathLike[str] | None = None,
        progress: _Progress | None = None,
    ) -> Generator[PredictedRow]:
        """Yield predictions for all images and studies of a manifest, labelled or not.

        Parameters
        ----------
        image_root : path, optional
            Directory that the manifest's paths are relative to; not needed if the cache holds all
            images.
        explain, progress
            See `predict_images`, which also describes the rows; their order is the manifest's.

        Raises
        ------
        MedembedError
            Raised before the first row, as in `predict_images`; also if the manifest is invalid or
            lacks a covariate that the model reads, or none of its images is below the root.
        """
        manifest = read_manifest(manifest)
        requests = request_manifest(manifest, self.card, image_root, progress)
        yield from self._answer(requests, explain)

    def _answer(
        self, requests: Requests, explain: str | os.PathLike[str] | None
    ) -> Generator[PredictedRow]:
        job = PredictionJob(
            self.model,
            self.card,
            self.embedders,
            self.cached,
            alpha=self.alpha,
            point=self.point,
            draw=None if explain is None else self._open_directory(Path(explain)),
            on_status=self.on_status,
        )
        yield from predict_rows(requests, job)

    def _open_directory(self, directory: Path) -> Draw:
        from medembed.prediction.overlay import Pictures  # torch

        if self.model.members:
            raise ModelError(
                "an ensemble is not explained: its members read different tokens. Explain a "
                f"member, such as {self.path / MEMBERS / '0'}."
            )
        return Pictures(directory, self.embedders[0], self.model.head).draw


def find_model(model: Model | Predictor | Run | str | os.PathLike[str]) -> Path:
    """Return the directory of a model: of a run, that of the best head by cross-validation.

    Raises
    ------
    ArgumentError
        `model` is none of these, or a Model that was made by hand and never saved.
    RunError
        The run has packaged no model.
    """
    if isinstance(model, Run):
        return model.model_path(model.best_head())
    if isinstance(model, Predictor | Model):
        if model.path is None:
            raise ArgumentError(
                "the Model was created in memory and has no directory. Save it, and pass its path."
            )
        return model.path
    path = as_path(model, "a model", "a Model, a Run or a Predictor")
    has_runs = (path / "run.json").is_file() or holds_targets(path)
    return find_model(open_run(path)) if has_runs and not (path / "model.json").exists() else path
