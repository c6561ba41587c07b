"""The test studies one by one, mistakes of the best head first, with what is known of each.

Films go by the first 16 digits of their SHA-256. Their pictures lie in `films/` beside the page,
and the page itself holds the first of them, so that a page that travels alone shows the mistakes.
"""

import base64
import csv
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medembed.core.errors import RunError
from medembed.core.files import write_atomically
from medembed.core.text import mask_controls
from medembed.dataset.manifest import Manifest
from medembed.evaluation.calibration import log_odds
from medembed.report.figures.captions import shown_rows
from medembed.report.gallery import CODE_DIGITS, FILM_DIGITS, FindThumbnails, film_name
from medembed.report.page_schema import Cases, Films, HeatMap, TrainingFilms, pack
from medembed.report.target_answers import Answers, code_answers, find_answers, name_target
from medembed.results.alignment import ScoredHead, TestSet
from medembed.results.comparison_schema import ComparisonResult
from medembed.results.deferral import find_sets
from medembed.results.predictions import image_code
from medembed.results.runs import Run
from medembed.results.subgroups import find_test_rows

if TYPE_CHECKING:
    from medembed.cache.store import Cache

__all__ = [
    "CASES_FILE",
    "FOLDER",
    "MAX_INLINED",
    "CaseList",
    "CaseSources",
    "check_covariates",
    "collect_films",
    "list_cases",
    "read_heat_map",
]

FOLDER = "films"
CASES_FILE = "cases.js"
MAX_INLINED = 5000
"""Cases that the page itself holds."""
INLINED_BYTES = 4 * 2**20
"""Of pictures that the page itself holds, before base64."""
NEIGHBOURS = 4
BATCH = 256
"""Pictures held at a time."""
_FILM = re.compile(r"[0-9a-f]{16}\.jpg")
_COLUMNS = ("row", "column", "left", "top", "right", "bottom", "logit")


@dataclass(frozen=True)
class CaseSources:
    """What cases are shown with, besides what the runs hold; each may be missing.

    Attributes
    ----------
    find_thumbnails : callable, optional
        Returns films as pictures, see `report.gallery`.
    cache : Cache or path, optional
        The cache of the runs: adds the nearest films of train, and their distance.
    explanations : Path, optional
        The directory of `medembed predict --explain`: adds heat maps.
    covariates : sequence of str
        Columns of the manifest to show with each case.
    names : bool
        Whether to show the paths of films, which the manifest has.
    answers : mapping of str to Series
        Answers to further targets, see `target_answers`; a manifest has them all.
    films : Path, optional
        The directory of the films; by default `FOLDER` beside the page.
    progress : callable, optional
        Called as progress(done, total) with films.
    """

    find_thumbnails: FindThumbnails | None = None
    cache: "Cache | str | os.PathLike[str] | None" = None
    explanations: Path | None = None
    covariates: Sequence[str] = ()
    names: bool = False
    answers: Answers = field(default_factory=dict)
    films: Path | None = None
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True, eq=False)
class CaseList:
    """The cases of a page.

    Attributes
    ----------
    content : Cases
        The cases that the page holds.
    whole : Cases or None
        All cases, for `CASES_FILE`; None if the page holds all.
    regions : list of str
    region_codes : (n,) int
        Of every test row, in the order of the test set.
    images : list of str
        SHA-256 of the films of the cases that the page holds, in their order, then of the films of
        train that are near them.
    target : str
        What the heads predict.
    answers : mapping of str to Series
        Answers to other targets, by image.
    """

    content: Cases
    whole: Cases | None
    regions: list[str]
    region_codes: NDArray[np.int64]
    images: list[str]
    target: str
    answers: Answers

    @property
    def file(self) -> str | None:
        """The file that has the other cases."""
        return None if self.whole is None else CASES_FILE

    def places(self) -> dict[str, int]:
        """Return the case of each film, by its code; films of train count down from -2."""
        films = (self.whole or self.content).films
        found = {code: k for k, codes in enumerate(films) for code in codes.split()}
        training = self.content.training
        for k, code in enumerate(training.films if training else ()):
            found.setdefault(code, -2 - k)
        return found


