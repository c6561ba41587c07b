"""What was counted and how, in words: below tables, on the page and under figures."""

from collections.abc import Iterable, Mapping, Sequence

from medembed.core.text import counted
from medembed.dataset.targets import ClassNames, name_classes
from medembed.results.ablations import describe_repeats
from medembed.results.comparison_schema import ComparedHead, ComparedRun, ComparisonResult
from medembed.results.run_schema import CV_METHOD

__all__ = [
    "DISCLAIMER",
    "OF_SHARES",
    "describe",
    "describe_methods",
    "name_compared_classes",
    "of_score",
]

DISCLAIMER = "Research software; not a medical device."

WORDS = {
    "newcombe": "AUROC by Newcombe's score method with DeLong's variance",
    "wilson": "shares by Wilson with the patients' design effect",
    "clopper-pearson": "those with fewer than five of a kind by Clopper–Pearson",
    "mover": "macro-F1 and κ from the limits of sensitivity, specificity and prevalence (MOVER)",
    "logit-t": "average precision and Brier score by Student's t on the log-odds",
    "bootstrap upper bound": "ECE has only an upper bound, from bootstrap resamples of patients",
}
OF_SHARES = "Wilson or Clopper–Pearson, patients as clusters"
_OF_SCORE = {
    "auroc": "Newcombe's score method, patients as clusters",
    "average_precision": "Student's t on the log-odds, patients as clusters",
}


def name_compared_classes(result: ComparisonResult) -> ClassNames:
    """Return what the classes of a comparison are called, or "negative" and "positive".

    The latter where its runs predict several targets.
    """
    targets = {run.get("target") for run in result.get("runs", ())}
    if len(targets) > 1:
        return ClassNames("negative", "positive")
    return name_classes(next(iter(targets), None))


def describe(result: ComparisonResult) -> list[str]:
    """Return the sentences that belong under every table: what was counted, and how."""
    test, level = result["test"], result["level"]
    classes = name_compared_classes(result)
    notes = [
        f"Test: {counted(test['n'], level)} ({test['n_abnormal']:,} {classes.positive}) of "
        f"{counted(test['n_patients'], 'patient')}.",
        describe_methods(result["rows"]),
        *(classes.reword(own) for own in _describe_absent(result["rows"])),
        "Decisions: Youden's threshold on calibrated out-of-fold predictions of train.",
    ]
    notes += _describe_cv(result["rows"], len(result["runs"]) > 1)
    for run in result["runs"]:
        notes += _describe_losses(run, level, len(result["runs"]) > 1)
    notes += describe_repeats(result["runs"])
    if result["synthetic"]:
        notes.append("Synthetic images: these scores say nothing about medicine.")
    return [*notes, DISCLAIMER]


def _describe_cv(rows: Sequence[ComparedHead], several: bool) -> list[str]:
    """Return sentences on what cross-validated scores rest on, and which are too good."""
    scored = [row for row in rows if row["cv"] is not None]
    older = list(dict.fromkeys(row["run"] for row in scored if row["cv_method"] != CV_METHOD))
    clean = [row for row in scored if row["cv_method"] == CV_METHOD]
    notes = []
    if clean:
        most = max(row["n_tried"] or 1 for row in clean)
        chosen = f", of up to {most:,} configurations a head" if most > 1 else ""
        notes.append(
            "cv: the folds that are scored decided neither when to stop nor what to choose"
            f"{chosen}; patients of the other folds did."
        )
    if older:
        names = f"{', '.join(older)}: " if several else ""
        notes.append(
            f"{names}cv† is too good: in older runs, the folds that are scored decided when to "
            "stop and what to choose. So are the scores that calibration and thresholds rest on."
        )
    if older and clean:
        notes.append("Warning: cv and cv† are not comparable. Sweep the runs marked † again.")
    return notes


def _describe_losses(run: ComparedRun, level: str, several: bool) -> list[str]:
    prefix = f"{run['name']}: " if several else ""
    notes = []
    if run["left_out"] and not run["left_out_of"]:
        notes.append(
            f"{prefix}Left out: {counted(run['left_out'], 'image')} that could not be embedded "
            f"({run['left_out_test']:,} in test)."
        )
    if run["unlabelled"]:
        notes.append(f"{prefix}Not scored: {counted(run['unlabelled'], 'image')} without a label.")
    if run.get("sought_test"):
        notes.append(
            f"{prefix}Warning: {counted(run['sought_test'], 'study')} of test were sought out by a "
            "worklist, so these scores are not those of the data set. Score those that were drawn "
            "at random: compare --by chosen_by --manifest MANIFEST."
        )
    if without := run.get("without_suspects"):
        notes.append(
            f"{prefix}Trained without {without['studies']:,} suspects of train "
            f"({counted(without['images'], 'image')}), whose labels an audit contradicts; test is "
            "as it was."
        )
    notes += [
        f"{prefix}{head} cannot be had: {reason}."
        for head, reason in run.get("lacking", {}).items()
    ]
    if run["dropped"]:
        notes.append(
            f"{prefix}Not compared: {counted(run['dropped'], level)} of test that other runs lack."
        )
    return notes


def describe_methods(rows: Iterable[ComparedHead]) -> str:
    """Return the sentence that names the method of every interval of a comparison's rows."""
    used = {
        score.get("method")
        for row in rows
        for part in (row["scores"], row.get("at_half", {}))
        for score in part.values()
        if isinstance(score, Mapping)
    }
    told = [words for method, words in WORDS.items() if method in used]
    if not told:
        return "No score has an interval."
    return f"Intervals: 95 %, patients as clusters; {'; '.join(told)}."


def _describe_absent(rows: Iterable[ComparedHead]) -> list[str]:
    """Return why trained heads' AUROC has no interval, each reason once."""
    reasons = [
        row["scores"]["auroc"].get("reason") for row in rows if not row.get("baseline", False)
    ]
    told = dict.fromkeys(reason for reason in reasons if reason)
    return [f"No interval of AUROC: {reason}." for reason in told]


def of_score(name: str) -> str:
    """Return the method of the interval of a score under a figure."""
    return _OF_SCORE.get(name, OF_SHARES)
