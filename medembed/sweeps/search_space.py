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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import numpy as np

from medembed.core.errors import PathNotFoundError, TrainingDataError
from medembed.core.files import describe_error, read_plain
from medembed.core.schema import (
    AfterValidator,
    ClosedRecord,
    Discriminator,
    Field,
    Tag,
    WrapValidator,
    create_model,
    model_validator,
    parse,
)
from medembed.heads.registry import head_class, known_heads, nearest

__all__ = ["HeadSpace", "Range", "RangeEntry", "default_spaces", "read_spaces", "space_entry"]

_DEFAULT_FILE = "default_space.toml"
_MAX_BYTES = 1 << 20
_N_CONFIGS = 8

#: Parameters that a sweep sets itself.
_SET_BY_SWEEP = ("n_cells", "n_covariates", "n_jobs", "random_state")

#: Redraws of one configuration before the rest of a finite space is gone through in order.
_ATTEMPTS = 100

#: Larger whole numbers are not exact as float64.
_LARGEST = 2**53

#: Keys of a table that are no parameters.
_OWN = ("configs", "first", "rungs")


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


def default_spaces(heads: Collection[str] | None = None) -> dict[str, HeadSpace]:
    """Return the space of heads that is tried where no file is given; by default of every head.

    Of heads that an installed package adds that is one configuration: their defaults.
    """
    text = (resources.files("medembed.sweeps") / _DEFAULT_FILE).read_text(encoding="utf-8")
    added = {head: HeadSpace(head, 1) for head in known_heads() if heads is None or head in heads}
    return {**added, **_parse(text, _DEFAULT_FILE, heads)}


def read_spaces(path: str | Path, heads: Collection[str] | None = None) -> dict[str, HeadSpace]:
    """Return heads' spaces: as the file says where it has the head's table, else the default.

    Where `heads` are given, the default of others is left out.

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
    lacking = set(known_heads() if heads is None else heads) - set(named)
    return {**default_spaces(lacking), **named}


def _parse(text: str, file: str, heads: Collection[str] | None = None) -> dict[str, HeadSpace]:
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
        if heads is not None and head not in heads:
            continue
        where = f"{file}, [{head}]"
        entry = parse(_head_entry(head), table, TrainingDataError, where, "Correct that line.")
        spaces[head] = _build(head, entry, table)
    return spaces


def _build(head: str, entry: Any, table: Mapping[str, Any]) -> HeadSpace:
    """Return the space that a head's table says."""
    values = {name: own for name, own in _given(entry, table).items() if name not in _OWN}
    single = {n: v for n, v in values.items() if isinstance(v, tuple) and len(v) == 1}
    return HeadSpace(
        head=head,
        n_configs=entry.configs,
        rungs=tuple(getattr(entry, "rungs", ())),
        constants={name: own[0] for name, own in single.items()},
        varying={name: own for name, own in values.items() if name not in single},
        first=tuple(map(_given, entry.first, table.get("first", []))),
    )