def list_cases(
    runs: Sequence[Run],
    result: ComparisonResult,
    test_set: TestSet,
    manifest: Manifest | None,
    sources: CaseSources,
) -> CaseList:
    """Return the test rows as the page's cases.

    Parameters
    ----------
    runs, result, test_set
        The comparison, and its runs.
    manifest : Manifest, optional
        Source of covariates, names and further targets.
    sources : CaseSources

    Raises
    ------
    MissingRowsError, CacheError
        On the conditions of the cache.
    """
    rows = shown_rows(result)
    names: Mapping[str, str] | None = None
    if sources.names and manifest is not None:
        names = dict(zip(manifest.rows["sha256"], manifest.rows["image"], strict=True))
    own = {(contender.run, contender.head): contender for contender in test_set.contenders}
    heads = [own[row["run"], row["head"]] for row in rows]
    order = _order(heads[0] if heads else None, test_set)
    codes, regions = pd.factorize(test_set.units["region"], sort=True)
    sets = find_sets(runs, test_set, heads[0]) if heads else None
    views = [images.split(" ") for images in test_set.units["images"].iloc[order]]
    answers = find_answers(runs, manifest, sources.answers)

    def describe(n: int) -> Cases:
        chosen = order[:n]
        return Cases(
            n=len(order),
            label=pack(test_set.y[chosen], "u1"),
            region=pack(codes[chosen], "u2"),
            probability=[pack(head.probability[chosen], "f4") for head in heads],
            sets=None if sets is None else pack(sets[chosen], "u1"),
            distance=None,
            films=[" ".join(image[:FILM_DIGITS] for image in own) for own in views[:n]],
            names=None
            if names is None
            else [
                [mask_controls(names.get(image, image[:CODE_DIGITS])) for image in own]
                for own in views[:n]
            ],
            covariates=_find_covariates(test_set, manifest, sources.covariates, views[:n]),
            targets={
                name: pack(code_answers(own, views[:n]), "u1") for name, own in answers.items()
            },
            training=None,
        )

    content = describe(min(len(order), MAX_INLINED))
    whole = describe(len(order)) if len(order) > MAX_INLINED else None
    shown = views[: len(content.films)]
    images = [image for own in shown for image in own]
    if sources.cache is not None:
        near = _find_near(runs, sources.cache, shown, list(regions))
        content = content.model_copy(update={"distance": near.distance, "training": near.films})
        images += near.images
    named = [str(name) for name in regions]
    return CaseList(content, whole, named, codes, images, name_target(runs), answers)


def check_covariates(columns: Sequence[str], manifest: Manifest | None) -> None:
    """Raise RunError unless the manifest has each of these columns."""
    if columns and manifest is None:
        raise RunError("covariates of cases are columns of a manifest: give --manifest.")
    for column in columns:
        if manifest is not None and column not in manifest.rows:
            known = ", ".join(map(str, manifest.rows.columns))
            raise RunError(f"the manifest has no column {column!r}. Choose from {known}.")


def _order(best: ScoredHead | None, test_set: TestSet) -> NDArray[np.int64]:
    """Return the rows: mistakes, the most confident first, then the others, the least sure first.

    Distance from the threshold is in log-odds.
    """
    if best is None:
        return np.arange(len(test_set.units))
    distance = log_odds(best.probability) - log_odds(np.array(best.threshold))
    is_wrong = (best.probability >= best.threshold) != (test_set.y == 1)
    far = np.where(is_wrong, -np.abs(distance), np.abs(distance))
    return np.lexsort((far, ~is_wrong))


def _find_covariates(
    test_set: TestSet,
    manifest: Manifest | None,
    columns: Sequence[str],
    views: Sequence[Sequence[str]],
) -> dict[str, list[str]]:
    """Return the columns' values of each case; views that differ are joined by a comma."""
    if not columns or manifest is None:
        return {}
    rows = find_test_rows(test_set, manifest).drop_duplicates("sha256").set_index("sha256")
    found = {}
    for column in columns:
        values = rows[column].astype("string").fillna("")
        known_values = dict(zip(values.index, values, strict=True))
        found[column] = [
            mask_controls(", ".join(dict.fromkeys(known_values.get(image, "") for image in own)))
            for own in views
        ]
    return found


