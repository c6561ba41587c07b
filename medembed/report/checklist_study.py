"""What a checklist is filled in from: the runs of a page, and facts that say where they stand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medembed.results.runs import Run

__all__ = ["Fact", "FindFact", "Study", "entry_of", "join_runs", "tell_each"]


@dataclass(frozen=True)
class Fact:
    """What is known, where it stands, and whether that is all that can be known of it here."""

    text: str
    source: str
    is_whole: bool = True


@dataclass(frozen=True, eq=False)
class Study:
    """What a page is made of.

    Attributes
    ----------
    runs : dict of str to Run
        By the names that the comparison gives them.
    result : mapping
        The comparison.
    elsewhere : mapping
        The `scores.json` of runs that evaluate a model elsewhere, by name.
    """

    runs: Mapping[str, Run]
    result: Mapping[str, Any]
    elsewhere: Mapping[str, Mapping[str, Any]]

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The row of the best trained head."""
        return next((row for row in self.result["rows"] if not row["baseline"]), None)

    @property
    def trained(self) -> dict[str, Run]:
        """Runs that trained something."""
        return {name: run for name, run in self.runs.items() if name not in self.elsewhere}


FindFact = Callable[[Study], Fact | None]
"""Returns what a study tells of a fact, None where nothing was recorded."""


def tell_each(
    runs: Mapping[str, Run], tell: Callable[[Run], str | None], source: str
) -> Fact | None:
    """Tell of each run, once where all say the same; whole where every run tells something."""
    told = {name: tell(run) for name, run in runs.items()}
    known = {name: text for name, text in told.items() if text}
    if not known:
        return None
    texts = dict.fromkeys(known.values())
    if len(texts) == 1 and len(known) == len(told):
        return Fact(next(iter(texts)), source)
    lines = [f"{name}: {text}" for name, text in known.items()]
    lines += [f"{name}: not recorded" for name, text in told.items() if not text]
    return Fact("; ".join(lines), source, len(known) == len(told))


def join_runs(found: Sequence[tuple[str, str]]) -> str:
    """Write what is said of each run, once where all say the same."""
    texts = {text for _, text in found}
    if len(texts) == 1:
        return found[0][1]
    return "; ".join(f"{name}: {text}" for name, text in found)


def entry_of(run: Run, name: str) -> dict[str, Any]:
    """Return a table of `run.json`, empty where there is none."""
    found = run.info.get(name)
    return found if isinstance(found, dict) else {}
