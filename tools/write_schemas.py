"""Write `docs/schemas/`: a JSON Schema of every file format and `--json` document (`make schemas`).

They are made of the models that read the files, so that neither can say what the other does not.
"""

import json
from pathlib import Path
from typing import Any

from medembed.cli.documents import DOCUMENTS
from medembed.core.prompts import PromptsDocument
from medembed.core.schema import write_schema
from medembed.dataset.build_file import BuildFile
from medembed.dataset.relabelling import Relabelling
from medembed.finetuning.config import HyperparametersEntry
from medembed.heads.packaging import ModelDocument
from medembed.report.page_schema import Films, PageDocument
from medembed.results.audit_schema import LabelAuditDocument
from medembed.results.embedding_map import MapInfo
from medembed.results.model_card import CardDocument
from medembed.results.run_schema import RunInfo, ScoresInfo, TrialRecord
from medembed.results.targets import TargetsFile
from medembed.sweeps.search_space import space_entry
from tools.embedding_formats import (
    AutoencoderConfig,
    BaseDocument,
    CacheDocument,
    FailureLine,
    ShardHeader,
)

__all__ = ["FORMATS", "SCHEMAS", "main", "render"]

SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"
FORMATS: dict[str, tuple[str, Any]] = {
    "run": ("run.json of a run", RunInfo),
    "scores": ("scores.json of a run", ScoresInfo),
    "trial": ("A line of trials.jsonl of a run", TrialRecord),
    "targets": ("targets.json of a sweep of targets", TargetsFile),
    "build": ("MANIFEST.build.json, what the build of a manifest found", BuildFile),
    "relabelling": ("MANIFEST.relabelling.json, every change of a label", Relabelling),
    "audit": ("audit.json of `medembed audit labels`", LabelAuditDocument),
    "map": ("Value of `medembed` in the metadata of map.parquet of a run", MapInfo),
    "page": ("The data within a page of `medembed report`", PageDocument),
    "page-films": ("The pictures within a page of `medembed report`", Films),
    "model": ("model.json of a packaged model", ModelDocument),
    "card": ("card of model.json", CardDocument),
    "hyperparameters": ("Hyperparameters of fine-tuning, by name", HyperparametersEntry),
    "autoencoder": ("config.json of an autoencoder", AutoencoderConfig),
    "base": ("base.json of an adapted encoder", BaseDocument),
    "cache": ("cache.json of a cache", CacheDocument),
    "failure": ("A line of failures.jsonl of a cache", FailureLine),
    "shard-header": ("The JSON object in the first 512 bytes of a shard", ShardHeader),
    "prompts": ("document in the metadata of a file of prompts", PromptsDocument),
    "space": ("A search space: the file of `medembed sweep --space`", space_entry()),
}
"""By name of the file in `docs/schemas`: what has the format, and its model."""


def render() -> dict[str, str]:
    """Return the content of every file of `docs/schemas`, by name."""
    of_commands = {
        f"{command}.output": (f"What `medembed {command.replace('-', ' ')} --json` prints", kind)
        for command, kind in DOCUMENTS.items()
    }
    every = FORMATS | of_commands
    return {f"{name}.json": _render_one(*known) for name, known in every.items()}


def _render_one(title: str, kind: Any) -> str:
    schema = {"title": title, **write_schema(kind)}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all files, and remove those of formats that are gone."""
    SCHEMAS.mkdir(exist_ok=True)
    found = render()
    for path in SCHEMAS.glob("*.json"):
        if path.name not in found:
            path.unlink()
    for name, content in found.items():
        (SCHEMAS / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
