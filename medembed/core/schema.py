"""Documents from outside as typed models: pydantic checks them, and errors here say what is wrong.

A format is a class of `ClosedRecord`, which refuses unknown keys, or of `Record`, which keeps them
for files of later versions. `parse` returns a document as such a class or raises one error:

    class Split(ClosedRecord):
        column: str = ""
        fraction: float = Field(0.0, ge=0, lt=1)
        names: Texts = ()

    split = parse(Split, document, RecipeError, f"{path}, [split]", "Correct the recipe.")
    # RecipeError: mine.toml, [split]: unknown key 'colunm'; did you mean 'column'? Correct the …

Types are strict, as JSON and TOML have them: 1 is a number and no truth value, "1" is no number. A
number is finite. Modules take `Field` and the like from here, so that where pydantic is missing the
error names it; machines that only embed do without: neither `encoders`, `extraction`, `cache` nor
`autoencoder` imports this module.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from reprlib import Repr
from typing import Annotated, Any, TypeVar

from medembed.core.errors import MedembedError, MissingLibraryError

try:
    from pydantic import (
        AfterValidator,
        BaseModel,
        ConfigDict,
        Discriminator,
        Field,
        Tag,
        TypeAdapter,
        ValidationError,
        WrapValidator,
        create_model,
        field_validator,
        model_validator,
        with_config,
    )
except ImportError as error:
    raise MissingLibraryError(
        "pydantic, which checks the files of runs, models and recipes, is not installed: "
        "pip install 'pydantic>=2.10'."
    ) from error

__all__ = [
    "AfterValidator",
    "AnyTable",
    "ClosedRecord",
    "Count",
    "Digest",
    "Discriminator",
    "Field",
    "Given",
    "Problem",
    "Record",
    "Tag",
    "Texts",
    "Whole",
    "Word",
    "WrapValidator",
    "as_json",
    "closed",
    "create_model",
    "describe_problems",
    "field_validator",
    "find_problems",
    "model_validator",
    "parse",
    "suggest",
    "write_schema",
]

T = TypeVar("T")

_MOST = 3
"""Problems that one message names."""
_LONGEST = 60
"""Characters of a value that a message shows."""
_REPR = Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 3, _LONGEST, _LONGEST, _LONGEST
_STRICT = ConfigDict(
    strict=True,
    frozen=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
    # None of our names collides with pydantic's own methods, which begin so.
    protected_namespaces=(),
)
_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a table",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "mapping_type": "a table",
    "model_attributes_type": "a table",
    "model_type": "a table",
    "none_required": "null",
    "string_type": "text",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


class Record(BaseModel):
    """A table of a document, typed and immutable; keys that it does not name are kept."""

    model_config = ConfigDict(extra="allow", **_STRICT)


class ClosedRecord(BaseModel):
    """A table of a document, typed and immutable; a key that it does not name is refused."""

    model_config = ConfigDict(extra="forbid", **_STRICT)


closed = with_config(ConfigDict(extra="forbid", **_STRICT))
"""Decorates a `TypedDict` whose unknown keys are refused: a `ClosedRecord` that stays a dict."""


class _NotNull:
    """Takes null from what a key may hold, and leaves None to a key that is absent."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        schema = handler(source)
        return schema["schema"] if schema["type"] == "nullable" else schema


Given = Annotated[T | None, _NotNull()]
"""A key that may be absent, and is None then, but never null: ``seed: Given[int] = None``."""
AnyTable = dict[str, Any]
"""A table whose entries are another's matter."""
Texts = Annotated[tuple[str, ...], Field(strict=False)]
"""A list of texts, kept as a tuple."""


