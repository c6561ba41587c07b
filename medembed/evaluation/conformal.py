"""Prediction sets with a promised coverage, from out-of-fold scores.

Cross-conformal prediction (Vovk, Cross-conformal predictors, Annals of Mathematics and Artificial
Intelligence 74, 2015), within classes and regions (Vovk, Lindsay, Nouretdinov and Gammerman,
Mondrian confidence machine, 2003): among the normal studies, and among the abnormal ones, at most a
share alpha has a set without the true label, in every region with enough patients. For the other
regions, coverage is promised only over all regions together, so a harder region among them gets
less (`is_marginal`). For two classes the sets are those of the least ambiguous classifier with
class-wise thresholds (Sadinle, Lei and Wasserman, Least ambiguous set-valued classifiers with
bounded error levels, JASA, 2019).

**Guarantees and their limits.** The scores must come from models whose training and early stopping
have not seen their rows. New studies are scored by one model refitted on all rows, whereas Vovk
averages the folds' models, so coverage is close to nominal rather than at least nominal: the worst
case is unbounded, while the cross-conformal predictor's is slightly more than twice alpha (Barber,
Candès, Ramdas and Tibshirani, Predictive inference with the jackknife+, Annals of Statistics 49,
2021). A refit that ranks better than the folds' models tends to cover more.

**Patients.** Patients are exchangeable, studies are not: the studies of one patient resemble each
other. All studies are kept, each counting once, and the promise is for a study drawn from all
studies, in which patients with many studies have more weight. With one study per patient it would
hold for any number of patients; with all studies it holds as the number of patients grows (Dunn,
Wasserman and Ramdas, Distribution-free prediction sets for two-layer hierarchical models, JASA 118,
2023, their pooled distribution function), and coverage varies more between sets of patients than
it would with as many independent studies. It does not hold for another institution's patients: see
`medembed evaluate`.

**MAPIE** (1.6) serves as an oracle in the tests but is not used here. Its classifiers do not
condition on the label; those that condition on features need cvxpy and solve a programme for each
study; all require an estimator instead of out-of-fold scores by patient, and are stored as a
pickle.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, Self

import numpy as np

from medembed.core.errors import ModelError, TrainingDataError
from medembed.core.schema import (
    AfterValidator,
    ClosedRecord,
    Count,
    Field,
    Record,
    model_validator,
    parse,
)
from medembed.evaluation.bootstrap import patient_codes
from medembed.evaluation.scores import check_both_classes

__all__ = [
    "MIN_GROUP",
    "ClassCounts",
    "ClassScores",
    "Conformal",
    "ConformalEntry",
    "fit_conformal",
]

#: With fewer patients of a class in a region, the scores of all regions replace the region's own.
#: With 100, coverage at 90 % has a standard deviation of 3 points between sets of patients.
MIN_GROUP = 100
#: In simulations (linear heads with early stopping, 90 % promised, a third abnormal), 7 to 12 % of
#: heads trained on 60 patients cover less than 80 % of a class, 2 to 6 % with 100 and at most 3 %
#: with 200; up to 45 % of the heads whose out-of-fold AUROC exceeds 0.6 only by chance.
_FEW, _WEAK = 50, 0.6
#: Decimals that scores are stored with, rounded so that sets only grow.
_DECIMALS = 5

_CLASSES = ("normal", "abnormal")


def _check_rising(scores: list[float]) -> list[float]:
    if any(a > b for a, b in pairwise(scores)):
        raise ValueError("must be ascending")
    return scores


@dataclass(frozen=True, eq=False)
class Conformal:
    """Sorted scores of studies with known labels, by region and class.

    Attributes
    ----------
    scores : dict of str to pair of float64 arrays
        region -> scores of its normal and of its abnormal studies, each ascending, in [0, 1].
    min_group : int
        See `MIN_GROUP`.
    patients : dict of str to pair of int, optional
        region -> number of patients behind its scores; by default the number of scores.
    """

    scores: Mapping[str, tuple[np.ndarray, np.ndarray]]
    min_group: int = MIN_GROUP
    patients: Mapping[str, tuple[int, int]] | None = None

    def p_values(self, probability: np.ndarray, regions: np.ndarray) -> np.ndarray:
        """Return conformal p-values of each score for a normal and for an abnormal study.

        p = (1 + number of stored scores of the class that are at least as nonconforming) / (1 +
        their number); high scores are nonconforming for normal studies, low ones for abnormal ones.
        Not smoothed: a tie counts as nonconforming, so that sets are slightly too large rather than
        random.

        Parameters
        ----------
        probability : (n,)
            The head's probability of abnormal for studies, before calibration, as in the stored
            scores.
        regions : (n,) of str
            An unknown region, or "", is compared with all regions together.

        Returns
        -------
        float64 (n, 2)
            Columns normal and abnormal, above 0 and at most 1.

        Raises
        ------
        ModelError
            A probability is not in [0, 1], or the lengths differ.
        """
        values = np.asarray(probability, np.float64)
        names = np.asarray(regions, dtype=object).astype(str)
        if not ((values >= 0) & (values <= 1)).all():
            raise ModelError("a probability is NaN or outside [0, 1]; it has no prediction set")
        if values.shape != names.shape:
            raise ModelError(f"{len(values)} probabilities, but {len(names)} regions")
        result = np.empty((len(values), 2))
        for region in np.unique(names):
            own = names == region
            for column in range(2):
                kept = self._kept(region, column)
                result[own, column] = _p_values(kept, values[own], column)
        return result

    def sets(self, probability: np.ndarray, regions: np.ndarray, alpha: float = 0.1) -> np.ndarray:
        """Return whether normal and abnormal are in each study's set: bool (n, 2).

        Parameters
        ----------
        probability, regions
            See `p_values`.
        alpha : float
            The share of sets that may miss the truth, above 0 and below 1.

        Raises
        ------
        ModelError
            `alpha` is outside (0, 1), or an argument is invalid; see `p_values`.
        """
        if not 0 < alpha < 1:
            raise ModelError(f"alpha is {alpha}; give a share above 0 and below 1, such as 0.1")
        return self.p_values(probability, regions) > alpha

    def is_marginal(self, regions: np.ndarray) -> np.ndarray:
        """Return whether coverage is promised only over all regions, not for the row's own region.

        Parameters
        ----------
        regions : (n,) of str
            See `p_values`.

        Returns
        -------
        bool (n,)
            True if the region has too few patients of either class.
        """
        names = np.asarray(regions, dtype=object).astype(str)
        known = {str(name): all(self._is_own(str(name), k) for k in (0, 1)) for name in set(names)}
        return np.array([not known[str(name)] for name in names], bool)

    def count(self, region: str) -> tuple[int, int]:
        """Return how many patients are behind a region's normal and abnormal scores."""
        if self.patients is not None:
            return self.patients.get(region, (0, 0))
        normal, abnormal = self.scores.get(region, ((), ()))
        return len(normal), len(abnormal)

    def warning(self) -> str | None:
        """Return a warning that coverage may be lower than promised, or None.

        It is returned if there are fewer than 50 patients of a class, or if the signal may be weak:
        the lower limit of the 95 % interval of the stored scores' AUROC (Hanley and McNeil, The
        meaning and use of the area under a ROC curve, Radiology 143, 1982; with the actual number
        of patients) is below 0.6.
        """
        normal, abnormal = (self._pooled(column) for column in range(2))
        if not (normal.size and abnormal.size):
            return None
        below = np.searchsorted(normal, abnormal, side="left")
        ties = np.searchsorted(normal, abnormal, side="right") - below
        auroc = float((below + ties / 2).mean() / len(normal))
        counts = np.array([self.count(region) for region in self.scores]).sum(axis=0)
        n_normal, n_abnormal = (max(int(n), 1) for n in counts)
        q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
        spread = auroc * (1 - auroc)
        spread += (n_abnormal - 1) * (q1 - auroc**2) + (n_normal - 1) * (q2 - auroc**2)
        low = auroc - 1.96 * float(np.sqrt(max(spread, 0.0) / (n_normal * n_abnormal)))
        reasons = []
        if min(n_normal, n_abnormal) < _FEW:
            which = _CLASSES[int(n_abnormal < n_normal)]
            reasons.append(f"they rest on {min(n_normal, n_abnormal)} {which} patients")
        if low < _WEAK:
            reasons.append(
                f"the signal may be weak (AUROC out of fold {auroc:.2f}, from {max(low, 0):.2f} on)"
            )
        if not reasons:
            return None
        return (
            f"Prediction sets are not to be relied on: {' and '.join(reasons)}. A class may be "
            "covered far less than was promised."
        )

    def as_dict(self) -> dict[str, object]:
        """Return a JSON-able dict that `from_dict` reads."""
        scores = {
            region: dict(zip(_CLASSES, (part.tolist() for part in parts), strict=True))
            for region, parts in sorted(self.scores.items())
        }
        found = {"method": "mondrian", "min_group": self.min_group, "scores": scores}
        if self.patients is not None:
            counts = {
                region: dict(zip(_CLASSES, self.count(region), strict=True)) for region in scores
            }
            found["patients"] = counts
        return found

    @classmethod
    def from_dict(cls, document: object) -> "Conformal":
        """Return the scores that `as_dict` described.

        Raises
        ------
        ModelError
            The method is unknown, or the scores of a class are not ascending numbers in [0, 1].
        """
        return parse(ConformalEntry, document, ModelError, "conformal").build()

    def _kept(self, region: str, column: int) -> np.ndarray:
        if self._is_own(region, column):
            return self.scores[region][column]
        return self._pooled(column)

    def _is_own(self, region: str, column: int) -> bool:
        return self.count(region)[column] >= self.min_group

    def _pooled(self, column: int) -> np.ndarray:
        return np.sort(np.concatenate([parts[column] for parts in self.scores.values()]))


