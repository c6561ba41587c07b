"""The image files below a root, each with one name; what was not seen; why names do not match."""

import os
import posixpath
import re
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from medembed.core.errors import RecipeError
from medembed.core.text import normalise
from medembed.dataset.recipes.listing import count_of, first_names, is_unicode, refuse
from medembed.images.stream_files import IMAGE_SUFFIXES

__all__ = ["AS_TEXT", "ImageIndex", "compare_names", "find_shortened", "plain_path"]

PLAIN = re.compile(
    r"[\w-][\w.-]*(?:/[\w-][\w.-]*)*", re.ASCII
)  # most paths; the others take longer


def plain_path(text: str) -> str:
    r"""Return the normalised form in which paths are compared.

    `\` becomes `/`; parts that are empty or `.` are dropped; each part is converted to NFC and
    stripped of blanks. A leading `/` is kept.
    """
    if PLAIN.fullmatch(text):
        return text
    parts = (normalise(part) for part in text.replace("\\", "/").split("/"))
    path = "/".join(part for part in parts if part not in ("", "."))
    return f"/{path}" if text.startswith(("/", "\\")) else path


class ImageIndex:
    """The image files below a root, walked once; hidden files and macOS's doubles are ignored.

    A folder behind a link is entered once if it is within the root, and never otherwise. A file
    that has several names through links counts once, under its own name if that was seen.

    Parameters
    ----------
    root : Path
        The folder, with links resolved.
    below : sequence of str
        Folders of the root to which the search is limited.
    every_file : bool
        Accept any name, as DICOM files need.

    Attributes
    ----------
    paths : set of str
        One name of each file, relative to the root.
    others : dict of str to str
        Further names through links, each with the file's name in `paths`.
    unseen : list of str
        What could not be seen, a warning for each kind.

    Raises
    ------
    RecipeError
        The root cannot be listed, or files' names are not Unicode.
    """

    def __init__(self, root: Path, below: Sequence[str] = (), *, every_file: bool = False) -> None:
        self._root, self._below = root, tuple(map(plain_path, below))
        walk = _Walk(root, every_file)
        walk.run(tuple(map(posixpath.normpath, below)) or (".",))
        self.paths, self.others, self._elsewhere = walk.choose_names()
        self.unseen = walk.warnings()
        names = [*sorted(self.paths), *sorted(self.others)]
        odd = [ascii(name) for name in names if not is_unicode(name)]
        refuse(odd, str(root), "file names that are not valid Unicode; rename the files:")
        self._spelt: dict[str, list[str]] = defaultdict(list)  # only where a spelling differs
        self._named: dict[str, dict[str, None]] = defaultdict(dict)
        self._below_folder: dict[str, list[str]] | None = None  # made where it is asked for
        for name in names:
            path = self.others.get(name, name)
            plain = plain_path(name)
            if plain != name:
                self._spelt[plain].append(path)
            last = posixpath.basename(plain)
            for key in (last, normalise(last.rpartition(".")[0])):
                self._named[key][path] = None

    def find(self, value: str) -> list[str]:
        """Return the files that `value` may mean: one path, or all files of that name or stem."""
        return self.find_path(value) or list(self._named.get(plain_path(value), ()))

    def find_path(self, value: str) -> list[str]:
        """Return the files with the path `value` in any spelling: one, or all that differ in it.

        A file that the walk ignored is found too, because its path was given.
        """
        plain = plain_path(value)
        if own := self._own_name(value):
            return own
        alike = [*self._own_name(plain), *self._spelt.get(plain, ())]
        return list(dict.fromkeys(alike)) or self._passed_by(plain)

    def find_in_folder(self, value: str) -> list[str]:
        """Return the images below the folder whose path or name is `value`."""
        if self._below_folder is None:
            folders: dict[str, dict[str, None]] = defaultdict(dict)
            for path in sorted(self.paths):
                parts = plain_path(path).split("/")[:-1]
                for i, name in enumerate(parts):
                    folders["/".join(parts[: i + 1])][path] = None
                    folders[name][path] = None
            self._below_folder = {name: list(images) for name, images in folders.items()}
        return self._below_folder.get(plain_path(value), [])

    def unlisted(self, images: Iterable[str], source: str) -> list[str]:
        """Return a warning if files are in no row."""
        extra = sorted(self.paths.difference(images))
        if not extra:
            return []
        return [f"{len(extra)} image files are not in {source}, and left out: {first_names(extra)}"]

    def _own_name(self, name: str) -> list[str]:
        name = self.others.get(name, name)
        return [name] if name in self.paths else []

    def _passed_by(self, path: str) -> list[str]:
        is_below = not self._below or any(_is_within(path, folder) for folder in self._below)
        try:
            real = os.path.realpath(self._root / path, strict=True) if path and is_below else ""
        except (OSError, ValueError):  # missing, or not a path at all
            return []
        if not _is_within(real, str(self._root)) or not os.path.isfile(real):
            return []
        return [self._elsewhere.get(real) or os.path.relpath(real, self._root)]