def _given(entry: ClosedRecord, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table has, by its own names and in its order."""
    fields = {field.alias or name: name for name, field in type(entry).model_fields.items()}
    return {key: getattr(entry, fields[key]) for key in table}


def space_entry() -> type[ClosedRecord]:
    """Return the format of a file with a search space: a table for each head."""
    return _entry("SearchSpace", {head: _head_entry(head) for head in known_heads()})


@cache
def _head_entry(head: str) -> type[ClosedRecord]:
    """Return the format of a head's table, by the kinds of its parameters' defaults."""
    kind, defaults = head_class(head), _parameters(head)
    shared = kind.shared_params
    single = {name: _one(name, default) for name, default in defaults.items()}
    in_first = {name: one for name, one in single.items() if name not in shared}
    reason = f"is shared by all members of a cohort: it is for [{head}]"
    first: Any = _entry(f"{head}.first", in_first, dict.fromkeys(shared, reason))
    own: dict[str, Any] = {
        "configs": (Annotated[int, Field(ge=1)], _N_CONFIGS),
        "first": (list[first], Field(default_factory=list)),
    }
    reasons = {}
    if kind.has_rungs:
        own["rungs"] = (Rungs, Field(default_factory=list))
    else:
        reasons["rungs"] = "is for heads that train by epochs, as mlp does: delete the line"
    several = {
        name: _several(one, defaults[name], is_shared=name in shared)
        for name, one in single.items()
    }
    return _entry(head, several, reasons, own)


def _entry(
    name: str,
    values: Mapping[str, Any],
    reasons: Mapping[str, str] | None = None,
    own: Mapping[str, Any] | None = None,
) -> type[ClosedRecord]:
    """Return a table's format; names of values are aliases, since a model has names of its own.

    Parameters
    ----------
    values : mapping of str to type
        None of them is required.
    reasons : mapping of str to str, optional
        Why a key is refused that is known elsewhere.
    own : mapping of str to field, optional
        Keys that are no values.
    """
    fields: dict[str, Any] = {
        f"value_{i}": (kind, Field(None, alias=key)) for i, (key, kind) in enumerate(values.items())
    }
    by_sweep = dict.fromkeys(_SET_BY_SWEEP, "is set by the sweep itself: delete the line")
    every = {**by_sweep, **(reasons or {})}

    def refuse(table: Any) -> Any:
        for key in table if isinstance(table, dict) else ():
            if key in every:
                raise ValueError(f"{key} = {table[key]!r:.60} {every[key]}")
        return table

    validators: Any = {"refuse": model_validator(mode="before")(refuse)}
    fields |= own or {}
    return create_model(name, __base__=ClosedRecord, __validators__=validators, **fields)


def _one(name: str, default: Any) -> Any:
    """Return what one value of a parameter may be."""
    if name == "class_weight":
        return Annotated[Literal["balanced", "none"], AfterValidator(_read_weight)]
    if isinstance(default, tuple | list):
        return list[WholeNumber]
    kinds: dict[type, Any] = {str: str, bool: bool, int: WholeNumber}
    return kinds.get(type(default), Number)


def _several(one: Any, default: Any, *, is_shared: bool) -> Any:
    """Return what a parameter may be; a constant is read as a choice of one."""
    lists = isinstance(default, tuple | list)
    choices = Annotated[list[one], Field(min_length=1), AfterValidator(_check_choices)]
    constant = Annotated[one, AfterValidator(lambda value: (value,))]
    forms = Annotated[constant, Tag("constant")] | Annotated[choices, Tag("choices")]
    if one in (WholeNumber, Number):
        forms |= Annotated[RangeEntry[one], AfterValidator(RangeEntry.build), Tag("range")]
    known = Discriminator(
        _form_of_lists if lists else _form,
        custom_error_type="no_range",
        custom_error_message="one value or a list of values",  # takes no numbers
    )
    found = Annotated[forms, known]
    return Annotated[found, AfterValidator(_check_shared)] if is_shared else found


def _form(value: Any) -> str:
    forms: dict[type, str] = {dict: "range", list: "choices"}
    return forms.get(type(value), "constant")


def _form_of_lists(value: Any) -> str:
    """Return the form of what holds lists: a flat list is one of them."""
    if isinstance(value, list) and not any(isinstance(own, list) for own in value):
        return "constant"
    return _form(value)


def _read_weight(value: str) -> str | None:
    return None if value == "none" else value


def _keep_whole(value: Any, check: Callable[[Any], float]) -> float:
    """Keep whole numbers whole, as they are written."""
    if type(value) is not int:
        return check(value)
    if abs(value) > _LARGEST:
        raise ValueError(f"is too large to be exact: stay within {_LARGEST}")
    return value


def _check_choices(choices: list[Any]) -> tuple[Any, ...]:
    for position, choice in enumerate(choices):
        if choice in choices[:position]:
            raise ValueError(f"lists {choice!r} twice: list each value once")
    return tuple(choices)


def _check_shared(values: "tuple[Any, ...] | Range") -> "tuple[Any, ...] | Range":
    if isinstance(values, Range) or len(values) > 1:
        raise ValueError(
            "holds several values, but all members of a cohort share each batch: give one value"
        )
    return values


def _check_rising(rungs: list[int]) -> list[int]:
    if any(a >= b for a, b in pairwise(rungs)):
        raise ValueError(f"must be rising, such as [2, 4, 8], not {rungs!r:.60}")
    return rungs


Number = Annotated[float, WrapValidator(_keep_whole)]
WholeNumber = Annotated[int, WrapValidator(_keep_whole)]
Rungs = Annotated[list[Annotated[int, Field(ge=1)]], AfterValidator(_check_rising)]
N = TypeVar("N")


class RangeEntry(ClosedRecord, Generic[N]):
    """A range as a file writes it."""

    low: N
    high: N
    log: bool = False

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        low: Any = self.low
        if low > self.high:
            raise ValueError("has low above high: exchange them")
        if self.log and low <= 0:
            raise ValueError("has a logarithm of low: raise low above 0, or drop log")
        return self

    def build(self) -> "tuple[Any, ...] | Range":
        """Return the range, or the one number that it holds."""
        low, high = self.low, self.high
        if low == high:
            return (low,)
        if not (isinstance(low, int) and isinstance(high, int)):
            low, high = float(low), float(high)  # type: ignore[arg-type, assignment]
        return Range(low, high, self.log)  # type: ignore[arg-type]


def _parameters(head: str) -> dict[str, Any]:
    """Return the defaults of the parameters that a space may name."""
    kind = head_class(head)
    own = (*_SET_BY_SWEEP, *kind.data_params)
    return {name: value for name, value in kind().get_params().items() if name not in own}


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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