def _check_printable(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError(f"must be text that can be shown, not {_shown(text)}")
    return text


Word = Annotated[str, AfterValidator(_check_printable)]
"""Text that a terminal may be shown, not empty."""
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""A whole number that tables can hold."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""SHA-256 in hex."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a document.

    Attributes
    ----------
    key : str
        Where: ``leaderboard[0].cv``; "" is the document itself, as for keys that are missing.
    text : str
        What, with the value that stands there.
    """

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key} {self.text}".lstrip()


def parse(
    kind: type[T],
    document: object,
    error: Callable[[str], MedembedError],
    where: str | os.PathLike[str],
    way_out: str = "",
) -> T:
    """Return a document as a value of `kind`.

    Parameters
    ----------
    kind : type
        A class of `Record` or `ClosedRecord`, or anything that pydantic validates.
    document : JSON or TOML value
    error : class or function
        What makes the error of a message.
    where : str or path
        The document's file, and the section if there are any: the message begins with it.
    way_out : str
        A sentence: the message ends with it.

    Raises
    ------
    MedembedError
        What `error` returns: all that is wrong with the document, in one line.
    """
    try:
        value: T = _adapter(kind).validate_python(document)
        return value
    except ValidationError as found:
        problems = list(_read(found, kind, document))
    text = f"{os.fspath(where)}: {describe_problems(problems)}"
    raise error(f"{text} {way_out}" if way_out else text) from None


def find_problems(kind: type[Any], document: object) -> list[Problem]:
    """Return what is wrong with a document, missing keys first; empty where it is sound."""
    try:
        _adapter(kind).validate_python(document)
    except ValidationError as error:
        return list(_read(error, kind, document))
    return []


def describe_problems(problems: Sequence[Problem]) -> str:
    """Return a sentence with the first few problems and the number of the others."""
    shown = "; ".join(map(str, problems[:_MOST]))
    rest = len(problems) - _MOST
    text = f"{shown}; and {rest} more" if rest > 0 else shown
    return text if text.endswith("?") else f"{text}."


def suggest(name: str, known: Sequence[str]) -> str:
    """Return the way out of an unknown name: the nearest known one, or else all that are known."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if known else "nothing may stand there"


def as_json(value: object) -> Any:
    """Return a value with each record in it as a table of the keys that were set."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: as_json(own) for key, own in value.items()}
    return [as_json(own) for own in value] if isinstance(value, list | tuple) else value


def write_schema(kind: type[Any]) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a format."""
    found = _tidy(_adapter(kind).json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _tidy(node: Any) -> Any:
    """Leave out titles that repeat a name, and None of keys that are absent: it is not written."""
    if isinstance(node, list):
        return [_tidy(own) for own in node]
    if not isinstance(node, dict):
        return node
    is_noise = {"title": lambda own: isinstance(own, str), "default": lambda own: own is None}
    return {k: _tidy(v) for k, v in node.items() if not (k in is_noise and is_noise[k](v))}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    return _make_adapter(kind)


@cache
def _make_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _read(error: ValidationError, kind: type[Any], document: object) -> Iterator[Problem]:
    """Yield a problem for each place; alternatives of a union have one place."""
    places: dict[tuple[str | int, ...], list[Mapping[str, Any]]] = {}
    missing: list[str] = []
    for found in error.errors(include_url=False):
        is_absent = found["type"] in ("missing", "extra_forbidden")
        place = _place(found["loc"], document, is_absent)
        if found["type"] == "missing":
            missing.append(_spell(place))
        else:
            places.setdefault(place, []).append(found)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        yield Problem("", f"{', '.join(missing)} {verb} missing")
    for place, every in places.items():
        yield _problem(place, every, kind, document)


def _problem(
    place: tuple[str | int, ...],
    every: Sequence[Mapping[str, Any]],
    kind: type[Any],
    document: object,
) -> Problem:
    key, first = _spell(place), every[0]
    match first["type"]:
        case "extra_forbidden":
            known = _known_keys(kind, place[:-1])
            where, name = _spell(place[:-1]), str(place[-1])
            begin = "has an unknown key" if where else "unknown key"
            return Problem(where, f"{begin} {_shown(name)}; {suggest(name, known)}")
        case "union_tag_invalid" | "union_tag_not_found":
            name = str(first["ctx"]["discriminator"]).strip("'")
            known_tags = first["ctx"].get("expected_tags")
            expected = f"one of {known_tags}" if known_tags else "one that is known"
            value = first["input"].get(name)
            return Problem(f"{key}.{name}", f"must be {expected}, not {_shown(value)}")
        case "value_error" | "assertion_error":
            return Problem(key, str(first["ctx"]["error"]))
    expected = " or ".join(dict.fromkeys(map(_expectation, every)))
    value = _value_at(document, place)
    hint = ""
    choices = _choices(kind, place)
    if first["type"] == "literal_error" and isinstance(value, str):
        near = get_close_matches(value, choices, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    return Problem(key, f"must be {expected}, not {_shown(value)}{hint}")


def _expectation(found: Mapping[str, Any]) -> str:
    kind, context = found["type"], found.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        bound = context[name]
        return f"{words} {f'{bound:,}' if isinstance(bound, int) else f'{bound:g}'}"
    match kind:
        case "literal_error":
            return str(context["expected"])
        case "string_pattern_mismatch":
            return f"text of the form {context['pattern']}"
        case "string_too_short" | "string_too_long" | "too_short" | "too_long":
            least = context.get("min_length")
            bound = f"at least {least}" if least is not None else f"at most {context['max_length']}"
            return f"{'text' if kind.startswith('string') else 'a list'} of length {bound}"
    return str(found["msg"]).removeprefix("Input should be ")


def _place(
    location: Sequence[str | int], document: object, is_absent: bool
) -> tuple[str | int, ...]:
    """Return a location without what pydantic adds, such as the alternatives of a union."""
    node: Any = document
    place: list[str | int] = []
    for i, part in enumerate(location):
        if _has(node, part):
            node = node[part]
        elif not (is_absent and i == len(location) - 1):
            continue
        place.append(part)
    return tuple(place)


def _has(node: object, part: str | int) -> bool:
    if isinstance(node, Mapping):
        return part in node
    return isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)


def _value_at(document: object, place: Sequence[str | int]) -> object:
    node: Any = document
    for part in place:
        node = node[part]
    return node


def _spell(place: Sequence[str | int]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def _shown(value: object) -> str:
    try:
        text = _REPR.repr(value)
    except ValueError:  # TOML and JSON have whole numbers of any length
        return "a number without end"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _known_keys(kind: type[Any], place: Sequence[str | int]) -> list[str]:
    found: dict[str, None] = {}
    for node in _nodes(kind, place):
        found |= dict.fromkeys(node.get("properties", {}))
    return list(found)


def _choices(kind: type[Any], place: Sequence[str | int]) -> list[str]:
    return [
        str(choice)
        for node in _nodes(kind, place)
        for choice in node.get("enum", [node["const"]] if "const" in node else [])
    ]


def _nodes(kind: type[Any], place: Sequence[str | int]) -> list[Mapping[str, Any]]:
    """Return what the JSON Schema has for a place; several where it is a union."""
    whole = _adapter(kind).json_schema()
    nodes = list(_alternatives(whole, whole))
    for part in place:
        below = (_below(node, part) for node in nodes)
        nodes = [own for node in below if node for own in _alternatives(node, whole)]
    return nodes


def _below(node: Mapping[str, Any], part: str | int) -> Mapping[str, Any]:
    if isinstance(part, int):
        found = node.get("items", {})
    else:
        found = node.get("properties", {}).get(part) or node.get("additionalProperties", {})
    return found if isinstance(found, Mapping) else {}


def _alternatives(node: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "$ref" in node:
        name = str(node["$ref"]).rpartition("/")[2]
        yield from _alternatives(whole["$defs"][name], whole)
    elif "anyOf" in node or "oneOf" in node:
        for own in node.get("anyOf", node.get("oneOf", [])):
            yield from _alternatives(own, whole)
    else:
        yield node
