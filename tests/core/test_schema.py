"""The schema layer: what pydantic finds wrong becomes one line of ours."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import click
import jsonschema
import pytest
from json_documents import check_document
from jsonschema import Draft202012Validator
from odd_documents import odd_documents

from medembed.cache.failures import read_failures
from medembed.cache.metadata import read_description
from medembed.cache.shards import HEADER_BYTES, read_header
from medembed.cli import main
from medembed.cli.documents import DOCUMENTS
from medembed.core.errors import MedembedError, RecipeError, RunError
from medembed.core.schema import (
    ClosedRecord,
    Count,
    Field,
    Given,
    Record,
    Texts,
    describe_problems,
    field_validator,
    find_problems,
    parse,
    suggest,
)
from medembed.encoders.base_ref import read_base
from tools import write_schemas
from tools.embedding_formats import BaseDocument, CacheDocument, FailureLine, ShardHeader

ASSETS = Path(__file__).parents[1] / "assets" / "format-1"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
PLACES = {
    "run": "run/run.json",
    "trial": "run/trials.jsonl",
    "scores": "run/scores.json",
    "model": "run/models/*/model.json",
    "card": "run/models/*/model.json",
    "cache": "cache/cache.json",
    "failure": "cache/failures.jsonl",
}


class Split(ClosedRecord):
    column: str = ""
    fraction: float = Field(0.0, ge=0, lt=1)
    rows: Literal["equal", "any"] = "equal"
    names: Texts = ()

    @field_validator("column")
    @classmethod
    def _check_column(cls, value: str) -> str:
        if value == "patient":
            raise ValueError("names patients, and is no split")
        return value


class Pair(ClosedRecord):
    low: float
    high: float


class Document(Record):
    name: str
    pair: Given[Pair] = None
    split: Split | None = None
    counts: dict[str, Count] | None = None
    either: float | str = 0.0


SOUND = {"name": "a"}
DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]
WRONG: dict[str, tuple[object, str]] = {
    "no table": ([], "must be a table, not []"),
    "missing": ({}, "name is missing"),
    "several missing": ({"split": {}, "pair": {}}, "name, pair.low, pair.high are missing"),
    "text": ({"name": 1}, "name must be text, not 1"),
    "below": (SOUND | {"split": {"fraction": 1}}, "split.fraction must be below 1, not 1"),
    "truth": (SOUND | {"split": {"fraction": True}}, "split.fraction must be a number, not True"),
    "infinite": (
        SOUND | {"split": {"fraction": float("inf")}},
        "split.fraction must be a finite number, not inf",
    ),
    "key": (
        SOUND | {"split": {"colum": ""}},
        "split has an unknown key 'colum'; did you mean 'column'?",
    ),
    "far key": (
        SOUND | {"split": {"zzz": ""}},
        "split has an unknown key 'zzz'; known: column, fraction, rows, names",
    ),
    "choice": (
        SOUND | {"split": {"rows": "equl"}},
        "split.rows must be 'equal' or 'any', not 'equl'; did you mean 'equal'?",
    ),
    "entry": (SOUND | {"counts": {"images": -1}}, "counts.images must be at least 0, not -1"),
    "never null": (SOUND | {"pair": None}, "pair must be a table, not None"),
    "union": (SOUND | {"either": []}, "either must be a number or text, not []"),
    "in a list": (
        SOUND | {"split": {"names": ["a", 1]}},
        "split.names[1] must be text, not 1",
    ),
    "a rule of ours": (
        SOUND | {"split": {"column": "patient"}},
        "split.column names patients, and is no split",
    ),
    "long": (
        {"name": "x" * 99 + "y"} | {"either": [10**99]},
        f"either must be a number or text, not [1{'0' * 27}...{'0' * 28}…",
    ),
    "deep": ({"name": DEEP}, "name must be text, not [[[[...]]]]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_problem_names_its_place_value_and_expectation(name: str) -> None:
    document, expected = WRONG[name]
    [problem] = find_problems(Document, document)
    assert str(problem) == expected


def test_a_sound_document_is_typed_and_keeps_what_later_versions_add() -> None:
    document: dict[str, Any] = {"name": "a", "split": {"names": ["x"], "fraction": 0}, "later": 1}
    read = parse(Document, document, RunError, "run.json")
    assert read.split == Split(names=("x",), fraction=0.0)
    assert read.model_extra == {"later": 1}
    assert find_problems(Document, document) == []


def test_one_error_names_file_problems_and_way_out() -> None:
    document = {"split": {"colum": "", "rows": 1, "fraction": -1, "names": ["a", 1]}}
    with pytest.raises(RecipeError) as caught:
        parse(Document, document, RecipeError, "mine.toml", "Correct it.")
    text = str(caught.value)
    assert text.startswith("mine.toml: name is missing; ")
    assert text.endswith("; and 2 more. Correct it.")
    assert "\n" not in text


def test_a_question_ends_the_sentence() -> None:
    [problem] = find_problems(Split, {"colum": ""})
    assert describe_problems([problem]) == "unknown key 'colum'; did you mean 'column'?"
    assert suggest("x", []) == "nothing may stand there"


def test_the_written_schemas_are_those_of_the_models() -> None:
    """`make schemas` writes them, in the words of the pydantic that constraints.txt pins."""
    pinned = re.search(r"^pydantic==(.+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pinned
    if version("pydantic") != pinned[1]:
        pytest.skip(f"schemas are compared as pydantic {pinned[1]} writes them")
    written = {path.name: path.read_text() for path in write_schemas.SCHEMAS.iterdir()}
    assert written == write_schemas.render()


def read_documents(name: str) -> list[Any]:
    """Return the documents of one format among the files that version 1 wrote."""
    found = []
    for path in sorted(ASSETS.glob(PLACES[name])):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        found += [json.loads(line) for line in lines]
    return [document["card"] for document in found] if name == "card" else found


@pytest.mark.parametrize("name", PLACES)
def test_files_of_version_1_are_valid(name: str) -> None:
    validator = Draft202012Validator(json.loads(write_schemas.render()[f"{name}.json"]))
    documents = read_documents(name)
    assert documents
    for document in documents:
        validator.validate(document)
        for key in validator.schema.get("required", []):
            kept = {own: value for own, value in document.items() if own != key}
            assert not validator.is_valid(kept)


def test_the_shipped_space_is_valid_and_another_parameter_is_not() -> None:
    validator = Draft202012Validator(json.loads(write_schemas.render()["space.json"]))
    text = (resources.files("medembed.sweeps") / "default_space.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text)
    validator.validate(document)
    for table in ({"droput": 0.1}, {"lr": {"low": 0.1}}, {"hidden": 256}, {"dropout": "0.1"}):
        assert not validator.is_valid({"mlp": table})


SPEC = {
    "encoder": "ab" * 32,
    "preprocessing": {"size": [8, 8], "window": None},
    "poolings": {"mean": [3], "grid4": [16, 3]},
    "dtype": "float16",
}
KEPT = {"recorded": {"source": "demo"}, "canary": {"version": 1}}


def take_cache(text: bytes, place: Path) -> object:
    (place / "cache.json").write_bytes(text)
    return read_description(place)


def take_shard(text: bytes, place: Path) -> object:
    (place / "shard.h5").write_bytes(text.ljust(HEADER_BYTES) + bytes(10**5))
    return read_header(place / "shard.h5")


def take_failure(text: bytes, place: Path) -> object:
    (place / "failures.jsonl").write_bytes(text + b"\n")
    return read_failures(place / "failures.jsonl")


def take_base(text: bytes, place: Path) -> object:
    (place / "base.json").write_bytes(text)
    return read_base(place)


HAND_READ: dict[str, tuple[dict[str, Any], Callable[[bytes, Path], object], Any]] = {
    "cache": (
        {"format": "medembed-cache", "version": 1, "spec": SPEC, **KEPT},
        take_cache,
        CacheDocument,
    ),
    "shard-header": (
        {
            "format": "medembed-shard",
            "version": 1,
            "spec": "ab" * 32,
            "rows": 2,
            "keys_offset": 600,
            "keys_sha256": "ab" * 32,
        },
        take_shard,
        ShardHeader,
    ),
    "failure": (
        {"sha256": "ab" * 32, "stage": "decode", "reason": "truncated"},
        take_failure,
        FailureLine,
    ),
    "base": (
        {
            "format": "medembed-adapted-encoder",
            "version": 1,
            "base": None,
            "base_directory": "../x",
            "base_fingerprint": "a",
            "fingerprint": "b",
        },
        take_base,
        BaseDocument,
    ),
}


@pytest.mark.parametrize("name", HAND_READ)
def test_what_is_read_by_hand_is_valid(name: str, tmp_path: Path) -> None:
    """Without pydantic, since a machine that embeds may lack it; see `tools.embedding_formats`."""
    sound, take, kind = HAND_READ[name]
    taken = 0
    for text in [json.dumps(sound).encode(), *odd_documents(sound)]:
        if name == "shard-header" and len(text) > HEADER_BYTES:
            continue
        try:
            found = take(text, tmp_path)
        except MedembedError:
            continue
        if found:
            taken += 1
            assert find_problems(kind, json.loads(text)) == [], text
    assert taken > 0


def list_json_commands(command: click.Command, names: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the names of commands with an option --json."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from list_json_commands(found, (*names, name))
    elif any("--json" in option.opts for option in command.params):
        yield "-".join(names)


def test_every_document_of_a_command_has_a_schema() -> None:
    """`json_documents` holds what tests see to it."""
    assert sorted(list_json_commands(main)) == sorted(DOCUMENTS)


def test_a_document_that_lacks_a_key_or_has_another_fails_its_test() -> None:
    sound = {"problems": ["a"], "set_aside": []}
    check_document("cache-verify", json.dumps(sound))
    for wrong in ({"set_aside": []}, sound | {"more": 1}, sound | {"problems": [1]}):
        with pytest.raises(jsonschema.ValidationError):
            check_document("cache-verify", json.dumps(wrong))


def test_without_pydantic_the_error_names_it() -> None:
    code = (
        "import sys; sys.modules['pydantic'] = None\n"
        "from medembed.core.errors import MedembedError\n"
        "try: import medembed.core.schema\n"
        "except MedembedError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'pydantic" in done.stdout