Scores = Annotated[list[Annotated[float, Field(ge=0, le=1)]], AfterValidator(_check_rising)]


class ClassScores(ClosedRecord):
    """Scores of a region's studies, by class."""

    normal: Scores
    abnormal: Scores


class ClassCounts(Record):
    """Patients behind a region's scores, by class."""

    normal: Count
    abnormal: Count


class ConformalEntry(Record):
    """Conformal scores as cards and runs keep them."""

    method: Literal["mondrian"]
    min_group: int = Field(ge=1)
    scores: dict[str, ClassScores] = Field(min_length=1)
    patients: dict[str, ClassCounts] | None = None
    """How many are behind the scores of each region; models of before do not say."""

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        for name in _CLASSES:
            if not any(getattr(own, name) for own in self.scores.values()):
                raise ValueError("scores have only one class")
        if self.patients is not None:
            for region, scores in self.scores.items():
                self._check_patients(region, scores, self.patients.get(region))
        return self

    def _check_patients(
        self, region: str, scores: ClassScores, patients: ClassCounts | None
    ) -> None:
        for name in _CLASSES:
            n, n_scores = getattr(patients, name, None), len(getattr(scores, name))
            if n is None or not bool(n_scores) <= n <= n_scores:
                raise ValueError(
                    f"{n_scores} {name} scores of {region!r} cannot be of {n} patients"
                )

    def build(self) -> Conformal:
        """Return the sets themselves."""
        scores = {
            region: (np.array(own.normal, np.float64), np.array(own.abnormal, np.float64))
            for region, own in self.scores.items()
        }
        patients = None
        if self.patients is not None:
            known = {region: self.patients[region] for region in scores}
            patients = {region: (own.normal, own.abnormal) for region, own in known.items()}
        return Conformal(scores, self.min_group, patients)


