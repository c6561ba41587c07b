"""Propose a recipe for a tree of folders: which level is the label, the split, the patient."""

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medembed.core.errors import RecipeError
from medembed.core.text import counted, normalise
from medembed.dataset.recipes.choices import Choices, Proposal, UndecidedError, make_proposal
from medembed.dataset.recipes.guesses import (
    Meanings,
    are_regions,
    are_splits,
    guess_meanings,
    map_splits,
)
from medembed.dataset.recipes.image_index import ImageIndex, plain_path
from medembed.dataset.recipes.label_proposals import (
    MAX_CLASSES,
    settle_meanings,
    show_counts,
    show_values,
)
from medembed.dataset.recipes.readers import compile_pattern
from medembed.dataset.recipes.table_proposals import NO_PATIENTS, ONE_REGION, draw_split

__all__ = ["propose_folders"]

_PATIENT = re.compile(r"(?:patient|pat|pid|subject|subj|sub|person|p|case|mrn)[-_ ]?\d+", re.I)
_STUDY = re.compile(r"(?:study|exam|visit|ses|session|st|accession)[-_ ]?\d+", re.I)
_PATTERN_SIGNS = re.compile(r"[{}*]")
_NUMBERED = re.compile(r"(.*\d.*)[-_ .]\d+")  # 00001280_004: perhaps a patient's film


@dataclass
class _Levels:
    """The role of each level of a tree of folders, from the root down."""

    values: list[Counter[str]]
    roles: dict[int, str] = field(default_factory=dict)
    meanings: Meanings | None = None

    def of(self, role: str) -> Counter[str]:
        """Return the folders of a role and their image counts; empty if no level has that role."""
        return next((self.values[i] for i, own in self.roles.items() if own == role), Counter())


def propose_folders(root: Path, choices: Choices, *, name: str = "") -> Proposal:
    """Return a proposed recipe for images in folders that are named after their classes.

    Parameters
    ----------
    root : Path
        The folder, with links resolved.
    choices : Choices
        Only `normal`, `abnormal`, `pattern`, `test_fraction` and `seed` are used.
    name : str
        Name of the recipe; by default the root's.

    Raises
    ------
    UndecidedError
        The folders' names do not say what is abnormal.
    RecipeError
        There are no images, or no folders that separate them.
    """
    index = ImageIndex(root)
    if not index.paths:
        raise RecipeError(
            f"no image below {root}, such as .png, .jpg, .tif or .dcm.{_unseen(index)} Name the "
            "folder that holds them."
        )
    paths = [plain_path(path) for path in sorted(index.paths)]
    pattern = choices.pattern
    levels = _Levels([])
    if pattern is None:
        levels = _find_levels(paths, choices, root)
        pattern = _write_pattern(levels, paths)
    fields = re.findall(r"\{(\w+)\}", pattern)
    meanings = levels.meanings
    if meanings is None and "label" in fields:
        counts = _count_labels(pattern, paths, root)
        meanings = settle_meanings(
            list(counts), choices, f"the pattern's {{label}} in {root}", counts
        )
    settled = {"pattern": pattern}
    warnings: list[str] = []
    sections: dict[str, Any] = {"folders": {"pattern": pattern}}
    comments = {"folders": "What each part of a path means; `*` is any name, `**/` any folders."}
    if "region" not in fields:
        sections["region"] = {"constant": ONE_REGION}
        settled["region"] = f"one, {ONE_REGION!r}"
    if meanings is not None:
        sections["label"] = {"normal": list(meanings.normal), "abnormal": list(meanings.abnormal)}
        if meanings.unknown:
            sections["label"]["others"] = "unknown"
        comments["label"] = "What the folders mean."
        settled["normal"] = show_values(meanings.normal)
        settled["abnormal"] = show_values(meanings.abnormal)
    if "patient" not in fields:
        sections["groups"] = {"rule": "image"}
        comments["groups"] = "No folder identifies the patient: each image counts as one."
        settled["patient"] = "each image"
        warnings.append(
            f"{NO_PATIENTS.format('image', 'two films')}{_suggest_patients(paths, pattern)}"
        )
    names = {}
    if "split" in fields:
        splits = levels.of("split")
        names = {} if set(splits) <= {"train", "test"} else map_splits(splits)
        settled["split"] = ", ".join(f"{k} is {v}" for k, v in names.items()) or "train, test"
    else:
        n_images = len(paths)
        rarest = min(_of_class(levels, meanings)) if meanings and levels.values else 0
        sections["split"] = draw_split(choices, n_images, rarest)
        comments["split"] = "Drawn by patient, stratified by label and region."
        settled["test"] = f"{sections['split']['fraction']:g} of the images, drawn"
    document = {
        "name": name or normalise(root.name) or "mine",
        "layout": "folders",
        "label_level": _find_level(pattern, fields, paths),
        **({"split_names": names} if names else {}),
        **sections,
    }
    return make_proposal(
        document, root, comments=comments, settled=settled, warnings=warnings, notices=[]
    )


def _unseen(index: ImageIndex) -> str:
    return "".join(f" {warning}." for warning in index.unseen)


