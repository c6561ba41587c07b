"""What the entries of `run.json` look like, for whoever reads a run that was damaged or edited."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from medembed.dataset.build_file import is_build
from medembed.evaluation.checks import is_number

__all__ = ["CV_METHOD", "find_wrong_entry"]

CV_METHOD = "inner-split"
"""How cross-validated scores are made: what decides when to stop and what to choose are patients of
the folds that are learnt from. Runs of before say nothing: the scored fold decided."""

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
