"""What a comparison tells of the results that a reporting guideline asks for."""

from collections.abc import Mapping

from medembed.core.text import counted
from medembed.report.checklist_study import Fact, FindFact, Study, join_runs, tell_each
from medembed.results.headline import write_headline
from medembed.results.methods import describe_methods
from medembed.results.tables import format_count, format_interval

__all__ = ["RESULTS"]

_MEASURES = (
    "AUROC, average precision, accuracy, macro-F1, Cohen's kappa, sensitivity, specificity, "
)
_MEASURES += "Brier score, calibration slope and intercept, calibration error (an upper bound)"
_TESTS = "Pairs: DeLong's test over patients by Student's t, with Holm's correction."


def _exclusions(study: Study) -> Fact | None:
    found = []
    for own in study.result["flow"]:
        if own["excluded"] is None:
            continue
        reasons = [f"{entry['images']:,} ({entry['reason']})" for entry in own["excluded"]]
        reasons += [f"{own['not_listed']:,} (not listed)"] if own["not_listed"] else []
        found.append((own["run"], f"images excluded: {', '.join(reasons) if reasons else 'none'}"))
    if not found:
        return None
    is_whole = len(found) == len(study.result["flow"])
    return Fact(join_runs(found), "build file: counts.excluded", is_whole)


def _missing(study: Study) -> Fact | None:
    found = [
        (
            own["run"],
            f"{counted(own['failed'], 'image')} could not be embedded and {own['unlabelled']:,} "
            "had no label; they were neither trained on nor scored",
        )
        for own in study.result["flow"]
        if own["failed"] is not None and own["unlabelled"] is not None
    ]
    if not found:
        return None
    return Fact(join_runs(found), "run.json: data", len(found) == len(study.result["flow"]))


def _metrics(study: Study) -> Fact | None:
    return Fact(_MEASURES, "scores.json")


def _statistics(study: Study) -> Fact | None:
    rows = study.result["rows"]
    text = describe_methods(rows)
    return Fact(f"{text} {_TESTS}" if study.result["paired"] else text, "scores.json: method")


def _groups(study: Study) -> Fact | None:
    best = study.best
    if best is None or len(best["regions"]) < 2:
        return None
    parts = [f"{name} {format_interval(own['auroc'])}" for name, own in best["regions"].items()]
    return Fact(f"AUROC of {_name(study)} by region: {', '.join(parts)}", "scores.json: regions")


def _updating(study: Study) -> Fact | None:
    found = []
    for name, scores in study.elsewhere.items():
        own = scores.get("recalibrated")
        if own:
            found.append((name, f"calibrated anew on {counted(own['n_patients'], 'patient')}"))
    return Fact(join_runs(found), "scores.json: recalibrated") if found else None


def _evaluated(study: Study) -> Fact | None:
    evaluated = {name: study.runs[name] for name in study.elsewhere}
    return tell_each(evaluated, lambda run: run.info.get("command"), "run.json: command")


def _shift(study: Study) -> Fact | None:
    drifts = {
        name: (own.get("drift") or {}).get("sentence") for name, own in study.elsewhere.items()
    }
    found = [(name, sentence) for name, sentence in drifts.items() if sentence]
    return Fact(join_runs(found), "scores.json: drift") if found else None


def _output(study: Study) -> Fact | None:
    best = study.best
    if best is None:
        return None
    text = (
        "a calibrated probability of abnormal (Platt); abnormal from Youden's threshold on, "
        f"{best['threshold']:.3f} for {_name(study)}, both from out-of-fold predictions of train"
    )
    return Fact(text, "scores.json: threshold, calibration")


def _flow(study: Study) -> Fact | None:
    known = [own for own in study.result["flow"] if own["manifest"]["images"] is not None]
    found = []
    for own in known:
        used = own["used"]
        start = "found: not recorded" if own["found"] is None else f"{own['found']:,} images found"
        found.append(
            (
                own["run"],
                f"{start}, {own['manifest']['images']:,} in the manifest, {used['images']:,} used "
                f"({counted(used['studies'], 'study')}, {counted(used['patients'], 'patient')})",
            )
        )
    if not found:
        return None
    is_whole = all(own["found"] is not None for own in study.result["flow"])
    return Fact(join_runs(found), "build file; run.json: data; predictions.parquet", is_whole)


def _characteristics(study: Study) -> Fact | None:
    return _sizes(study)


def _sizes(study: Study) -> Fact | None:
    found = []
    for own in study.result["flow"]:
        parts = [
            f"{part['split']}: {counted(part['used']['patients'], 'patient')}, "
            f"{counted(part['used']['studies'], 'study')}, "
            f"{part['classes']['abnormal']['studies']:,} abnormal"
            for part in own["splits"]
        ]
        found += [(own["run"], "; ".join(parts))] if parts else []
    return Fact(join_runs(found), "predictions.parquet") if found else None


def _internal(study: Study) -> Fact | None:
    if not study.trained:
        return None
    test = study.result["test"]
    text = (
        f"{counted(test['n'], study.result['level'])} of test ({test['n_abnormal']:,} abnormal) of "
        f"{counted(test['n_patients'], 'patient')}"
    )
    return Fact(text, "scores.json: test")


def _external(study: Study) -> Fact | None:
    if not study.elsewhere:
        return None
    # a note says that nothing was compared, as where the images are of the model's own test
    is_whole = not any((own.get("drop") or {}).get("note") for own in study.elsewhere.values())
    text = write_headline(study.result, study.elsewhere).text
    return Fact(text, "scores.json: drop", is_whole)


def _performance(study: Study) -> Fact | None:
    return _scores(study, {"auroc": "AUROC", "average_precision": "average precision",
                           "macro_f1": "macro-F1", "brier": "Brier score"})  # fmt: skip


def _accuracy(study: Study) -> Fact | None:
    return _scores(study, {name: name for name in ("sensitivity", "specificity", "accuracy")})


def _scores(study: Study, titles: Mapping[str, str]) -> Fact | None:
    best = study.best
    if best is None:
        return None
    scores = {title: best["scores"][name] for name, title in titles.items()}
    parts = [f"{title} {format_count(own)}" for title, own in scores.items()]
    is_whole = all(own["low"] is not None for own in scores.values())
    return Fact(f"{_name(study)}: {', '.join(parts)}", "scores.json", is_whole)


def _mistakes(study: Study) -> Fact | None:
    best = study.best
    if best is None:
        return None
    own = best["confusion"]
    text = f"{_name(study)}: {own['fp']:,} normal called abnormal, {own['fn']:,} abnormal called "
    return Fact(f"{text}normal; the page shows the most confident", "scores.json: confusion")


def _name(study: Study) -> str:
    best = study.best or {}
    return f"{best.get('run')}/{best.get('head')}" if len(study.runs) > 1 else str(best.get("head"))


RESULTS: dict[str, FindFact] = {
    "accuracy": _accuracy,
    "characteristics": _characteristics,
    "evaluated": _evaluated,
    "exclusions": _exclusions,
    "external": _external,
    "flow": _flow,
    "groups": _groups,
    "internal": _internal,
    "metrics": _metrics,
    "missing": _missing,
    "mistakes": _mistakes,
    "output": _output,
    "performance": _performance,
    "shift": _shift,
    "sizes": _sizes,
    "statistics": _statistics,
    "updating": _updating,
}