def _find_levels(paths: Sequence[str], choices: Choices, root: Path) -> _Levels:
    folders = [path.split("/")[:-1] for path in paths]
    deepest = max(map(len, folders))
    # A level counts where nearly all images lie below it; a few strays at the top do not matter.
    depth = next(d for d in range(deepest, -1, -1) if _share(folders, d) >= 0.9 or d == 0)
    levels = _Levels([Counter(f[i] for f in folders if len(f) > i) for i in range(depth)])
    roles, chosen = levels.roles, {*(choices.normal or ()), *(choices.abnormal or ())}
    for i, counts in enumerate(levels.values):
        role = _guess_role(counts, chosen, roles.values())
        if role:
            roles[i] = role
    if "label" not in roles.values():
        few = [i for i, counts in enumerate(levels.values)
               if i not in roles and 1 < len(counts) <= MAX_CLASSES]  # fmt: skip
        if not few:
            raise RecipeError(_describe_flat(levels, paths, root, chosen))
        roles[few[0]] = "label"
    at = next(i for i, role in roles.items() if role == "label")
    above = "/".join("*" * (i in roles) or next(iter(levels.values[i])) for i in range(at))
    where = f"{root / above if above else root}"
    try:
        levels.meanings = settle_meanings(
            list(levels.values[at]), choices, f"the folder {where}", dict(levels.values[at])
        )
    except UndecidedError as error:
        raise UndecidedError(
            f"the folders' names do not say what is abnormal: {where} holds "
            f"{show_counts(dict(levels.values[at]))}. Name what is abnormal with --abnormal, once "
            "for each folder; all others are normal then.",
            "abnormal",
            "Which folders hold abnormal images?",
            tuple(levels.values[at]),
        ) from error
    return levels


def _share(folders: Sequence[Sequence[str]], depth: int) -> float:
    return sum(len(own) >= depth for own in folders) / len(folders)


def _guess_role(counts: Counter[str], chosen: set[str], others: Iterable[str]) -> str:
    values, found = list(counts), set(others)
    if "split" not in found and are_splits(values):
        return "split"
    is_label = bool(chosen & set(values)) if chosen else guess_meanings(values) is not None
    if "label" not in found and len(values) <= MAX_CLASSES and is_label:
        return "label"
    if "region" not in found and len(values) > 1 and are_regions(values):
        return "region"
    if "patient" not in found and len(values) > 1 and all(map(_PATIENT.fullmatch, values)):
        return "patient"
    if "patient" in found and "study" not in found and all(map(_STUDY.fullmatch, values)):
        return "study"
    return ""


def _describe_flat(levels: _Levels, paths: Sequence[str], root: Path, chosen: Iterable[str]) -> str:
    """Return why no level of folders can be the label."""
    names = [name for counts in levels.values for name in counts]
    if missing := sorted(set(chosen).difference(names)):
        listed = show_values([repr(name) for name in names], 12)
        return (
            f"{root} has no folder {missing[0]!r}; it has {listed}. Correct --abnormal or --normal."
        )
    there = counted(len(paths), "image")
    if not names:
        return (
            f"{root} holds {there}, such as {paths[0]!r}, and no folder for each class. Put them "
            "into a folder per class, or give a table of their labels in place of the folder "
            "(`manifest build --from-table FILE`)."
        )
    listed = "; ".join(show_counts(dict(counts), 8) for counts in levels.values)
    return (
        f"the folders of {root} are not classes of images: {listed}. Describe its paths with "
        "--pattern, as in '{label}/*' or '{split}/{label}/{patient}_*', or give a table of labels "
        "in place of the folder (`manifest build --from-table FILE`)."
    )


def _write_pattern(levels: _Levels, paths: Sequence[str]) -> str:
    parts = []
    for i, counts in enumerate(levels.values):
        only = next(iter(counts))
        is_fixed = len(counts) == 1 and not _PATTERN_SIGNS.search(only)
        role = levels.roles.get(i)
        parts.append(f"{{{role}}}" if role else only if is_fixed else "*")
    is_deeper = any(path.count("/") > len(parts) for path in paths)
    return "/".join([*parts, "**/*" if is_deeper else "*"])


def _count_labels(pattern: str, paths: Sequence[str], root: Path) -> dict[str, int]:
    """Return counts of the labels that a given pattern finds."""
    matcher = compile_pattern(normalise(pattern), Path("--pattern"))
    found = [match for path in paths if (match := matcher.fullmatch(path))]
    if not found:
        raise RecipeError(
            f"no image below {root} fits the pattern {pattern!r}; the first of {len(paths):,} is "
            f"{paths[0]}. Correct --pattern."
        )
    return dict(Counter(match["label"] for match in found))


def _find_level(pattern: str, fields: Sequence[str], paths: Sequence[str]) -> str:
    """Return the label's level: the study, unless views of one study have different labels."""
    if "study" not in fields:
        return "image"
    if "label" not in fields:
        return "study"
    matcher = compile_pattern(normalise(pattern), Path("--pattern"))
    parts = [name for name in ("region", "patient", "study") if name in fields]
    labels: dict[tuple[str, ...], str] = {}
    for match in filter(None, map(matcher.fullmatch, paths)):
        if labels.setdefault(match.group(*parts, "study")[:-1], match["label"]) != match["label"]:
            return "image"
    return "study"


def _of_class(levels: _Levels, meanings: Meanings) -> tuple[int, int]:
    counts = levels.of("label")
    return (
        sum(counts[name] for name in meanings.normal),
        sum(counts[name] for name in meanings.abnormal),
    )


def _suggest_patients(paths: Sequence[str], pattern: str) -> str:
    """Return a hint at patients in the names of files, if several names share a beginning."""
    stems = [posixpath.splitext(posixpath.basename(path))[0] for path in paths]
    firsts = Counter(match[1] for stem in stems if (match := _NUMBERED.fullmatch(stem)))
    shared = sum(n for n in firsts.values() if n > 1)
    if len(firsts) < 2 or shared < len(paths) // 5:
        return ""
    example, _ = firsts.most_common(1)[0]
    stem = next(stem for stem in stems if stem.startswith(example))
    folder = pattern.rpartition("/")[0]
    separator = stem[len(example)]
    return (
        f". If {example!r} in {stem!r} is a patient, add --pattern "
        f"'{f'{folder}/' if folder else ''}{{patient}}{separator}*'"
    )
