"""The headline of a page or an evaluation: one or two sentences derived from its tests.

A head is called worse only if Holm's p is below `SIGNIFICANCE`; a head that could not be tested is
called untested. Priors are treated likewise, and so is a drop elsewhere, which is considered shown
if its interval lies on one side of zero.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from medembed.core.poolings import IMAGE_STATISTICS
from medembed.core.text import counted
from medembed.report.tables import format_p
from medembed.results.comparison_schema import ComparedHead, ComparisonResult
from medembed.results.methods import name_compared_classes
from medembed.results.significance import SIGNIFICANCE, row_name

__all__ = [
    "Headline",
    "PriorVerdict",
    "Ranking",
    "Tile",
    "describe_small_sample",
    "describe_tiles",
    "judge_priors",
    "rank_heads",
    "write_headline",
]

MAX_NAMES = 6
"""Most heads named in one sentence; with more, one less is named and the others are counted."""
WIDE = 0.1
"""Width of AUROC's interval beyond which a page says that the sample is small."""
MAX_DROPS = 3
"""Evaluations that get a separate sentence."""
ROUNDING = 1e-12
_PRIORS = {
    "region-prior": "the region's prior",
    "class-prior": "the class prior",
    "metadata": "the covariates alone",
    IMAGE_STATISTICS: "brightness, size and sharpness alone",
}

Standing = Literal["better", "undecided", "worse", "untested"]


@dataclass(frozen=True)
class Headline:
    """The title of a page, and the sentences below it."""

    title: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        """All sentences on one line."""
        return " ".join(self.sentences)


@dataclass(frozen=True)
class Ranking:
    """Trained heads relative to the best one, by name, best AUROC first.

    Attributes
    ----------
    best : str
        The head with the highest AUROC, the first if there are several.
    equal : tuple of str
        Heads with an equal AUROC.
    worse : tuple of str
        Heads that are worse by the paired test: Holm's p below `SIGNIFICANCE`.
    undecided : tuple of str
        Heads that the test does not distinguish from the best.
    untested : tuple of str
        Heads without a p.
    is_tested : bool
        Whether any head was tested against the best.
    """

    best: str
    equal: tuple[str, ...]
    worse: tuple[str, ...]
    undecided: tuple[str, ...]
    untested: tuple[str, ...]
    is_tested: bool


class PriorVerdict(NamedTuple):
    """The best trained head compared with a prior: both AUROCs, and Holm's p if available."""

    prior: str
    standing: Standing
    head_auroc: float
    prior_auroc: float
    p: float | None


def rank_heads(result: ComparisonResult) -> Ranking | None:
    """Return the trained heads of a comparison, sorted relative to the best.

    Returns None if no head was trained, or no AUROC is estimable.
    """
    trained = _trained(result)
    if not trained or trained[0]["scores"]["auroc"]["value"] is None:
        return None
    best, *others = trained
    found: dict[str, list[str]] = {"equal": [], "worse": [], "undecided": [], "untested": []}
    for row in others:
        p = _p_holm(result, best, row)
        if abs(_auroc(best) - _auroc(row)) < ROUNDING:
            kind = "equal"
        elif p is None:
            kind = "untested"
        else:
            kind = "worse" if p < SIGNIFICANCE else "undecided"
        found[kind].append(_name(result, row))
    is_tested = any(_p_holm(result, best, row) is not None for row in others)
    placed = {kind: tuple(names) for kind, names in found.items()}
    return Ranking(_name(result, best), **placed, is_tested=is_tested)


class Tile(NamedTuple):
    """A score at a glance."""

    name: str
    value: str
    interval: str
    about: str


