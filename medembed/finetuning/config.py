"""The configuration of fine-tuning, parsed and checked before any image is read."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from medembed.core.errors import ArgumentError, EncoderError, TrainingDataError
from medembed.core.locations import Location
from medembed.core.poolings import DEFAULT_POOLINGS, find_pooling
from medembed.core.schema import ClosedRecord, Field, create_model, parse
from medembed.core.system import library_versions
from medembed.dataset.build_file import KeptBuild
from medembed.dataset.manifest import Manifest
from medembed.encoders.loading import choose_device, choose_precision
from medembed.encoders.torch_encoder import TorchEncoder
from medembed.evaluation.thresholds import ThresholdRule
from medembed.extraction import spec_of
from medembed.extraction.image_encoder import EncoderLike, find_tower
from medembed.finetuning.adapters import alpha_of, find_projections, require_peft
from medembed.finetuning.blocks import count_blocks, draw_weights
from medembed.finetuning.frozen_features import TRUNK_DTYPE, choose_cut
from medembed.finetuning.head_init import HeadInit, read_swept_head
from medembed.finetuning.hyperparameters import Depth, Hyperparameters, read_depths
from medembed.images.load import DEFAULT_LIMITS, Limits
from medembed.results.provenance import public_name
from medembed.results.run_schema import CV_METHOD
from medembed.results.runs import open_run

__all__ = [
    "FineTuneConfig",
    "HyperparametersEntry",
    "Trial",
    "check_hyperparameters",
    "describe",
    "read_config",
    "resolve_config",
    "write_command",
]


_ONE, _POSITIVE = Field(ge=1), Field(gt=0)
_BOUNDS = {
    **dict.fromkeys(("epochs", "batch_size", "accumulate", "patience"), _ONE),
    **dict.fromkeys(("lr", "encoder_share", "decay"), _POSITIVE),
    "weight_decay": Field(ge=0),
    "warm_up": Field(ge=0, lt=1),
    "clip": Field(gt=0, allow_inf_nan=True),
    "lora": _ONE,
}
_FIELDS: dict[str, Any] = {
    own.name: (Annotated[own.type, _BOUNDS.get(own.name, Field())], own.default)
    for own in fields(Hyperparameters)
}
HyperparametersEntry = create_model("HyperparametersEntry", __base__=ClosedRecord, **_FIELDS)
"""Hyperparameters by name, with their bounds; those that are left out have the defaults."""


@dataclass(frozen=True)
class Trial:
    """One depth with one seed, and the name of its head."""

    number: int
    depth: Depth
    seed: int
    head: str


@dataclass(frozen=True)
class FineTuneConfig:
    """The parsed options of fine-tuning."""

    manifest: Manifest
    image_root: Location
    encoder: TorchEncoder
    depths: list[Depth]
    seeds: tuple[int, ...]
    n_folds: int
    poolings: tuple[str, ...]
    recipe: Hyperparameters
    swept: HeadInit | None
    trunk_cache: Path | None
    trunk_dtype: str
    n_cut: int | None
    limits: Limits = DEFAULT_LIMITS
    build: KeptBuild | None = None
    """The record of the manifest's build, see `dataset.build_file.read_build`."""
    points: tuple[ThresholdRule, ...] = ()

    @property
    def trials(self) -> list[Trial]:
        """All trials to train."""
        several = len(self.seeds) > 1
        pairs = [(depth, seed) for depth in self.depths for seed in self.seeds]
        return [
            Trial(i, depth, seed, depth.head(seed if several else None, self.recipe.lora))
            for i, (depth, seed) in enumerate(pairs)
        ]

    def for_seed(self, seed: int) -> "FineTuneConfig":
        """Return a copy with the initial weights of a seed, which are random from scratch."""
        if not self.recipe.from_scratch:
            return self
        encoder = self.encoder.copy()
        draw_weights(encoder, seed)
        return replace(self, encoder=encoder)

    def params(self, lora: int | None) -> dict[str, Any]:
        """Return the leaderboard's parameters of a depth; `run.json` has all of them.

        Parameters
        ----------
        lora : int or None
            Rank of the depth's adapters.
        """
        names = ("lr", "batch_size", "epochs", "augment")
        params = {name: getattr(self.recipe, name) for name in names}
        if lora is not None:
            params |= {"lora": lora, "lora_alpha": alpha_of(lora)}
        return {"start": "fresh" if self.swept is None else self.swept.head, **params}

    def question(self) -> dict[str, Any]:
        """Return the run's question: everything that determines its result."""
        spec = spec_of(self.encoder, self.poolings)
        return {
            "depths": ["all" if depth.everything else depth.blocks for depth in self.depths],
            "seeds": list(self.seeds),
            "pooling": "+".join(self.poolings),
            "metric": "auroc",
            "n_folds": self.n_folds,
            "cv_method": CV_METHOD,
            "seed": self.seeds[0],
            "manifest": self.manifest.digest(),
            "encoder": self.encoder.fingerprint,
            "preprocessing": dict(spec.preprocessing),
            "recipe": self.recipe.as_dict(),
            "start": None if self.swept is None else self.swept.as_dict(),
            "trunk": None if self.n_cut is None else self.trunk_dtype,
            # older runs do not record operating points
            **({"operating_points": [rule.name for rule in self.points]} if self.points else {}),
        }


