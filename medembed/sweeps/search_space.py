"""The search space of a sweep: which values of which parameters each head tries, read from a file.

A file has one table per head, in TOML:

    [mlp]
    configs = 32                                # how many a sweep tries; 8 where it does not say
    rungs = [2, 4, 8]                           # mlp alone; none where it does not say
    hidden = [[], [128], [256, 128]]            # a list: choices, equally likely
    lr = { low = 1e-4, high = 5e-3, log = true }  # a range; uniform without log
    precision = "auto"                          # anything else: a constant

    [[mlp.first]]                               # tried first, in this order
    hidden = [512]

After the epochs named by `rungs` the weaker half of a cohort is retired. A flat list for `hidden`
is one constant, `[]` too. A range whose `low` and `high` are integers holds integers; other values
are drawn to three significant digits. `class_weight = "none"` stands for None. Where one list is
all that varies, it is tried in the order listed; else values are drawn at random, which covers more
of each parameter than a grid of the same size (Bergstra and Bengio, JMLR 13, 2012).
"""

import copy
import json
import math
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from medembed.core.errors import PathNotFoundError, TrainingDataError
from medembed.core.files import describe_error, read_plain
from medembed.heads.registry import head_class, known_heads, nearest

__all__ = ["HeadSpace", "Range", "default_spaces", "read_spaces"]

_DEFAULT_FILE = "default_space.toml"
_MAX_BYTES = 1 << 20
_N_CONFIGS = 8

#: Parameters that a sweep sets itself.
_SET_BY_SWEEP = ("n_cells", "n_covariates", "n_jobs", "random_state")

#: Redraws of one configuration before the rest of a finite space is gone through in order.
_ATTEMPTS = 100

#: Larger whole numbers are not exact as float64.
_LARGEST = 2**53

_RANGE_EXAMPLE = "{ low = 0.001, high = 0.1, log = true }"
_NOUNS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes
    ----------
    low, high : both int or both float
        The values are of the same type.
    log : bool
        Whether the logarithm is uniform instead of the value.
    """

    low: float
    high: float
    log: bool = False

    def draw(self, generator: np.random.Generator) -> float:
        """Return a value: a whole number, or one of three significant digits or a bound."""
        share, is_whole = generator.random(), isinstance(self.low, int)
        low, high = self.low, self.high + is_whole
        if self.log:
            value = math.exp(math.log(low) * (1 - share) + math.log(high) * share)
        else:
            value = low * (1 - share) + high * share
        value = math.floor(value) if is_whole else float(f"{value:.3g}")
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class HeadSpace:
    """What a sweep tries of one head.

    Attributes
    ----------
    head : str
        One of `known_heads`.
    n_configs : int
        Configurations that a sweep tries unless it is told a number.
    rungs : tuple of int
        Epochs after which the weaker half of a cohort is retired, rising; empty for none.
    constants : dict
        Parameters with one value.
    varying : dict
        Parameters with several: a tuple of choices, equally likely, or a `Range`.
    first : tuple of dict
        Parameters of the configurations tried first; the constants come under them.
    """

    head: str
    n_configs: int
    rungs: tuple[int, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    varying: Mapping[str, "tuple[Any, ...] | Range"] = field(default_factory=dict)
    first: tuple[Mapping[str, Any], ...] = ()

    def draw(self, n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """Return up to `n` sets of parameters, `n_configs` by default, ready for JSON.

        They differ from each other, with the head's defaults filled in. A longer list begins with
        the shorter one of the same seed. The list ends early where the space does.

        Raises
        ------
        TrainingDataError
            Fewer than one is asked for.
        """
        n = self.n_configs if n is None else n
        if n < 1:
            raise TrainingDataError(
                f"{n} configurations of {self.head} asked for; ask for 1 or more"
            )
        defaults = _parameters(self.head)
        found: dict[str, dict[str, Any]] = {}
        for params in self._listed():
            found.setdefault(_identity(defaults, params), params)
        while len(found) < n and (new := self._next(seed, found, defaults)) is not None:
            found[_identity(defaults, new)] = new
        return copy.deepcopy(list(found.values())[:n])

    def _listed(self) -> list[dict[str, Any]]:
        listed = [{**self.constants, **params} for params in self.first]
        if len(self.varying) == 1:
            [(name, values)] = self.varying.items()
            if isinstance(values, tuple):
                listed += [{**self.constants, name: value} for value in values]
        return listed

    def _next(
        self, seed: int, found: Collection[str], defaults: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Return parameters not found yet, None where there are none."""
        names = sorted(self.varying)  # so that the order of the file's lines is no matter
        for attempt in range(_ATTEMPTS):
            generator = np.random.default_rng([seed, len(found), attempt])
            drawn = {name: _draw_value(self.varying[name], generator) for name in names}
            params = {**self.constants, **drawn}
            if _identity(defaults, params) not in found:
                return params
        # few are left: one of the first len(found) + 1 is new; an endless range is not gone through
        pools = {name: _all_values(self.varying[name], len(found) + 1) for name in names}
        for values in product(*pools.values()):
            params = {**self.constants, **dict(zip(names, values, strict=True))}
            if _identity(defaults, params) not in found:
                return params
        return None


