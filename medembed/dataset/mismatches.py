"""How names in a table differ from the names that they should be."""

import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from medembed.dataset.recipes.image_index import SUFFIXES, plain_path

__all__ = ["AS_TEXT", "compare_names", "find_shortened"]

SPREADSHEET_DIGITS = 15  # that a spreadsheet keeps of a number; it puts zeros for the others
LONGEST = 100  # digits of an identifier that is taken for a number
SCIENTIFIC = re.compile(r"(\d)(?:[.,](\d+))?[eE]\+?(\d{1,3})")
AS_TEXT = "Export the table again with this column as text."


def find_shortened(keys: Iterable[str], known: Collection[str]) -> tuple[str, str, str] | None:
    """Find a number of a table that a spreadsheet has shortened.

    Parameters
    ----------
    keys : iterable of str
        What the table holds.
    known : collection of str
        What it should hold.

    Returns
    -------
    (str, str, str) or None
        The key, the one of `known` that it was, and what was done to it.
    """
    every = sorted(known)
    zeros = {own.lstrip("0"): own for own in reversed(every) if own.startswith("0")}
    digits = {own[:SPREADSHEET_DIGITS]: own for own in reversed(every) if own.isdecimal()}
    for key in keys:
        bare = key.removesuffix(".0")
        if bare != key and bare in known:
            return key, bare, "a spreadsheet has put .0 behind the number"
        own = zeros.get(bare.lstrip("0"))
        if own and own != key and bare.isdecimal():
            return key, own, "a spreadsheet has dropped leading zeros"
        own = digits.get(key[:SPREADSHEET_DIGITS])
        is_cut = key.isdecimal() and key[SPREADSHEET_DIGITS:].strip("0") == ""
        if own and is_cut and len(own) == len(key) > SPREADSHEET_DIGITS and own != key:
            return key, own, "a spreadsheet has kept 15 digits of the number"
        found = SCIENTIFIC.fullmatch(key)
        own = found and next((own for own in every if _is_rounded(found, own)), None)
        if own:
            return key, own, "a spreadsheet has rounded the number"
    return None


def _is_rounded(found: "re.Match[str]", own: str) -> bool:
    """Tell whether a number in scientific notation is `own`, rounded."""
    if not own.isdecimal() or len(own) > LONGEST:
        return False
    shown, number = int(found[1] + (found[2] or "")), int(own)
    power = int(found[3]) - len(found[2] or "")  # of the last digit that is shown
    shown, number = shown * 10 ** max(power, 0), number * 10 ** max(-power, 0)
    return bool(abs(shown - number) * 100 <= 51 * 10 ** max(power, 0))  # half, and what floats lose


def compare_names(values: Sequence[str], files: Collection[str], root: Path) -> str:
    """Say how one name of a table differs from the file's that it should be.

    Parameters
    ----------
    values : sequence of str
        Paths, names or stems that no file has.
    files : collection of str
        Paths below `root` that no row has.
    root : Path

    Returns
    -------
    str
        Sentences with both names, the difference and the way out; "" where no two are alike.
    """
    wanted = {plain_path(value): value for value in values if plain_path(value)}
    paths = {plain_path(path): path for path in sorted(files)}
    ways: list[tuple[Callable[[str], str], str]] = [
        (str.casefold, "differ in upper and lower case. Correct the table, or rename the files."),
        (_without_suffix, "differ in the suffix. Correct the table, or leave the suffix out."),
    ]
    for way, said in ways:
        alike = {way(name): path for plain, path in paths.items() for name in _names(plain)}
        for plain, value in wanted.items():
            if path := alike.get(way(plain)):
                return f"{value!r} in the table and the file {path!r} {said}"
    by_stem = {_without_suffix(posixpath.basename(plain)): path for plain, path in paths.items()}
    values_by_stem = {_without_suffix(posixpath.basename(p)): v for p, v in wanted.items()}
    if found := find_shortened(values_by_stem, by_stem):
        value, path = values_by_stem[found[0]], by_stem[found[1]]
        return f"{value!r} in the table is the file {path!r}: {found[2]}. {AS_TEXT}"
    return _compare_folders(wanted, paths, root)


def _names(path: str) -> tuple[str, str, str]:
    """Return what a table may call a file: its path, its name, its stem."""
    name = posixpath.basename(path)
    return path, name, name.rpartition(".")[0] or name


def _without_suffix(path: str) -> str:
    stem, suffix = posixpath.splitext(path)
    return (stem if suffix.lower() in SUFFIXES else path).casefold()


def _compare_folders(wanted: dict[str, str], paths: dict[str, str], root: Path) -> str:
    by_name = {posixpath.basename(plain): plain for plain in paths}
    for plain, value in wanted.items():
        file = by_name.get(posixpath.basename(plain))
        if file is None:
            continue
        said = f"{value!r} in the table and the file {paths[file]!r} differ in their folders."
        front, back = plain.removesuffix(f"/{file}"), file.removesuffix(f"/{plain}")
        if back != file:
            return f"{said} Give --image-root {root / back} instead."
        if front != plain and (above := _above(root, front)):
            return f"{said} Give --image-root {above} instead."
        if front != plain:
            return f"{said} Take {front + '/'!r} off the paths in the table."
        return f"{said} Correct the table, or lay the files out as it says."
    return ""


def _above(root: Path, folders: str) -> Path | None:
    """Return the folder from which `root` is `folders`, if there is one."""
    parts = folders.strip("/").split("/")
    return root.parents[len(parts) - 1] if root.parts[-len(parts) :] == tuple(parts) else None
