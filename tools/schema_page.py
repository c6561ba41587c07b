"""Write the reference page of the JSON schemas that lie in `docs/schemas`."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["render_page"]


def render_page(schemas: Path) -> str:
    """Return a page with a section for each schema in a directory, and a link to its file."""
    lines = ["# Schemas", ""]
    lines += [
        "medembed reads its own files through models; these JSON schemas are made from them.",
        "",
    ]
    for path in sorted(schemas.glob("*.json")):
        lines += _render_schema(path)
    return "\n".join(lines)


def _render_schema(path: Path) -> Iterator[str]:
    schema = json.loads(path.read_text(encoding="utf-8"))
    yield from (f"## {path.stem}", "")
    link = f"{{download}}`{path.name} <../schemas/{path.name}>`"
    yield from (f"{schema.get('title', path.stem)}: {link}", "")
    required = set(schema.get("required", ()))
    for name, field in schema.get("properties", {}).items():
        words = [_type_of(field), *(["required"] if name in required else [])]
        about = f": {field['description']}" if field.get("description") else ""
        yield f"- `{name}` ({', '.join(words)}){about}"
    yield ""


def _type_of(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_type_of(kind) for kind in field["anyOf"])
    if field.get("type") == "array":
        return f"array of {_type_of(field.get('items', {}))}"
    return str(field.get("type", "any"))