class _Walk:
    """A walk that collects names of files below folders, and of what could not be seen there."""

    def __init__(self, root: Path, every_file: bool) -> None:
        self._root = str(root)
        self._is_wanted = _is_visible if every_file else _is_image
        self._own: set[str] = set()  # files that lie where their name says
        self._linked: dict[str, str] = {}  # other names, and where the files really lie
        self._links: deque[tuple[str, str]] = deque()  # to folders within the root
        self._entered: set[str] = set()  # real folders that were entered through a link
        self._unread: dict[str, tuple[str, str]] = {}  # by where it lies: name and reason
        self._broken: list[str] = []
        self._outside: list[str] = []
        self._missing: list[str] = []

    def run(self, folders: Iterable[str]) -> None:
        for folder in folders:
            self._begin(folder)
        while self._links:
            name, real = self._links.popleft()
            self._walk(name, real)

    def choose_names(self) -> tuple[set[str], dict[str, str], dict[str, str]]:
        """Return one name for each file: its own, or else the first that a link gives it.

        Also return the other names, each with the file's chosen name, and the chosen names that are
        not the file's own, by the file's real path.
        """
        paths, others = set(self._own), {}
        chosen: dict[str, str] = {}
        for name, real in self._linked.items():
            own = os.path.relpath(real, self._root)
            path = own if own in self._own else chosen.setdefault(real, name)
            if path == name:
                paths.add(name)
            else:
                others[name] = path
        return paths, others, chosen

    def warnings(self) -> list[str]:
        """Return a line for each kind of thing that was not seen."""
        unread = [f"{name} ({reason})" for name, reason in self._unread.values()]
        kinds = [
            (self._missing, "folder", "of `below` in [table]", "not below the image root"),
            (unread, "place", "below the image root", "unreadable, and may hold more"),
            (self._outside, "link", "out of the image root", "not followed; give as --image-root a "
             "folder that holds everything, without such links"),
            (self._broken, "link", "to nowhere", "passed by"),
        ]  # fmt: skip
        return [
            f"{count_of(len(names), noun)} {which} {'is' if len(names) == 1 else 'are'} {said}: "
            f"{first_names(names)}"
            for names, noun, which, said in kinds
            if names
        ]

    def _begin(self, folder: str) -> None:
        folder = "" if folder == "." else folder
        place = posixpath.join(self._root, folder) if folder else self._root
        if not os.path.lexists(place):
            self._missing.append(folder)
        elif os.path.realpath(place) != place:
            self._follow(folder, place, "")
        else:
            self._walk(folder, place)

    def _walk(self, top: str, real_top: str) -> None:
        """Collect the files below the folder named `top`, whose real path is `real_top`."""
        is_linked = (posixpath.join(self._root, top) if top else self._root) != real_top
        stack = [(top, real_top)]
        while stack:
            name, real = stack.pop()
            if is_linked and real in self._entered:
                continue
            if is_linked:
                self._entered.add(real)
            inner = []
            for entry in self._entries(name, real):
                path = f"{name}/{entry.name}" if name else entry.name
                if self._take(path, entry, real, is_linked):
                    inner.append((path, entry.path))
            stack.extend(reversed(inner))

    def _entries(self, name: str, real: str) -> list["os.DirEntry[str]"]:
        try:
            with os.scandir(real) as entries:
                visible = [entry for entry in entries if _is_visible(entry.name)]
        except OSError as error:
            if not name:
                raise RecipeError(
                    f"{real} cannot be read: {error.strerror}. Make it readable, or correct "
                    "--image-root."
                ) from error
            self._unread.setdefault(real, (name, error.strerror or type(error).__name__))
            return []
        return sorted(visible, key=lambda entry: entry.name)

    def _take(self, path: str, entry: "os.DirEntry[str]", folder: str, is_linked: bool) -> bool:
        """Note a file or link; return whether the entry is a folder to enter."""
        try:
            if entry.is_symlink():
                self._follow(path, entry.path, folder)
            elif entry.is_dir():
                return entry.name != "__MACOSX"
            elif not self._is_wanted(entry.name):
                return False
            elif not entry.is_file():
                self._unread.setdefault(entry.path, (path, "neither a file nor a folder"))
            elif is_linked:
                self._linked.setdefault(path, entry.path)
            else:
                self._own.add(path)
        except OSError as error:  # file systems without types of entries ask for each
            self._unread.setdefault(entry.path, (path, error.strerror or type(error).__name__))
        return False

    def _follow(self, name: str, place: str, folder: str) -> None:
        """Note where a link leads, from a folder whose real path is `folder`."""
        try:
            real = os.path.realpath(place, strict=True)
            is_folder, is_file = os.path.isdir(real), os.path.isfile(real)
        except FileNotFoundError:
            self._broken.append(name)
        except OSError as error:  # a circle of links, or a folder on the way that is closed
            self._unread.setdefault(place, (name, error.strerror or type(error).__name__))
        else:
            if not is_folder:
                if is_file and self._is_wanted(posixpath.basename(name)):
                    self._linked.setdefault(name, real)
            elif not _is_within(real, self._root):
                self._outside.append(name)
            elif not _is_within(folder, real):  # else it leads back to where it comes from
                self._links.append((name, real))


