"""A packaged model, ready to be asked."""

import os
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from medembed.cache.store import Cache
from medembed.dataset.manifest import Manifest, read_manifest
from medembed.evaluation.thresholds import OperatingPoint
from medembed.heads.packaging import Model, load_model
from medembed.images.load import DEFAULT_LIMITS, Limits
from medembed.prediction.decisions import ALPHA
from medembed.prediction.encode import CachedRows, Embedder
from medembed.prediction.inputs import Requests, ask_images, ask_manifest
from medembed.prediction.rows import Draw, PredictionJob, predict_rows
from medembed.results.model_card import Card, read_card

__all__ = ["Predictor"]

_Progress = Callable[[int, int], None]


class Predictor:
    """A packaged model that answers for images; it and its encoder are loaded once.

    Nothing is read before the first question, or `load`.

    >>> predictor = Predictor("run/models/logistic")  # doctest: +SKIP
    >>> predictor.predict("wrist.dcm")["decision"]  # doctest: +SKIP
    'abnormal'

    Parameters
    ----------
    model : path
        A directory that `sweep` or `finetune` left in `models/`.
    encoder : str or path, optional
        Where the encoder is; by default what the model's card names. It must be the one that the
        model was trained on.
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
        model: str | os.PathLike[str],
        *,
        encoder: str | os.PathLike[str] | None = None,
        cache: Cache | str | os.PathLike[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
        alpha: float = ALPHA,
        operating_point: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        fetching: _Progress | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.path, self.encoder, self.cache = Path(model), encoder, cache
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

    def predict(self, image: str | os.PathLike[str]) -> dict[str, Any]:
        """Answer for one file; return the image's row, as `predict_images` describes it.

        Once loaded, this takes the encoder's own time and that of decoding the file.
        """
        return next(self.predict_images([image]))

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
                `evaluation.drift.remoteness`); whether that is so little that neither the
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
        if not isinstance(manifest, Manifest):
            manifest = read_manifest(Path(manifest))
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
        from medembed.prediction.pictures import Pictures  # torch

        return Pictures(directory, self.embedder, self.model.head).draw