def describe_tiles(result: ComparisonResult) -> list[Tile]:
    """Return AUROC, sensitivity and specificity of the best trained head, and what was measured."""
    found = []
    test, classes = result["test"], name_compared_classes(result)
    trained = _trained(result)
    for name, title, what in (
        ("auroc", "AUROC", ""),
        ("sensitivity", "Sensitivity", classes.positive),
        ("specificity", "Specificity", classes.negative),
    ):
        score = trained[0]["scores"][name] if trained else None
        if score is None or score["value"] is None:
            found.append(Tile(title, "–", "", "not estimable"))
            continue
        has_interval = score["low"] is not None and score["high"] is not None
        interval = f"{score['low']:.2f} to {score['high']:.2f}" if has_interval else "no interval"
        among = f", highest of {len(trained)} heads" if len(trained) > 1 else ""
        about = f"{_name(result, trained[0])}{among}; 95 % interval"
        if what and "k" in score:
            about = f"{score['k']:,} of {score['n']:,} {what}, at Youden’s threshold of training"
        found.append(Tile(title, f"{score['value']:.2f}", interval, about))
    plural = "studies" if result["level"] == "study" else "images"
    if test["n"] == 1:
        plural = plural.removesuffix("s").replace("studie", "study")
    about = f"{test['n_abnormal']:,} {classes.positive}; {counted(test['n_patients'], 'patient')}"
    found.append(Tile("Measured on", f"{test['n']:,}", f"test {plural}", about))
    return found


def describe_small_sample(result: ComparisonResult) -> str | None:
    """Return how unsure AUROC is where its interval is wider than `WIDE`, else None."""
    trained = _trained(result)
    if not trained or trained[0]["scores"]["auroc"]["value"] is None:
        return None
    score = trained[0]["scores"]["auroc"]
    patients = counted(result["test"]["n_patients"], "patient")
    if score["low"] is None or score["high"] is None:
        return f"{patients} are too few for an interval of AUROC."
    width = score["high"] - score["low"]
    if width <= WIDE:
        return None
    return (
        f"With {patients}, the 95 % interval of AUROC is {width:.2f} wide: the true value may lie "
        "anywhere in it."
    )


def judge_priors(result: ComparisonResult) -> list[PriorVerdict]:
    """Return the best trained head's comparison with each prior that it was paired with."""
    trained, found = _trained(result), []
    if not trained or trained[0]["scores"]["auroc"]["value"] is None:
        return []
    best, paired = trained[0], {frozenset((pair["a"], pair["b"])) for pair in result["paired"]}
    baselines = [row for row in result["rows"] if row["baseline"]]
    for row in baselines:
        if frozenset((_name(result, best), _name(result, row))) not in paired:
            continue
        p, own, its = _p_holm(result, best, row), _auroc(best), _auroc(row)
        standing: Standing = "untested" if p is None else "undecided"
        if p is not None and p < SIGNIFICANCE and abs(own - its) > ROUNDING:
            standing = "better" if own > its else "worse"
        several = sum(other["head"] == row["head"] for other in baselines) > 1
        title = _PRIORS.get(row["head"], row["head"]) + (f" of {row['run']}" if several else "")
        found.append(PriorVerdict(title, standing, own, its, p))
    return sorted(found, key=lambda verdict: -verdict.prior_auroc)


def write_headline(
    result: ComparisonResult, elsewhere: Mapping[str, Mapping[str, Any]] | None = None
) -> Headline:
    """Return the title and sentences that summarise a comparison.

    Parameters
    ----------
    result : mapping
        A comparison from `compare_runs`.
    elsewhere : mapping of str to mapping, optional
        The `scores.json` of each run that evaluates a model elsewhere, by the name of its rows.
    """
    elsewhere = elsewhere or {}
    sentences = list(_sentences(result, elsewhere))
    if result["synthetic"]:
        sentences.append("The images are synthetic, so this says nothing about medicine.")
    return Headline(_title(result, elsewhere), tuple(sentences))


def _title(result: ComparisonResult, elsewhere: Mapping[str, Any]) -> str:
    trained = _trained(result)
    n_elsewhere = sum(row["run"] in elsewhere for row in trained)
    if elsewhere and n_elsewhere == len(trained):
        models = "does the model" if len(elsewhere) == 1 else "do the models"
        notes = [(own.get("drop") or {}).get("note") for own in elsewhere.values()]
        # a note explains a missing comparison: the images may belong to the model's own test
        return f"How {models} do {'on these images' if all(notes) else 'elsewhere'}?"
    if elsewhere:
        return "Trained here or elsewhere: which head is best?"
    if len(trained) > 1:
        return "Classifying radiographs: which head is best?"
    return f"Classifying radiographs: how good is {trained[0]['head'] if trained else 'a prior'}?"


