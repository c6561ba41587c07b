"""The image files below a root, each under one name, and what of the root was not seen."""

import os
import posixpath
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from medembed.core.errors import RecipeError
from medembed.core.text import normalise
from medembed.dataset.recipes.listing import count_of, first_names, is_unicode, refuse

__all__ = ["SUFFIXES", "ImageIndex", "plain_path"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".dcm", ".dicom"}

PLAIN = re.compile(
    r"[\w-][\w.-]*(?:/[\w-][\w.-]*)*", re.ASCII
)  # most paths; the others take longer


def plain_path(text: str) -> str:
    r"""Return the spelling that two paths are compared by.

    `\` becomes `/`; parts that are empty or `.` go; each part is brought to NFC and loses the
    blanks around it. A path that begins with `/` still does.
    """
    if PLAIN.fullmatch(text):
        return text
    parts = (normalise(part) for part in text.replace("\\", "/").split("/"))
    path = "/".join(part for part in parts if part not in ("", "."))
    return f"/{path}" if text.startswith(("/", "\\")) else path


class ImageIndex:
    """The image files below a root, walked once; hidden files and macOS's doubles are passed by.

    A folder behind a link is entered once where it lies within the root, and never otherwise. A
    file that has several names through links counts once, under its own name where that was seen.

    Parameters
    ----------
    root : Path
        With links resolved.
    below : sequence of str
        Folders of the root to which the search is limited.
    every_file : bool
        Names do not matter: DICOM files have any.

    Attributes
    ----------
    paths : set of str
        One name of each file, relative to the root.
    others : dict of str to str
        Further names through links, each to that of `paths`.
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
        """Return the files whose path `value` is, in any spelling: one, or those that differ in it.

        A file that the walk has passed by is found all the same: it is asked for by its path.
        """
        plain = plain_path(value)
        if own := self._own_name(value):
            return own
        alike = [*self._own_name(plain), *self._spelt.get(plain, ())]
        return list(dict.fromkeys(alike)) or self._passed_by(plain)

    def unlisted(self, images: Iterable[str], source: str) -> list[str]:
        """Return a warning where files are in no row."""
        extra = sorted(self.paths.difference(images))
        if not extra:
            return []
        return [f"{len(extra)} image files are not in {source} and were left: {first_names(extra)}"]

    def _own_name(self, name: str) -> list[str]:
        name = self.others.get(name, name)
        return [name] if name in self.paths else []

    def _passed_by(self, path: str) -> list[str]:
        is_below = not self._below or any(_is_within(path, folder) for folder in self._below)
        try:
            real = os.path.realpath(self._root / path, strict=True) if path and is_below else ""
        except (OSError, ValueError):  # not there, or no path at all
            return []
        if not _is_within(real, str(self._root)) or not os.path.isfile(real):
            return []
        return [self._elsewhere.get(real) or os.path.relpath(real, self._root)]


class _Walk:
    """Names of files below folders, and of what could not be seen there."""

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
        """Give each file one name: its own, or else the first that a link gives it.

        Returns all these names, the others with that of the same file, and the names that are
        not the file's own by where it lies.
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
        """Say what was not seen, a line for each kind."""
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
        """Take the files below a folder that `top` names and that lies at `real_top`."""
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
        """Note a file or link; tell whether it is a folder to be entered."""
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
        """Note where a link leads, from a folder that itself lies at `folder`."""
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
    return _is_visible(name) and os.path.splitext(normalise(name))[1].lower() in SUFFIXES
