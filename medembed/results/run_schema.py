"""What the files of a run look like, for whoever reads one that was damaged or edited.

`describe_failure` is a ledger's entry for a trial that failed; `is_final` tells whether the trial
would fail again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from medembed.core.text import Summary, counted
from medembed.dataset.build_file import is_build
from medembed.evaluation.scores import is_number

__all__ = [
    "CV_METHOD",
    "PREDICTION_COLUMNS",
    "TRIAL_COLUMNS",
    "check_predictions",
    "describe_failure",
    "find_difference",
    "find_wrong_entry",
    "is_final",
    "summarise_info",
]

_MAX_CHARACTERS = 500
_FINAL = "TrainingDataError"


def describe_failure(error: Exception) -> str:
    """Return the error's type and message, at most 500 characters."""
    return f"{type(error).__name__}: {error}"[:_MAX_CHARACTERS]


def is_final(failure: object) -> bool:
    """Whether a failure as `describe_failure` has it would come again.

    What data or parameters do not allow would fail again; a full memory might not.
    """
    return str(failure).startswith(_FINAL)


CV_METHOD = "inner-split"
"""How cross-validated scores are made: what decides when to stop and what to choose are patients of
the folds that are learnt from. Runs of before say nothing: the scored fold decided."""

TRIAL_COLUMNS = [
    *("trial", "head", "pooling", "params", "fold", "score"),
    *("best_epoch", "seconds", "status", "error", "key"),
]
PREDICTION_COLUMNS = {
    "sha256": pa.string(),
    "patient": pa.int64(),
    "study": pa.int64(),
    "region": pa.string(),
    "label": pa.int8(),
    "split": pa.string(),
    "fold": pa.int16(),
    "head": pa.string(),
    "trial": pa.int32(),
    "probability": pa.float64(),
}
"""Columns of `predictions.parquet`; label, fold and trial may be null, study-level heads leave
sha256 empty, probability lies in [0, 1]."""

NEEDED = ("kind", "asked", "times")
COUNTS = ("images", "studies", "patients", "abnormal", "unlabelled", "left_out", "left_out_test")

_Test = Callable[[Any], bool]


def find_wrong_entry(info: Mapping[str, Any]) -> str | None:
    """Return the first thing that is wrong with a `run.json`, as the end of a sentence, or None.

    Only what a comparison or a page reads is looked at; an entry may be absent unless every run
    has it.
    """
    missing = [name for name in NEEDED if name not in info]
    if missing:
        return f"lacks {', '.join(missing)}"
    return next((f"has {name} = {_shown(value)}" for name, value in _wrong(info)), None)


def check_predictions(table: pa.Table) -> None:
    """Raise ValueError for a value that no run writes."""
    probability, label, fold = (table[name] for name in ("probability", "label", "fold"))
    is_right = {
        "sha256": pc.match_substring_regex(table["sha256"], "^([0-9a-f]{64})?$"),
        "split": pc.is_in(table["split"], pa.array(["train", "test"])),
        "label": pc.is_in(label, pa.array([0, 1, None], pa.int8())),
        "fold": pc.fill_null(pc.greater_equal(fold, 0), True),
        "probability": pc.and_(pc.greater_equal(probability, 0), pc.less_equal(probability, 1)),
        **{name: pc.is_valid(table[name]) for name in ("patient", "study", "region", "head")},
    }
    for name, flags in is_right.items():
        n_wrong = len(table) - (pc.sum(flags).as_py() or 0)
        if n_wrong:
            raise ValueError(f"{n_wrong} of {len(table)} rows have a {name} that no run writes")


def find_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first thing that two questions ask otherwise, as part of a sentence, or None."""
    found = _first_difference(before, now)
    if found is None:
        return None
    name, there, here = found
    return f"{name} was {_short(there)} there and is {_short(here)} here"


def _first_difference(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    for name in [*now, *(name for name in before if name not in now)]:
        a, b = before.get(name), now.get(name)
        if a == b and (name in before) == (name in now):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return _first_difference(a, b, f"{prefix}{name}.")
        return f"{prefix}{name}", a, b
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:12]}…{text[-5:]}"


def summarise_info(name: str, info: Mapping[str, Any], is_complete: bool) -> Summary:
    """Return what kind of run a `run.json` is of, its heads with their scores, and its data."""
    data, metric = info.get("data", {}), info["asked"].get("metric", "score")
    heads = [
        own["head"] if own.get("cv") is None else f"{own['head']} {own['cv']:.3f}"
        for own in info.get("leaderboard", [])
    ]
    counts = [
        counted(data[f"{noun}s"], noun) for noun in ("image", "patient") if f"{noun}s" in data
    ]
    if data.get("synthetic"):
        counts.append("synthetic")
    return Summary(
        f"Run {name}: {info['kind']}, {'complete' if is_complete else 'unfinished'}",
        {
            f"heads, cv {metric}": ", ".join(heads) or "none yet",
            "data": ", ".join(counts) or "not known",
            "encoder": info.get("encoder", {}).get("source") or "not known",
        },
    )


def _wrong(info: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, is_right in _ENTRIES.items():
        if name in info and not is_right(info[name]):
            yield name, info[name]
            return  # what is below it cannot be looked at
    for name in ("asked", "data", "encoder"):
        yield from _wrong_below(name, info.get(name, {}))
    for number, entry in enumerate(info.get("leaderboard", [])):
        if "head" not in entry:
            yield f"leaderboard[{number}]", entry
        yield from _wrong_below("leaderboard", entry, f"[{number}]")


def _wrong_below(
    name: str, entry: Mapping[str, Any], number: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, is_right in _PARTS[name].items():
        if key in entry and not is_right(entry[key]):
            yield f"{name}{number}.{key}", entry[key]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_whole(value: Any) -> bool:
    return type(value) is int and is_number(value)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 < value <= 1


def _or_none(is_right: _Test) -> _Test:
    return lambda value: value is None or is_right(value)


def _list_of(is_right: _Test) -> _Test:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _table_of(is_right: _Test) -> _Test:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


_ENTRIES: dict[str, _Test] = {
    "kind": _is_text,
    "command": _is_text,
    "seed": _or_none(_is_whole),
    "cv_method": _or_none(_is_text),
    "versions": _is_table,
    "asked": _is_table,
    "times": _is_table,
    "data": _is_table,
    "encoder": _is_table,
    "leaderboard": _list_of(_is_table),
    "left_out": _list_of(_is_table),
    "decisions": _table_of(_is_table),
}
_PARTS: dict[str, dict[str, _Test]] = {
    "asked": {"train_fraction": _is_share, "covariates": _list_of(_is_text)},
    "data": {
        **dict.fromkeys(COUNTS, _is_count),
        "splits": _table_of(_is_table),
        "build": _or_none(is_build),
    },
    "encoder": {
        "source": _or_none(_is_text),
        "revision": _or_none(_is_text),
        "preprocessing": lambda value: (
            _is_table(value) and _list_of(_is_whole)(value.get("size", []))
        ),
    },
    "leaderboard": {
        "head": _is_text,
        "params": _or_none(_is_table),
        **dict.fromkeys(("cv", "seconds"), _or_none(is_number)),
        **dict.fromkeys(("trial", "depth", "seed"), _or_none(_is_whole)),
        "n_tried": _or_none(_is_count),
        "cv_method": _or_none(_is_text),
    },
}
