"""What `medembed encoders` lists is what the loaded encoders offer."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_backbones import CONFIGS, save
from made_gemma import make_gemma

from medembed.cli import main
from medembed.encoders.backbones import BACKBONE_TYPES
from medembed.encoders.catalogue import FAMILIES, describe_families
from medembed.encoders.checkpoint_files import AUTOENCODER_TYPE, CLIP_TYPES, SIGLIP_TYPES
from medembed.encoders.loading import load_encoder


def listed(kind: str) -> list[dict[str, Any]]:
    return [family for family in describe_families() if kind in family["kinds"]]


def assert_offers(directory: Path, kind: str) -> None:
    own = json.loads((directory / "config.json").read_text())["model_type"]
    assert own == kind
    projector = ("mean", "projector") if kind == "gemma3" else ("mean",)
    dimensions = load_encoder(directory, device="cpu", poolings=projector).dimensions
    offered = {name if "@" not in name else f"{name.partition('@')[0]}@K" for name in dimensions}
    families = listed(kind)
    assert families
    for family in families:
        assert set(family["poolings"]) == offered, family["name"]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_each_backbone_offers_what_is_listed(tmp_path: Path, family: str) -> None:
    has_patches = "hidden_size" in CONFIGS[family]
    save(tmp_path, family, **({"patch_size": 8} if has_patches else {}))  # tokens for grid4
    assert_offers(tmp_path, json.loads((tmp_path / "config.json").read_text())["model_type"])


def test_medgemma_offers_what_is_listed(tmp_path: Path) -> None:
    make_gemma(tmp_path)
    assert_offers(tmp_path, "gemma3")


def test_every_kind_that_is_read_is_listed() -> None:
    kinds = {kind for family in FAMILIES for kind in family.kinds}
    assert kinds == {*BACKBONE_TYPES, *SIGLIP_TYPES, *CLIP_TYPES, AUTOENCODER_TYPE}


def test_the_command_lists_them_in_80_columns() -> None:
    ran = CliRunner().invoke(main, ["encoders"])
    assert ran.exit_code == 0
    assert "google/medgemma-4b-pt" in ran.stdout
    assert "Health AI Developer Foundations, gated" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 80
    document = json.loads(CliRunner().invoke(main, ["encoders", "--json"]).stdout)
    assert [family["name"] for family in document] == [family.name for family in FAMILIES]