def fit_conformal(
    probability: np.ndarray,
    y: np.ndarray,
    regions: np.ndarray,
    *,
    patients: np.ndarray | None = None,
    min_group: int = MIN_GROUP,
) -> Conformal:
    """Return the scores of labelled studies that neither training nor early stopping has seen.

    Parameters
    ----------
    probability : (n,)
        Out-of-fold probability of abnormal for studies, before calibration, in [0, 1].
    y : (n,)
        Labels, 0 or 1; both occur.
    regions : (n,) of str
    patients : (n,), optional
        Each study's patient; by default every study has its own.
    min_group : int
        See `MIN_GROUP`; at least 1.

    Raises
    ------
    TrainingDataError
        Only one class, lengths that differ, other labels, or probabilities outside [0, 1].
    """
    labels, values = check_both_classes(y, probability, "a prediction set")
    names = np.asarray(regions, dtype=object).astype(str)
    if len(names) != len(labels):
        raise TrainingDataError(f"{len(labels)} labels, but {len(names)} regions")
    # up for normal and down for abnormal studies: more stored scores are at least as nonconforming
    kept = np.where(labels == 0, _round(values, 1), _round(values, -1))
    scores = {
        str(region): (
            np.sort(kept[(names == region) & (labels == 0)]),
            np.sort(kept[(names == region) & (labels == 1)]),
        )
        for region in np.unique(names)
    }
    if patients is None:
        return Conformal(scores, min_group)
    codes = patient_codes(patients)
    if len(codes) != len(labels):
        raise TrainingDataError(f"{len(labels)} labels, but {len(codes)} patients")
    counts = {}
    for region in scores:
        own = (codes[(names == region) & (labels == label)] for label in (0, 1))
        n_normal, n_abnormal = (len(np.unique(part)) for part in own)
        counts[region] = (n_normal, n_abnormal)
    return Conformal(scores, min_group, counts)


def _round(values: np.ndarray, way: int) -> np.ndarray:
    """Return values rounded to `_DECIMALS` decimals, all upwards (way 1) or all downwards (-1)."""
    step = 10.0**_DECIMALS
    steps = np.ceil(values * step) if way > 0 else np.floor(values * step)
    # the product is rounded too, and may reach the next step before the exact value does
    return np.asarray(np.where(way * (steps / step - values) < 0, steps + way, steps) / step)


def _p_values(kept: np.ndarray, values: np.ndarray, column: int) -> np.ndarray:
    if column == 0:
        strange = len(kept) - np.searchsorted(kept, values, side="left")
    else:
        strange = np.searchsorted(kept, values, side="right")
    return np.asarray((1 + strange) / (1 + len(kept)), np.float64)