@dataclass(frozen=True, eq=False)
class _Near:
    """Films of train near the cases; `images` are their whole SHA-256."""

    films: TrainingFilms | None
    distance: object
    images: list[str]


def _find_near(
    runs: Sequence[Run],
    cache: "Cache | str | os.PathLike[str]",
    views: Sequence[Sequence[str]],
    regions: list[str],
) -> _Near:
    """Return the nearest films of train of each case, of other patients, by cosine.

    A case's films are compared one by one; a film of train is as near as to the nearest of them.
    The distance of a case is that of its furthest view from the nearest film of train.
    """
    from medembed.cache.embeddings import choose_poolings
    from medembed.cache.neighbours import StoredRows
    from medembed.cache.spec import keys_from_hex
    from medembed.cache.store import open_cache
    from medembed.core.nearest import find_neighbours

    cache = open_cache(cache)
    poolings = choose_poolings(cache, None)
    known = _image_rows(runs[0])
    train = known[known["split"] == "train"].sort_values("sha256", ignore_index=True)
    wanted = sorted({image for own in views for image in own})
    own_patient = known.set_index("sha256")["patient"].reindex(wanted).fillna(-1).to_numpy()
    queries = StoredRows(cache, keys_from_hex(wanted), poolings)
    vectors = np.empty(queries.shape, np.float32)
    vectors[queries.original] = queries[:]
    stored = StoredRows(cache, keys_from_hex(train["sha256"].tolist()), poolings)
    found = find_neighbours(
        vectors,
        stored,
        NEIGHBOURS,
        own=own_patient,
        groups=train["patient"].to_numpy()[stored.original],
        rank=np.argsort(stored.original),
    )
    place = {image: k for k, image in enumerate(wanted)}
    nearest = np.full((len(views), NEIGHBOURS), -1, np.int64)
    similarity = np.full((len(views), NEIGHBOURS), np.nan)
    distance = np.full(len(views), np.nan)
    for k, own in enumerate(views):
        lines = [place[image] for image in own]
        distance[k] = found.distance[lines, 0].max()
        best: dict[int, float] = {}
        rows_of_case = found.rows[lines].ravel().tolist()
        for row, far in zip(rows_of_case, found.distance[lines].ravel().tolist(), strict=True):
            if row >= 0:
                best[row] = min(far, best.get(row, np.inf))
        chosen = sorted(best, key=lambda row: best[row])[:NEIGHBOURS]
        for column, row in enumerate(chosen):
            nearest[k, column], similarity[k, column] = stored.original[row], 1 - best[row]
    used, codes = np.unique(nearest, return_inverse=True)
    used, codes = used[used >= 0], codes - int((used < 0).any())
    rows = train.iloc[used]
    places = {name: code for code, name in enumerate(regions)}
    films = TrainingFilms(
        films=rows["sha256"].str[:FILM_DIGITS].tolist(),
        label=pack(rows["label"].fillna(2).astype(int), "u1"),
        region=pack(rows["region"].map(places).fillna(len(regions)), "u2"),
        neighbours=pack(codes.reshape(nearest.shape), "i4"),
        similarity=pack(similarity, "f4"),
        k=NEIGHBOURS,
        pooling="+".join(poolings),
    )
    return _Near(films, pack(np.where(np.isfinite(distance), distance, np.nan), "f4"),
                 rows["sha256"].tolist())  # fmt: skip


def _image_rows(run: Run) -> pd.DataFrame:
    """Return the images of a run once each, with patient, region, label and split."""
    rows = run.predictions()
    return rows[rows["sha256"].ne("")].drop_duplicates("sha256")


