"""The directory of a sweep of several targets: `targets.json`, and a plain run for each target.

`targets.json` is written before anything is trained. It names the targets, counts their answers,
and says which of them cannot be estimated and why. The directory itself is not a run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from medembed.core.errors import RunError
from medembed.core.files import as_path, describe_error, json_bytes, read_plain, write_atomically
from medembed.core.schema import AnyTable, Count, Field, Record, parse
from medembed.core.text import Summarised, Summary
from medembed.results.run_schema import find_difference
from medembed.results.runs import Run, open_run, refuse_foreign

__all__ = [
    "TARGETS_FILE",
    "TargetEntry",
    "TargetRuns",
    "TargetsFile",
    "create_targets",
    "holds_targets",
    "open_targets",
]

TARGETS_FILE = "targets.json"
FORMAT: Literal["medembed-targets"] = "medembed-targets"
VERSION: Literal[1] = 1
Name = Annotated[str, Field(pattern="^[a-z0-9_]+$")]


class TargetEntry(Record):
    """A target of a sweep: its answers among the manifest's images."""

    name: Name
    positive: Count
    negative: Count
    unknown: Count
    reason: str | None
    """Why it cannot be estimated; null for a target that has a run."""


class TargetsFile(Record):
    """`targets.json`."""

    format: Literal["medembed-targets"] = FORMAT
    version: Literal[1] = VERSION
    command: str
    asked: AnyTable
    """What all targets share, such as folds, seed and manifest."""
    targets: list[TargetEntry]


@dataclass(frozen=True, eq=False, repr=False)
class TargetRuns(Summarised):
    """The runs of one sweep, by target.

    Attributes
    ----------
    path : Path
        The directory that holds them.
    content : TargetsFile
    """

    path: Path
    content: TargetsFile

    @property
    def names(self) -> list[str]:
        """The targets that can be estimated, in the order in which they were asked for."""
        return [entry.name for entry in self.content.targets if entry.reason is None]

    @property
    def not_estimable(self) -> dict[str, str]:
        """The other targets, each with the reason."""
        return {own.name: own.reason for own in self.content.targets if own.reason is not None}

    def run_path(self, name: str) -> Path:
        """Return the run directory of a target."""
        return self.path / name

    def run(self, name: str) -> Run:
        """Return the run of a target.

        Raises
        ------
        RunError
            There is no such target, it cannot be estimated, or its run has not begun.
        """
        if name in self.not_estimable:
            raise RunError(f"target {name} is not estimable: {self.not_estimable[name]}")
        if name not in self.names:
            raise RunError(
                f"{self.path} holds no run of a target {name!r}. Choose among: "
                f"{', '.join(self.names)}."
            )
        if not self.run_path(name).exists():
            raise RunError(
                f"{self.path} has no run of target {name} yet. Finish the sweep with the command "
                f"that began it, with --out {self.path}: {self.content.command}"
            )
        return open_run(self.run_path(name))

    def runs(self) -> dict[str, Run]:
        """Return the runs of all targets that can be estimated."""
        return {name: self.run(name) for name in self.names}

    def as_dict(self) -> dict[str, object]:
        """Return what `medembed sweep --target … --json` prints."""
        return {
            "runs": {name: run.as_dict() for name, run in self.runs().items()},
            "not_estimable": self.not_estimable,
        }

    def summarise(self) -> Summary:
        """Return the targets with the numbers of their images."""
        facts = {
            own.name: f"{own.positive:,} positive, {own.negative:,} negative"
            + ("" if own.reason is None else "; not estimable")
            for own in self.content.targets
        }
        return Summary(f"Runs of {len(facts)} targets in {self.path.resolve().name}", facts)


def holds_targets(path: Path) -> bool:
    """Return whether a directory holds a run per target, and is not a run itself."""
    return (path / TARGETS_FILE).is_file() and not (path / "run.json").exists()


def open_targets(path: "TargetRuns | str | Path") -> TargetRuns:
    """Return the runs of the targets in a directory.

    Raises
    ------
    RunError
        The directory was not written by a sweep of targets, or its `targets.json` is damaged.
    """
    path = path.path if isinstance(path, TargetRuns) else as_path(path, "a directory of targets")
    if not holds_targets(path):
        raise RunError(
            f"{path} does not hold a run per target. `medembed sweep --target a,b` makes such a "
            "directory."
        )
    file = path / TARGETS_FILE
    try:
        document = json.loads(read_plain(file))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} cannot be read: {describe_error(error)}. {_WAY_OUT}") from None
    return TargetRuns(path, parse(TargetsFile, document, RunError, file, _WAY_OUT))


_WAY_OUT = "It was damaged or edited. Restore it, or sweep again into another --out."


def create_targets(
    path: str | Path, asked: Mapping[str, object], targets: Sequence[TargetEntry], command: str
) -> TargetRuns:
    """Write `targets.json`, or return the targets in a directory if they answer an equal question.

    Parameters
    ----------
    path : str or Path
        The directory: absent, empty, or one with the runs of an equal question.
    asked : mapping
        What decides the targets and what they share, as JSON values.
    targets : sequence of TargetEntry
        The targets that were asked for.
    command : str
        The command that repeats the sweep.

    Raises
    ------
    RunError
        The directory is a run, holds something else, or answers another question.
    """
    path = as_path(path, "a directory of targets")
    content = TargetsFile(command=command, asked=dict(asked), targets=list(targets))
    if holds_targets(path):
        found = open_targets(path)
        before, now = (
            {**own.asked, "targets": [entry.name for entry in own.targets]}
            for own in (found.content, content)
        )
        difference = find_difference(before, now)
        if difference is not None:
            raise RunError(
                f"the runs at {path} answer another question: {difference}. Choose another --out, "
                "or repeat the options of that sweep."
            )
        return found
    if (path / "run.json").exists():
        raise RunError(
            f"{path} is a run, and a sweep of targets makes a run for each target below --out. "
            "Choose another --out."
        )
    refuse_foreign(path)
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / TARGETS_FILE, json_bytes(content.model_dump()))
    return TargetRuns(path, content)
