"""What a page measured, in a few words: question, data, body regions, test rows and encoder."""

from collections.abc import Iterable, Sequence

from medembed.core.text import counted
from medembed.dataset.build_file import KeptBuild
from medembed.results.alignment import TestSet
from medembed.results.comparison_schema import ComparisonResult
from medembed.results.methods import name_compared_classes
from medembed.results.run_schema import RunInfo
from medembed.results.runs import Run

__all__ = ["describe_measured", "list_measured"]

MAX_REGIONS = 8
"""Body regions that are named; more are counted."""
MAX_NAMED = 3
"""Data sets or encoders that are named; more are counted."""
COMMIT_DIGITS, PRINT_DIGITS = 12, 16


def describe_measured(result: ComparisonResult, test_set: TestSet) -> str:
    """Return the sentence on what the heads tell, and on what that was measured."""
    negative, positive = name_compared_classes(result)
    test = result["test"]
    rows = counted(test["n"], f"test {result['level']}")
    if result["level"] == "study":
        n_images = int(test_set.units["images"].str.count(" ").sum()) + len(test_set.units)
        rows = f"{counted(n_images, 'image')} in {rows}"
    return (
        f"How well heads tell {positive} from {negative}, measured on {rows} "
        f"of {counted(test['n_patients'], 'patient')} held out of training."
    )


def list_measured(runs: Iterable[Run], regions: Iterable[str]) -> dict[str, str]:
    """Return data set, body regions and encoder by their headings, each as far as it is known.

    Parameters
    ----------
    runs : iterable of Run
    regions : iterable of str
        Those of the test rows.
    """
    infos, known = [run.info for run in runs], sorted(set(map(str, regions)))
    named = _join(known) if len(known) <= MAX_REGIONS else f"{len(known):,} body regions"
    found = {
        "Data set": _shorten(map(_name_data, infos), "data sets"),
        "Body regions" if len(known) > 1 else "Body region": named,
        "Encoder": _shorten(map(_name_encoder, infos), "encoders"),
    }
    return {heading: text for heading, text in found.items() if text}


def _name_data(info: RunInfo) -> str:
    """Return what a run's data are called: by its stream or recipe, else by its manifest."""
    named, is_synthetic = _name_build(info.data.build), info.data.synthetic
    if named:
        return f"{named}, synthetic" if is_synthetic else named
    kind, digest = "synthetic images" if is_synthetic else "not named", info.asked.manifest
    if digest:
        return f"{kind}, manifest {digest[:PRINT_DIGITS]}"
    return kind if is_synthetic else ""


def _name_build(build: KeptBuild | None) -> str:
    if build is None:
        return ""
    if build.stream is not None and build.stream.dataset:
        commit = build.stream.commit or build.stream.revision
        return f"{build.stream.dataset}{_revision(commit)}"
    return build.recipe.name or ""


def _name_encoder(info: RunInfo) -> str:
    encoder = info.encoder
    if not encoder.source:
        return ""
    if encoder.revision:
        named = f"{encoder.source}{_revision(encoder.revision)}"
    elif encoder.fingerprint:
        named = f"{encoder.source}, fingerprint {encoder.fingerprint[:PRINT_DIGITS]}"
    else:
        named = encoder.source
    return f"{named}, fine-tuned" if info.kind == "finetune" else named


def _revision(name: str | None) -> str:
    return f", revision {name[:COMMIT_DIGITS]}" if name else ""


def _shorten(names: Iterable[str], plural: str) -> str:
    """Return the names, each once, or how many there are."""
    known = [name for name in dict.fromkeys(names) if name]
    if len(known) > MAX_NAMED:
        return f"{len(known)} {plural}, see What was run"
    return "; ".join(known)


def _join(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