def read_config(config: Hyperparameters | Mapping[str, object] | None) -> Hyperparameters:
    """Return hyperparameters that are given by name, the defaults in place of the others.

    Raises
    ------
    TrainingDataError
        There is no hyperparameter of that name, or none of that value.
    ArgumentError
        `config` is neither a mapping nor a Hyperparameters.
    """
    if isinstance(config, Hyperparameters):
        return config
    if not isinstance(config, Mapping | None):
        raise ArgumentError(
            "config is a mapping of hyperparameters to their values, such as "
            f'{{"epochs": 10}}; this is of type {type(config).__name__}.'
        )
    given: dict[str, Any] = dict(config or {})
    _check_bounds(given)
    return Hyperparameters(**given)


def check_hyperparameters(chosen: Hyperparameters) -> None:
    """Refuse what cannot be trained by.

    Raises
    ------
    TrainingDataError
        A number is out of range; names it.
    """
    _check_bounds(asdict(chosen))
    if chosen.accumulate > chosen.batch_size:
        raise TrainingDataError(
            f"--accumulate is {chosen.accumulate} and --batch-size {chosen.batch_size}: a batch "
            "cannot be cut in more parts than it has images."
        )
    if chosen.lora is not None and chosen.from_scratch:
        raise TrainingDataError(
            "--lora adapts what a trained encoder knows, which --from-scratch forgets. Leave "
            "one of them out."
        )


def _check_bounds(values: Mapping[str, Any]) -> None:
    parse(HyperparametersEntry, values, TrainingDataError, "hyperparameters of fine-tuning")


def resolve_config(
    manifest: Manifest,
    image_root: Location,
    unfreeze: Sequence[str | int],
    reference: EncoderLike,
    recipe: Hyperparameters,
    *,
    from_run: str | Path | None,
    trunk: tuple[str | Path | None, str],
    seeds: tuple[int, ...],
    n_folds: int,
    pool: str | Sequence[str] | None,
    on: Mapping[str, str],
) -> FineTuneConfig:
    """Load the encoder, and check that the request is possible.

    Parameters are those of `job.finetune`; `trunk` is the trunk cache and its dtype, `on` the
    device, precision and fit.

    Raises
    ------
    TrainingDataError, EncoderError, RunError, ModelError, MedembedError
        See `job.finetune`.
    """
    if not seeds:
        raise TrainingDataError("--seeds must be at least 1.")
    if from_run is not None and recipe.from_scratch:
        raise TrainingDataError(
            "--from-run starts from a head of this encoder's embeddings, which --from-scratch "
            "forgets. Leave one of them out."
        )
    if trunk[0] is not None:
        _refuse_changing_trunk(recipe)
    if not isinstance(reference, str | os.PathLike):
        on = {**on, "device": find_tower(reference).device}
    chosen = choose_precision(on["precision"], choose_device(on["device"]))
    recipe = replace(recipe, precision=chosen)
    check_hyperparameters(recipe)
    if recipe.lora is not None:
        require_peft()
    names = tuple(pool.split(",") if isinstance(pool, str) else pool or ())
    # Weights stay fp32 in training; with bf16 only products are cast.
    known: dict[str, Any] = {"device": on["device"], "precision": "fp32", "fit": on["fit"]}
    encoder: Any = find_tower(reference, poolings=names or DEFAULT_POOLINGS, **known)
    if not isinstance(encoder, TorchEncoder) or encoder.origin is None:
        raise EncoderError(
            f"{encoder.source} cannot be trained: it was not loaded from a checkpoint, or is a "
            "model of timm, CLIP or open_clip, which medembed only embeds with."
        )
    if encoder.precision != "fp32":  # weights stay fp32 in training
        origin, encoder = encoder.origin, encoder.reference()
        encoder.origin = origin
    n_blocks = count_blocks(encoder)
    depths = read_depths(unfreeze, n_blocks, encoder.source)
    if recipe.lora is not None:
        depths = _choose_adapted(encoder, depths, recipe.lora)
    swept = None
    if from_run is not None:
        spec = spec_of(encoder, names or ("mean",))
        wanted = {"encoder": encoder.fingerprint, "preprocessing": dict(spec.preprocessing)}
        swept = read_swept_head(open_run(from_run), wanted, manifest.digest())
    poolings = _choose_poolings(encoder, names, swept)
    return FineTuneConfig(
        manifest=manifest,
        image_root=image_root,
        encoder=encoder,
        depths=depths,
        seeds=seeds,
        n_folds=n_folds,
        poolings=poolings,
        recipe=recipe,
        swept=swept,
        trunk_cache=None if trunk[0] is None else Path(trunk[0]),
        trunk_dtype=trunk[1],
        n_cut=None if trunk[0] is None else choose_cut(depths, n_blocks, encoder.source),
    )


