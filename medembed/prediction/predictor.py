"""A packaged model, ready to be asked."""

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pandas as pd

from medembed.cache.store import Cache
from medembed.core.errors import ArgumentError, MedembedError
from medembed.core.files import as_path
from medembed.core.text import Summarised, Summary
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.encoders.protocol import Encoder
from medembed.evaluation.thresholds import OperatingPoint
from medembed.heads.packaging import Model, load_model
from medembed.images.load import DEFAULT_LIMITS, Limits
from medembed.prediction.decisions import ALPHA
from medembed.prediction.encode import CachedRows, Embedder
from medembed.prediction.inputs import Requests, ask_images, ask_manifest
from medembed.prediction.rows import Draw, PredictionJob, predict_rows
from medembed.results.model_card import Card, read_card
from medembed.results.runs import Run, open_run

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Predictor", "find_model"]

_COLUMNS = (
    *("image", "probability", "decision", "set", "coverage"),
    *("distance", "distance_p", "far", "trained_on", "error"),
)
_Progress = Callable[[int, int], None]


class Predictor(Summarised):
    """A packaged model that answers for images; it and its encoder are loaded once.

    Nothing is read before the first question, or `load`.

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
        The encoder, or where it is; by default what the model's card names. It must be the one
        that the model was trained on.
    cache : Cache or path, optional
        Embeddings to look images up in, by the SHA-256 of their bytes, before the encoder is asked;
        where it has all of them, the encoder is not loaded.
    device, precision : str
        As `encoders.loading.load_encoder` has them. How images are fitted and which window of a
        DICOM is used is the model's own, and is not to be chosen.
    alpha : float
        Above 0 and below 1: prediction sets hold the truth of a share of at least 1 - alpha of
        studies like those that the model was trained on, normal and abnormal ones alike.
    operating_point : str, optional
        What decides: one that the model was packaged with, such as ``sensitivity=0.95``, or
        ``threshold=0.3`` of calibrated probabilities; by default Youden's.
    limits : Limits
        What an image may cost before it counts as failed. Of up to 8 little files, which are
        decoded in this process, the time is not limited.
    fetching : callable, optional
        Called as fetching(done, total) with bytes, while the encoder's weights are fetched.
    tell : callable, optional
        Told in a sentence what there is to know beside the answers.
    """

    def __init__(
        self,
        model: "Model | Predictor | Run | str | os.PathLike[str]",
        *,
        encoder: Encoder | str | os.PathLike[str] | None = None,
        cache: Cache | str | os.PathLike[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
        alpha: float = ALPHA,
        operating_point: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        fetching: _Progress | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.path, self.encoder, self.cache = find_model(model), encoder, cache
        self.device, self.precision, self.alpha = device, precision, alpha
        self.operating_point = operating_point
        self.limits, self.fetching, self.tell = limits, fetching, tell

    @cached_property
    def model(self) -> Model:
        """The head and the document that was saved with it."""
        return load_model(self.path)

    @cached_property
    def card(self) -> Card:
        """What the model says of itself."""
        return read_card(self.model, self.path)

    @cached_property
    def point(self) -> OperatingPoint:
        """The operating point that decides."""
        return self.card.point(self.operating_point)

    @cached_property
    def embedder(self) -> Embedder:
        """The encoder, not loaded yet."""
        return Embedder(
            self.path,
            self.card,
            reference=self.encoder,
            device=self.device,
            precision=self.precision,
            limits=self.limits,
            progress=self.fetching,
        )

    @cached_property
    def cached(self) -> CachedRows | None:
        """The cache, if one was given."""
        return None if self.cache is None else CachedRows(self.cache, self.card)

    def load(self) -> "Predictor":
        """Load model and encoder now, so that the first question is as quick as the next."""
        _ = self.model.head, self.point, self.embedder.encoder
        return self

    @overload
    def predict(self, images: str | os.PathLike[str]) -> dict[str, Any]: ...

    @overload
    def predict(
        self, images: "list[Any] | tuple[Any, ...] | np.ndarray | pd.Series[Any]"
    ) -> pd.DataFrame: ...

    def predict(self, images: Any) -> dict[str, Any] | pd.DataFrame:
        """Answer for one file or for several, of which nothing else is known.

        Once loaded, this takes the encoder's own time and that of decoding the files.

        Parameters
        ----------
        images : path, or list or other sequence of path

        Returns
        -------
        dict or DataFrame
            Of one path its row, as `predict_images` describes it. Of several a table with a row
            per image, in their order, and the columns ``image, probability, decision, set,
            coverage, distance, distance_p, far, trained_on, error``.

        Raises
        ------
        ArgumentError
            `images` are neither.
        MedembedError
            As `predict_images`.
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
        """Return what the model reads and how it decides; where it cannot be read, that alone."""
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
    ) -> Generator[dict[str, Any]]:
        """Answer for files of which nothing else is known: each is a study of its own.

        Parameters
        ----------
        images : sequence of path
            Their names are the studies' names too, and may stand there twice.
        explain : path, optional
            A directory, made if it is not there, for a picture of each image and its heat map,
            and the map's numbers beside it. The encoder is asked for all images then.
        progress : callable, optional
            Called as progress(done, total) with files, while they are hashed.

        Yields
        ------
        dict
            A row per image as soon as it is known, and after a study's last view one for the
            study, whose `image` is None. JSON values:

            image, study : str or None
                Which image, of which study.
            probability : float or None
                Calibrated, of abnormal; of an image as if it were the study's only view. None
                where the image failed.
            decision : {"normal", "abnormal"} or None
                Whether the probability reaches the threshold of the operating point.
            operating_point : dict or None
                That: ``name`` and ``threshold``.
            set : list of str or None
                The classes that cannot be ruled out at `alpha`; both where the model is not sure,
                none where the image is like nothing that it was trained on. None where it failed,
                and of models without conformal scores.
            coverage : {"region", "marginal"} or None
                Of what `alpha` is promised: of the row's region, whose training patients were
                enough, or of all regions together alone, where a harder one gets less. None
                without a set.
            distance, distance_p, far : float, float, bool, or None
                How far the embedding lies from the training patients': 1 is the edge of the range
                that holds 95 % of them; the share of them that lie as far (see
                `evaluation.drift.embedding_space`); whether that is so little that neither the
                probability nor the set holds. Of a study its furthest view, and p times the number
                of views.
                None where the image failed, and of models without statistics of their training.
            n_views, n_failed : int or None
                Of a study: how many images it has, and how many of them failed. Its answer is
                that of the others.
            trained_on : bool or None
                Whether the image, or a view of the study, was among the model's training images:
                then its probability is too good. None where its bytes are not known.
            error : str or None
                Why there is no answer.
            explanation : str or None
                The picture, where asked for.

        Raises
        ------
        MedembedError
            Before the first row: the model, the cache or the encoder do not fit each other or
            cannot be read; the model reads covariates, which files do not have. Where the cache
            has some of the images, an encoder that cannot be had fails the others only.
        """
        yield from self._answer(ask_images(images, self.card, progress), explain)

    def predict_manifest(
        self,
        manifest: Manifest | str | os.PathLike[str],
        image_root: str | os.PathLike[str] | None = None,
        *,
        explain: str | os.PathLike[str] | None = None,
        progress: _Progress | None = None,
    ) -> Generator[dict[str, Any]]:
        """Answer for the images and studies of a manifest, labelled or not, of all its splits.

        Parameters
        ----------
        image_root : path, optional
            What the manifest's paths start from; not needed where the cache has all images.
        explain, progress
            As for `predict_images`, which says what the rows are; their order is the manifest's.

        Raises
        ------
        MedembedError
            Before the first row, as `predict_images`; the manifest breaks its rules, or has no
            column of a covariate that the model reads; none of its images is below the root.
        """
        manifest = read_manifest(manifest)
        requests = ask_manifest(manifest, self.card, image_root, progress)
        yield from self._answer(requests, explain)

    def _answer(
        self, requests: Requests, explain: str | os.PathLike[str] | None
    ) -> Generator[dict[str, Any]]:
        job = PredictionJob(
            self.model,
            self.card,
            self.embedder,
            self.cached,
            alpha=self.alpha,
            point=self.point,
            draw=None if explain is None else self._open_directory(Path(explain)),
            tell=self.tell,
        )
        yield from predict_rows(requests, job)

    def _open_directory(self, directory: Path) -> Draw:
        from medembed.prediction.overlay import Pictures  # torch

        return Pictures(directory, self.embedder, self.model.head).draw


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
                "the Model was made by hand and lies in no directory. Save it, and give its path."
            )
        return model.path
    path = as_path(model, "a model", "a Model, a Run or a Predictor")
    is_run = (path / "run.json").is_file() and not (path / "model.json").exists()
    return find_model(open_run(path)) if is_run else path