def collect_films(cases: CaseList, out: Path, sources: CaseSources) -> Films:
    """Write the films of the cases beside the page, and return what the page holds of them.

    A film that lies there is not decoded again if `find_thumbnails` looks there first; films of an
    earlier page that this one does not show are removed.

    Parameters
    ----------
    cases : CaseList
    out : Path
        The directory of the page.
    sources : CaseSources
    """
    folder = sources.films or out / FOLDER
    inlined: dict[str, str] = {}
    beside: list[str] = []
    held = 0
    images = list(dict.fromkeys(cases.images))
    for start in range(0, len(images) if sources.find_thumbnails else 0, BATCH):
        if sources.progress:
            sources.progress(start, len(images))
        found = sources.find_thumbnails(images[start : start + BATCH])  # type: ignore[misc]
        for image, thumbnail in found.items():
            code = image[:FILM_DIGITS]
            path = folder / film_name(image)
            if not path.exists() or path.read_bytes() != thumbnail.jpeg:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, thumbnail.jpeg)
            held += len(thumbnail.jpeg)
            if held <= INLINED_BYTES:
                data = base64.b64encode(thumbnail.jpeg).decode()
                inlined[code] = f"data:image/jpeg;base64,{data}"
            else:
                beside.append(code)
    if sources.progress and sources.find_thumbnails:
        sources.progress(len(images), len(images))
    if sources.films is None:
        _remove_old(folder, {*inlined, *beside})
    relative = Path(os.path.relpath(folder, out)).as_posix()
    heat = dict(_read_heat_maps(sources.explanations, images))
    return Films(folder=relative, inlined=inlined, beside=beside, heat=heat)


def _remove_old(folder: Path, kept: set[str]) -> None:
    """Remove films of an earlier page, and nothing else."""
    for path in folder.glob("*.jpg") if folder.is_dir() else ():
        if _FILM.fullmatch(path.name) and path.stem not in kept:
            path.unlink(missing_ok=True)


def _read_heat_maps(directory: Path | None, images: Iterable[str]) -> Iterable[tuple[str, HeatMap]]:
    """Yield the heat maps that `medembed predict --explain` wrote of these films."""
    if directory is None:
        return
    if not directory.is_dir():
        raise RunError(
            f"{directory} is not a directory. Give --explanations what `medembed predict "
            "--explain DIR` wrote."
        )
    for image in images:
        path = directory / f"{image_code(image)}.csv"
        if path.is_file():
            yield image[:FILM_DIGITS], read_heat_map(path)


def read_heat_map(path: Path) -> HeatMap:
    """Return the numbers of a heat map, which lie beside its picture.

    Cells of a padded film may lie outside it, equally far on both sides; so the film is as wide as
    the first left and the last right edge add up to.

    Raises
    ------
    RunError
        The file is not what `medembed predict --explain` writes.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            cells = list(csv.DictReader(file))
        table = {name: np.array([float(cell[name]) for cell in cells]) for name in _COLUMNS}
        rows, columns = int(table["row"].max()) + 1, int(table["column"].max()) + 1
        edges = [table["left"].min(), table["top"].min(), table["right"].max(),
                 table["bottom"].max()]  # fmt: skip
        width, height = edges[0] + edges[2], edges[1] + edges[3]
        if (
            rows * columns != len(cells)
            or width <= 0
            or height <= 0
            or not np.isfinite(edges).all()
        ):
            raise ValueError("its cells are no grid")
        values = np.zeros((rows, columns))
        values[table["row"].astype(int), table["column"].astype(int)] = table["logit"]
        if not np.isfinite(values).all():
            raise ValueError("a logit is not a finite number")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(
            f"{path} is not a heat map of `medembed predict --explain`: {error}. Make it again."
        ) from None
    top = float(np.abs(values).max())
    shares = values / top if top > 0 else values
    sizes = (width, height, width, height)
    return HeatMap(
        rows=rows,
        columns=columns,
        box=[round(float(edge / size), 5) for edge, size in zip(edges, sizes, strict=True)],
        top=top,
        values=pack(np.round(128 + 127 * shares), "u1"),
    )