def _sentences(
    result: ComparisonResult, elsewhere: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    if not result["rows"]:
        yield "No study has a label, so nothing could be scored."
        return
    ranking, test = rank_heads(result), result["test"]
    if ranking is None:
        yield _without_auroc(result)
        return
    drops = [_read_drop(name, own, result) for name, own in elsewhere.items()]
    if len(_trained(result)) == 1 and len(drops) == 1 and result["level"] == "study":
        drop = drops[0]._replace(shown=_best_score(result))
        yield from _describe_one(ranking.best, drop, judge_priors(result))
        return
    if len(_trained(result)) == 1:
        yield f"{ranking.best} has an AUROC of {_best_score(result)}."
        if not drops:
            yield "It is the only trained head."
    elif not ranking.is_tested:
        reason = _trained(result)[0]["scores"]["auroc"].get("reason")
        reason = reason and name_compared_classes(result).reword(reason)
        patients = (
            "1 test patient" if test["n_patients"] == 1 else f"{test['n_patients']:,} test patients"
        )
        yield f"{patients}: heads cannot be compared{f' ({reason})' if reason else ''}."
        leaders = _join((ranking.best, *ranking.equal))
        leaders += " share" if ranking.equal else " has"
        yield f"{leaders} the highest AUROC, {_best_score(result)}."
    else:
        yield from _describe_ranking(result, ranking)
    yield from _describe_priors(ranking.best, judge_priors(result))
    for drop in drops[:MAX_DROPS]:
        yield f"{drop.name}: {drop.values(result['level'])}. {drop.verdict()}"
    if len(drops) > MAX_DROPS:
        yield f"{len(drops) - MAX_DROPS} more models were tried elsewhere, see below."


def _without_auroc(result: ComparisonResult) -> str:
    test, plural = result["test"], "studies" if result["level"] == "study" else "images"
    if not _trained(result):
        return "No head was trained: there are only priors."
    classes = name_compared_classes(result)
    which = {0: classes.negative, test["n"]: classes.positive}
    held = which.get(test["n_abnormal"], "of one class")
    told = f"All {test['n']:,} test {plural} are" if test["n"] != 1 else f"The one test {plural} is"
    if test["n"] == 1:
        told = f"The one test {result['level']} is"
    return f"{told} {held}, so AUROC is not estimable and no head is best."


def _describe_ranking(result: ComparisonResult, ranking: Ranking) -> Iterator[str]:
    """Yield sentences on which head leads, which are worse, and which may be as good."""
    leaders, than = (ranking.best, *ranking.equal), "it"
    if ranking.equal:
        than = ranking.best
        value = f"{_auroc(_trained(result)[0]):.3f}"
        if len(leaders) == len(_trained(result)):
            yield f"{_join(leaders)} have the same AUROC, {value}: none is best."
            return
        yield f"{_join(leaders)} share the highest AUROC, {value}."
    else:
        yield f"{ranking.best} has the highest AUROC, {_best_score(result)}."
    if ranking.worse and not (ranking.undecided or ranking.untested):
        compared = "" if than == "it" else f" than {than}"
        yield f"Every other head is worse{compared}, by the paired test."
        return
    if ranking.undecided:
        yield f"Not distinguishable from {than}: {_join(ranking.undecided)}."
    if ranking.worse:
        yield f"Worse, by the paired test: {_join(ranking.worse)}."
    if ranking.untested:
        yield f"Not tested against {than}: {_join(ranking.untested)}."


def _describe_priors(best: str, verdicts: Sequence[PriorVerdict]) -> Iterator[str]:
    """Yield a sentence on the first prior that no head was shown to be better than, if any."""
    for verdict in verdicts:
        known = f"{verdict.prior} (AUROC {verdict.prior_auroc:.3f})"
        if verdict.standing == "worse":
            yield f"{known[0].upper()}{known[1:]} is better than {best}, by the paired test."
        elif verdict.standing == "untested" and verdict.prior_auroc >= verdict.head_auroc:
            yield f"No head has a higher AUROC than {known}."
        elif verdict.standing == "undecided" and verdict.prior_auroc >= verdict.head_auroc:
            yield f"No head is better than {known}."
        elif verdict.standing == "undecided":
            yield f"{best} is not shown to be better than {known}, p {_p(verdict.p)}."
        else:
            continue
        return


class _Drop(NamedTuple):
    """AUROC of a model on its own test and elsewhere, with the difference's interval."""

    name: str
    internal: float | None
    external: float | None
    difference: float | None
    low: float | None
    high: float | None
    note: str | None
    shown: str | None = None
    """AUROC elsewhere with its interval, if no other value is shown."""

    def values(self, level: str = "study") -> str:
        """Return both values as text, or the one that is known."""
        title = "AUROC" if level == "study" else "AUROC by study"
        place = "on these images" if self.note else "elsewhere"
        if self.external is None:
            return f"{title} {place} is not estimable"
        if self.internal is None:
            return f"{title} {self.shown or f'{self.external:.3f}'} {place}"
        return f"{title} {self.internal:.3f} → {self.external:.3f} elsewhere"

    def verdict(self) -> str:
        """Return a sentence on whether a drop is shown."""
        if self.note:
            return self.note
        if self.difference is None:
            return "Whether it is lower than on the model's own test is not known."
        if self.low is None or self.high is None:
            return "Whether that is a drop is not known: the difference has no interval."
        interval = f"{self.low:+.3f} to {self.high:+.3f}".replace("-", "−")
        if self.high < 0 or self.low > 0:
            kind = "drop" if self.high < 0 else "rise"
            return f"The {kind} of {abs(self.difference):.3f} is shown by its interval, {interval}."
        return f"A drop is not shown: the interval of the difference, {interval}, holds 0."


def _read_drop(name: str, scores: Mapping[str, Any], result: ComparisonResult) -> _Drop:
    rows = [row for row in _trained(result) if row["run"] == name]
    title = _name(result, rows[0]) if rows else name
    drop = scores.get("drop") or {}
    own = drop.get("scores", {}).get("auroc")
    if own is None:
        value = rows[0]["scores"]["auroc"]["value"] if rows else None
        return _Drop(title, None, value, None, None, None, drop.get("note"))
    difference = own["difference"]
    value = difference["difference"] if "difference" in difference else difference["value"]
    ends = (difference["low"], difference["high"])
    return _Drop(title, own["internal"]["value"], own["external"]["value"], value, *ends, None)


def _describe_one(best: str, drop: _Drop, verdicts: Sequence[PriorVerdict]) -> Iterator[str]:
    """Yield sentences on one model's result elsewhere, next to the best paired prior."""
    clause = ""
    for verdict in verdicts:
        known = f"{verdict.prior} ({verdict.prior_auroc:.3f})"
        if verdict.standing == "better":
            clause = clause or f", better than {known}"
        elif verdict.standing == "worse":
            clause = f", worse than {known}"
            break
        elif verdict.prior_auroc >= verdict.head_auroc:
            clause = f", no better than {known}"
            break
        elif verdict.standing == "undecided":
            clause = f", not shown to be better than {known}"
            break
    yield f"{best}: {drop.values()}{clause}."
    yield drop.verdict()


def _trained(result: ComparisonResult) -> list[ComparedHead]:
    return [row for row in result["rows"] if not row["baseline"]]


def _auroc(row: ComparedHead) -> float:
    value = row["scores"]["auroc"]["value"]
    return float("-inf") if value is None else float(value)


def _name(result: ComparisonResult, row: ComparedHead) -> str:
    return row_name(row, several=len(result.get("runs", ())) > 1)


def _best_score(result: ComparisonResult) -> str:
    score = _trained(result)[0]["scores"]["auroc"]
    if score["low"] is None:
        return f"{score['value']:.3f} (no interval)"
    return f"{score['value']:.3f} (95 % interval {score['low']:.3f} to {score['high']:.3f})"


def _p_holm(result: ComparisonResult, a: ComparedHead, b: ComparedHead) -> float | None:
    """Return Holm's p of two rows, or None if they were not tested against each other."""
    wanted = {_name(result, a), _name(result, b)}
    found: Iterable[Any] = (
        pair["p_holm"] for pair in result["paired"] if {pair["a"], pair["b"]} == wanted
    )
    p = next(iter(found), None)
    return None if p is None else float(p)


def _p(p: float | None) -> str:
    text = format_p(p)
    return f"< {text[1:]}" if text.startswith("<") else f"= {text}"


def _join(names: Sequence[str]) -> str:
    """Return names as a list within a sentence."""
    shown = [*names]
    if len(shown) > MAX_NAMES:
        shown = [*shown[: MAX_NAMES - 1], f"{len(shown) - MAX_NAMES + 1} others"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