def _is_within(path: str, folder: str) -> bool:
    return not folder or path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def _is_image(name: str) -> bool:
    return _is_visible(name) and os.path.splitext(normalise(name))[1].lower() in IMAGE_SUFFIXES


SPREADSHEET_DIGITS = 15  # digits of a number that a spreadsheet keeps; others become zeros
LONGEST = 100  # most digits of an identifier that counts as a number
SCIENTIFIC = re.compile(r"(\d)(?:[.,](\d+))?[eE]\+?(\d{1,3})")
AS_TEXT = "Export the table again with this column as text."


def find_shortened(keys: Iterable[str], known: Collection[str]) -> tuple[str, str, str] | None:
    """Return a number of a table that a spreadsheet has shortened.

    Parameters
    ----------
    keys : iterable of str
        The names in the table.
    known : collection of str
        The names that the table should hold.

    Returns
    -------
    (str, str, str) or None
        The name in the table, the original one of `known`, and what the spreadsheet did.
    """
    every = sorted(known)
    zeros = {own.lstrip("0"): own for own in reversed(every) if own.startswith("0")}
    digits = {own[:SPREADSHEET_DIGITS]: own for own in reversed(every) if own.isdecimal()}
    for key in keys:
        bare = key.removesuffix(".0")
        if bare != key and bare in known:
            return key, bare, "a spreadsheet has put .0 after the number"
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
    """Return whether a number in scientific notation is `own`, rounded."""
    if not own.isdecimal() or len(own) > LONGEST:
        return False
    shown, number = int(found[1] + (found[2] or "")), int(own)
    power = int(found[3]) - len(found[2] or "")  # of the last digit that is shown
    shown, number = shown * 10 ** max(power, 0), number * 10 ** max(-power, 0)
    return bool(abs(shown - number) * 100 <= 51 * 10 ** max(power, 0))  # half, and what floats lose


def compare_names(values: Sequence[str], files: Collection[str], root: Path) -> str:
    """Return how a name in a table differs from that of the file it should match.

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
        Sentences with both names, the difference and the way out; "" if no two are alike.
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
    """Return the names that a table may use for a file: its path, name and stem."""
    name = posixpath.basename(path)
    return path, name, name.rpartition(".")[0] or name


def _without_suffix(path: str) -> str:
    stem, suffix = posixpath.splitext(path)
    return (stem if suffix.lower() in IMAGE_SUFFIXES else path).casefold()


def _compare_folders(wanted: dict[str, str], paths: dict[str, str], root: Path) -> str:
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_name[posixpath.basename(path)].append(path)
    for plain, value in wanted.items():
        alike = by_name.get(posixpath.basename(plain))
        if alike is None:
            continue
        parts = plain.split("/")
        inner = ["/".join(parts[i:]) for i in range(1, len(parts))]
        nearest = [own for own in inner if own in paths] or [
            own for own in alike if own.endswith(f"/{plain}")
        ]
        file = (nearest or alike)[0]
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
