"""Embed radiographs once with a frozen medical encoder; compare light classifiers on the cache.

Research software, not a medical device.

>>> import medembed as me
>>> report = me.build_manifest("mura", "MURA-v1.1")  # doctest: +SKIP
>>> me.extract(report.manifest, "MURA-v1.1", "google/medgemma-4b-pt", "cache")  # doctest: +SKIP
>>> run = me.sweep("cache", report.manifest, "runs/sweep")  # doctest: +SKIP
>>> me.compare(run)  # doctest: +SKIP
>>> me.Predictor(run.model("mlp")).predict(["wrist.dcm"])  # doctest: +SKIP

Every name is imported when it is first used: `import medembed` loads nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medembed.cache.embeddings import Embeddings, load_embeddings, patient_folds
    from medembed.cache.neighbours import find_similar
    from medembed.cache.store import Cache, open_cache
    from medembed.core.errors import (
        ArgumentError,
        CacheError,
        DeviceMemoryError,
        EncoderError,
        ImageError,
        ManifestError,
        MedembedError,
        MissingLibraryError,
        MissingRowsError,
        ModelError,
        NonFiniteError,
        PathNotFoundError,
        RecipeError,
        RunError,
        ShardError,
        SpecMismatchError,
        StorageError,
        TrainingDataError,
    )
    from medembed.dataset.manifest import Manifest, read_manifest
    from medembed.dataset.recipes.build import BuildReport, build_manifest
    from medembed.dataset.recipes.proposals import propose_recipe
    from medembed.dataset.relabelling import Relabelled, relabel
    from medembed.encoders.preprocessing import Preprocessing
    from medembed.encoders.protocol import Encoder
    from medembed.extraction.image_encoder import load_encoder
    from medembed.extraction.job import extract
    from medembed.extraction.report import ExtractionReport
    from medembed.finetuning.job import finetune
    from medembed.heads.attention import AttentionHead
    from medembed.heads.base import Head
    from medembed.heads.knn import KNNHead
    from medembed.heads.lightgbm import LightGBMHead
    from medembed.heads.linear import LogisticHead
    from medembed.heads.mlp import MLPHead
    from medembed.prediction.external_validation import evaluate
    from medembed.prediction.predictor import Predictor
    from medembed.prediction.shortcuts import ShortcutAudit, audit_shortcuts
    from medembed.prediction.worklist import Worklist, make_worklist
    from medembed.report.comparison import Comparison, compare
    from medembed.report.page import write_report
    from medembed.results.label_audit import LabelAudit, audit_labels
    from medembed.results.runs import Run, open_run
    from medembed.sweeps.ensembles import ensemble
    from medembed.sweeps.job import sweep

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "AttentionHead",
    "BuildReport",
    "Cache",
    "CacheError",
    "Comparison",
    "DeviceMemoryError",
    "Embeddings",
    "Encoder",
    "EncoderError",
    "ExtractionReport",
    "Head",
    "ImageError",
    "KNNHead",
    "LabelAudit",
    "LightGBMHead",
    "LogisticHead",
    "MLPHead",
    "Manifest",
    "ManifestError",
    "MedembedError",
    "MissingLibraryError",
    "MissingRowsError",
    "ModelError",
    "NonFiniteError",
    "PathNotFoundError",
    "Predictor",
    "Preprocessing",
    "RecipeError",
    "Relabelled",
    "Run",
    "RunError",
    "ShardError",
    "ShortcutAudit",
    "SpecMismatchError",
    "StorageError",
    "TrainingDataError",
    "Worklist",
    "__version__",
    "audit_labels",
    "audit_shortcuts",
    "build_manifest",
    "compare",
    "ensemble",
    "evaluate",
    "extract",
    "find_similar",
    "finetune",
    "load_embeddings",
    "load_encoder",
    "make_worklist",
    "open_cache",
    "open_run",
    "patient_folds",
    "propose_recipe",
    "read_manifest",
    "relabel",
    "sweep",
    "write_report",
]

_NAMES = {
    "cache.embeddings": ("Embeddings", "load_embeddings", "patient_folds"),
    "cache.neighbours": ("find_similar",),
    "cache.store": ("Cache", "open_cache"),
    "core.errors": (
        *("ArgumentError", "CacheError", "DeviceMemoryError", "EncoderError", "ImageError"),
        *("ManifestError", "MedembedError", "MissingLibraryError", "MissingRowsError"),
        *("ModelError", "NonFiniteError", "PathNotFoundError", "RecipeError", "RunError"),
        *("ShardError", "SpecMismatchError", "StorageError", "TrainingDataError"),
    ),
    "dataset.manifest": ("Manifest", "read_manifest"),
    "dataset.recipes.build": ("BuildReport", "build_manifest"),
    "dataset.recipes.proposals": ("propose_recipe",),
    "dataset.relabelling": ("Relabelled", "relabel"),
    "encoders.preprocessing": ("Preprocessing",),
    "encoders.protocol": ("Encoder",),
    "extraction.image_encoder": ("load_encoder",),
    "extraction.job": ("extract",),
    "extraction.report": ("ExtractionReport",),
    "finetuning.job": ("finetune",),
    "heads.attention": ("AttentionHead",),
    "heads.base": ("Head",),
    "heads.knn": ("KNNHead",),
    "heads.lightgbm": ("LightGBMHead",),
    "heads.linear": ("LogisticHead",),
    "heads.mlp": ("MLPHead",),
    "prediction.external_validation": ("evaluate",),
    "prediction.predictor": ("Predictor",),
    "prediction.shortcuts": ("ShortcutAudit", "audit_shortcuts"),
    "prediction.worklist": ("Worklist", "make_worklist"),
    "report.comparison": ("Comparison", "compare"),
    "report.page": ("write_report",),
    "results.label_audit": ("LabelAudit", "audit_labels"),
    "results.runs": ("Run", "open_run"),
    "sweeps.ensembles": ("ensemble",),
    "sweeps.job": ("sweep",),
}
"""The modules that the names are in."""
_HOMES = {name: f"medembed.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