def default_spaces() -> dict[str, HeadSpace]:
    """Return the space of every head that is tried where no file is given.

    Of heads that an installed package adds that is one configuration: their defaults.
    """
    text = (resources.files("medembed.sweeps") / _DEFAULT_FILE).read_text(encoding="utf-8")
    added = {head: HeadSpace(head, 1) for head in known_heads()}
    return {**added, **_parse(text, _DEFAULT_FILE)}


def read_spaces(path: str | Path) -> dict[str, HeadSpace]:
    """Return every head's space: as the file says where it has the head's table, else the default.

    Raises
    ------
    PathNotFoundError
        There is no such file.
    TrainingDataError
        It cannot be read, is not TOML, or breaks a rule of the format.
    """
    try:
        text = read_plain(path, max_bytes=_MAX_BYTES).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise PathNotFoundError(
            f"there is no file {path} with a search space; name a TOML file, or leave it out for "
            "the default space"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingDataError(
            f"{path} cannot be read as a search space: {describe_error(error)}; it must be a "
            "readable TOML file in UTF-8"
        ) from error
    named = _parse(text, str(path))
    return named if set(named) == set(known_heads()) else {**default_spaces(), **named}


def _parse(text: str, file: str) -> dict[str, HeadSpace]:
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrainingDataError(f"{file} is not TOML: {error}; correct that place") from error
    spaces = {}
    for head, table in document.items():
        if head not in known_heads():
            known = nearest(head, list(known_heads()))
            raise TrainingDataError(f"{file}: unknown head [{head}]; {known}")
        if not isinstance(table, dict):
            raise TrainingDataError(
                f"{file}: {head} = {table!r} is not a table; begin one with the line [{head}]"
            )
        spaces[head] = _Table(file, head, _parameters(head), head).read(table)
    return spaces


@dataclass(frozen=True)
class _Table:
    """The reader of one head's table, or of one of its tables `first`, which is called `name`."""

    file: str
    head: str
    defaults: Mapping[str, Any]
    name: str

    def read(self, table: Mapping[str, Any]) -> HeadSpace:
        has_rungs = head_class(self.head).has_rungs
        own = ("configs", "first", "rungs") if has_rungs else ("configs", "first")
        if "rungs" in table and not has_rungs:
            able = ", ".join(name for name in known_heads() if head_class(name).has_rungs)
            self._refuse("rungs", table["rungs"], f"is for {able} alone", "delete the line")
        constants: dict[str, Any] = {}
        varying: dict[str, tuple[Any, ...] | Range] = {}
        for key, value in table.items():
            if key in own:
                continue
            self._check_key(key, value, own)
            read = self._values(key, value)
            if isinstance(read, tuple) and len(read) == 1:
                constants[key] = read[0]
                continue
            varying[key] = read
            if key in head_class(self.head).shared_params:
                problem = "holds several values, but all members of a cohort share each batch"
                self._refuse(key, value, problem, "give one value")
        return HeadSpace(
            head=self.head,
            n_configs=self._n_configs(table.get("configs", _N_CONFIGS)),
            rungs=self._rungs(table.get("rungs", [])),
            constants=constants,
            varying=varying,
            first=self._first(table.get("first", [])),
        )

    def _refuse(self, key: str, value: Any, problem: str, way_out: str) -> NoReturn:
        raise TrainingDataError(
            f"{self.file}, [{self.name}]: {key} = {value!r} {problem}; {way_out}"
        )

    def _check_key(self, key: str, value: Any, own: Sequence[str] = ()) -> None:
        if key in _SET_BY_SWEEP:
            self._refuse(key, value, "is set by the sweep itself", "delete the line")
        if key not in self.defaults:
            hint = nearest(key, sorted([*self.defaults, *own]))
            self._refuse(key, value, f"is no parameter of {self.head}", hint)

    def _n_configs(self, value: Any) -> int:
        if not _is_whole(value) or value < 1:
            self._refuse("configs", value, "is no whole number from 1", "write configs = 8")
        return int(value)

    def _rungs(self, value: Any) -> tuple[int, ...]:
        is_right = isinstance(value, list) and all(_is_whole(n) and n >= 1 for n in value)
        if not is_right or any(a >= b for a, b in pairwise(value)):
            way_out = "write rungs = [2, 4, 8], or [] for none"
            self._refuse("rungs", value, "is no list of rising whole numbers from 1", way_out)
        return tuple(value)

    def _first(self, tables: Any) -> tuple[dict[str, Any], ...]:
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            way_out = f"begin each configuration with the line [[{self.head}.first]]"
            self._refuse("first", tables, "is no list of tables", way_out)
        inner = replace(self, name=f"{self.head}.first")
        for key, value in (line for table in tables for line in table.items()):
            inner._check_key(key, value)
            if key in head_class(self.head).shared_params:
                problem = "is shared by all members of a cohort"
                inner._refuse(key, value, problem, f"move the line to [{self.head}]")
        return tuple({k: inner._constant(k, v) for k, v in table.items()} for table in tables)

    def _values(self, key: str, value: Any) -> tuple[Any, ...] | Range:
        """Return choices, of which a constant has one, or a range."""
        if isinstance(value, dict):
            return self._range(key, value)
        is_sequence = isinstance(self.defaults[key], tuple | list)
        if not isinstance(value, list) or (
            is_sequence and not any(isinstance(item, list) for item in value)
        ):
            return (self._constant(key, value),)
        if not value:
            self._refuse(key, value, "is empty", "list values to try, or delete the line")
        choices = [self._constant(key, item) for item in value]
        for position, choice in enumerate(choices):
            if choice in choices[:position]:
                self._refuse(key, value, f"lists {choice!r} twice", "list each value once")
        return tuple(choices)

    def _range(self, key: str, value: dict[str, Any]) -> tuple[Any, ...] | Range:
        if key == "class_weight" or isinstance(self.defaults[key], str | bool | tuple | list):
            self._refuse(key, value, "is a range, but takes no numbers", "list the values to try")
        for name in value:
            if name not in ("low", "high", "log"):
                hint = nearest(name, ["high", "log", "low"])
                self._refuse(key, value, f"has {name!r}, which ranges do not have", hint)
        missing = [name for name in ("low", "high") if name not in value]
        if missing:
            problem = f"is a range without {' and '.join(missing)}"
            self._refuse(key, value, problem, f"write {key} = {_RANGE_EXAMPLE}")
        low, high = (self._constant(f"{key}.{name}", value[name]) for name in ("low", "high"))
        log = value.get("log", False)
        if not isinstance(log, bool):
            self._refuse(f"{key}.log", log, "is neither true nor false", "write log = true")
        if low > high:
            self._refuse(key, value, "has low above high", "exchange them")
        if log and low <= 0:
            self._refuse(key, value, "has a logarithm of low", "raise low above 0, or drop log")
        if low == high:
            return (low,)
        if not (_is_whole(low) and _is_whole(high)):
            low, high = float(low), float(high)
        return Range(low, high, log)

    def _constant(self, key: str, value: Any) -> Any:
        """Return one value of `key` (of "lr.low" also), once it is of the default's kind."""
        default = self.defaults[key.partition(".")[0]]
        if key == "class_weight":
            if value not in ("balanced", "none"):
                self._refuse(key, value, "is unknown", 'known are "balanced" and "none"')
            return None if value == "none" else value
        if isinstance(default, tuple | list):
            if not isinstance(value, list) or not all(_is_whole(item) for item in value):
                problem = "is no list of whole numbers, nor does it list only such lists"
                self._refuse(key, value, problem, f"write {key} = {list(default)}")
            return list(value)
        kind = type(default) if type(default) in _NOUNS else float
        if not (_is_number(value) if kind is float else type(value) is kind):
            known = "" if default is None else f" like the default, {json.dumps(default)}"
            self._refuse(key, value, f"is not {_NOUNS[kind]}", f"write {_NOUNS[kind]}{known}")
        if isinstance(value, float) and not math.isfinite(value):
            self._refuse(key, value, "is not finite", "write a finite number")
        if _is_whole(value) and abs(value) > _LARGEST:
            self._refuse(key, value, "is too large to be exact", f"stay within {_LARGEST}")
        return value


def _parameters(head: str) -> dict[str, Any]:
    """Return the defaults of the parameters that a space may name."""
    params = head_class(head)().get_params()
    return {name: value for name, value in params.items() if name not in _SET_BY_SWEEP}


def _identity(defaults: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    """Return a text that two sets of parameters share where they make equal heads; 1 is 1.0."""
    values = {**defaults, **params}.items()
    return json.dumps({k: float(v) if _is_number(v) else v for k, v in values}, sort_keys=True)


def _draw_value(values: "tuple[Any, ...] | Range", generator: np.random.Generator) -> Any:
    if isinstance(values, Range):
        return values.draw(generator)
    return values[int(generator.integers(len(values)))]


def _all_values(values: "tuple[Any, ...] | Range", n: int) -> Sequence[Any]:
    """Return up to `n` of all values, none where there is no end to them."""
    if not isinstance(values, Range):
        return values[:n]
    if isinstance(values.low, int) and isinstance(values.high, int):
        return range(values.low, values.high + 1)[:n]
    return ()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