def _choose_adapted(encoder: TorchEncoder, depths: Sequence[Depth], rank: int) -> list[Depth]:
    """Return depths with `all` read as all blocks, as only blocks have adapters; refuse none."""
    if not depths[-1].blocks:
        raise TrainingDataError(
            f"--lora {rank} puts adapters into the last blocks, and --unfreeze asks for none. Ask "
            "for a depth of at least 1, or omit --lora."
        )
    find_projections(encoder, depths[-1], rank)
    return [Depth(depth.blocks) for depth in depths]


def _refuse_changing_trunk(recipe: Hyperparameters) -> None:
    if recipe.augment:
        raise TrainingDataError(
            "--trunk-cache keeps the output of the frozen blocks, computed once, and excludes "
            "augmentation, which would change it every epoch. Add --no-augment, or omit it."
        )
    if recipe.from_scratch:
        raise TrainingDataError(
            "--trunk-cache keeps the output of a trained encoder's blocks; with --from-scratch "
            "they are random. Leave one of them out."
        )


def _choose_poolings(
    encoder: TorchEncoder, names: tuple[str, ...], swept: HeadInit | None
) -> tuple[str, ...]:
    if swept is not None and names and names != swept.poolings:
        raise TrainingDataError(
            f"--pool is {','.join(names)}, and the head of --from-run reads "
            f"{','.join(swept.poolings)}. Leave --pool out."
        )
    chosen = swept.poolings if swept is not None else names or DEFAULT_POOLINGS
    encoder.check_poolings(chosen)
    for name in chosen:
        if len(encoder.dimensions[name]) > 1 or not find_pooling(name).is_trained_through:
            raise TrainingDataError(
                f"--pool {name} cannot be trained: a head that trains with its encoder reads "
                f"single vectors of the tower, such as {','.join(DEFAULT_POOLINGS)}."
            )
    if len(set(chosen)) < len(chosen):
        raise TrainingDataError(f"--pool {','.join(chosen)} names a pooling twice.")
    return chosen


def describe(asked: FineTuneConfig, command: str) -> dict[str, Any]:
    """Return what `run.json` records in addition to the question."""
    encoder = asked.encoder
    return {
        "kind": "finetune",
        "seed": asked.seeds[0],
        "cv_method": CV_METHOD,
        "command": command,
        "versions": library_versions("finetune", *(["peft"] if asked.recipe.lora else [])),
        "encoder": {
            "source": public_name(encoder.source),
            "revision": encoder.revision,
            "precision": asked.recipe.precision,
            "device": encoder.device,
            "fingerprint": encoder.fingerprint,
            "preprocessing": dict(spec_of(encoder, asked.poolings).preprocessing),
        },
    }


def write_command(
    asked: FineTuneConfig,
    manifest: str,
    encoder: str,
    out: str,
    from_run: str | Path | None,
) -> str:
    """Return the command that repeats this training, without options that have defaults."""
    depths = ",".join("all" if d.everything else str(d.blocks) for d in asked.depths)
    words = ["medembed", "finetune", manifest, "--image-root", public_name(asked.image_root)]
    words += ["--encoder", encoder, "--unfreeze", depths, "--out", out]
    words += ["--from-run", public_name(from_run)] if from_run else []
    words += ["--trunk-cache", public_name(asked.trunk_cache)] if asked.trunk_cache else []
    if asked.trunk_cache and asked.trunk_dtype != TRUNK_DTYPE:
        words += ["--trunk-dtype", asked.trunk_dtype]
    words += ["--seeds", str(len(asked.seeds))] if len(asked.seeds) > 1 else []
    words += ["--pool", ",".join(asked.poolings), "--fit", asked.encoder.preprocessing.fit]
    words += [word for rule in asked.points for word in ("--operating-point", rule.name)]
    words += [*_recipe_words(asked.recipe), "--folds", str(asked.n_folds)]
    words += ["--precision", asked.recipe.precision, "--seed", str(asked.seeds[0])]
    return shlex.join(words)


def _recipe_words(recipe: Hyperparameters) -> Iterator[str]:
    usual = Hyperparameters()
    flags = {"flips": "--flips", "checkpointing": "--checkpointing"}
    flags |= {"from_scratch": "--from-scratch"}
    if not recipe.augment:
        yield "--no-augment"
    for name, value in recipe.as_dict().items():
        if value == getattr(usual, name) or name in ("augment", "precision"):
            continue
        yield flags.get(name, f"--{name.replace('_', '-')}")
        if name not in flags:
            yield str(value)
