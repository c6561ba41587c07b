"""JSON documents as a person, an editor or an attacker may leave them."""

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

ODD = [
    *(None, True, -1, 0, 10**30, 10**400, float("inf"), float("nan"), 0.5, "", "mean", "\ud800"),
    *([], {}, [[]], [-1], [0], [10**12], [float("inf")], {"mean": [3, 3, 3]}, {"mean": [10**12]}),
]


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value of a JSON document."""
    yield path
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield from places(document[key], (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(document)
    *above, last = path
    place = changed
    for key in above:
        place = place[key]
    place[last] = value
    return changed


def odd_documents(document: Any) -> Iterator[bytes]:
    """Yield the document with each value replaced by each odd one, and with each left out."""
    for path, value in itertools.product(places(document), ODD):
        yield json.dumps(replaced(document, path, value)).encode()
    for key in document:
        yield json.dumps({k: v for k, v in document.items() if k != key}).encode()
    yield from (b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000)
