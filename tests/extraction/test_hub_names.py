"""Names in datasets of a hub: which files a card means, what their classes are, what is shown."""

import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import NEW, Hub, serving
from huggingface_hub import constants

from medembed.core import hub_http
from medembed.core.errors import PathNotFoundError
from medembed.images.hub_dataset import DatasetFiles, HubRoot, list_data_files

FILMS = "datasets/owner/films"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub that this process's huggingface_hub asks."""
    list_data_files.cache_clear()
    with serving(Hub()) as hub:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_http, "_PAUSES", (0.01, 0.01))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def found(hub: Hub, files: dict[str, bytes], card: str = "", subset: str = "") -> DatasetFiles:
    """Return what a dataset holds."""
    list_data_files.cache_clear()
    about = {"README.md": f"---\n{card}\n---\n".encode()} if card else {}
    hub.put(FILMS, {**files, **about})
    return list_data_files(HubRoot("owner/films", NEW, subset))


def names(listed: DatasetFiles) -> list[str]:
    return [file.name for file in listed.files]


def test_a_pattern_without_files_is_not_the_whole_repository(hub: Hub) -> None:
    files = {"masks/a.png": b"x", "films/a.png": b"x"}
    for pattern in ("images/*.png", "films/{a,b}.png"):
        card = f"configs: [{{config_name: hands, data_files: '{pattern}'}}]"
        with pytest.raises(PathNotFoundError, match=r"'hands' has files like .* and none is at"):
            found(hub, files, card)
    card = "configs: [{config_name: hands, data_files: [{split: train, path: []}]}]"
    with pytest.raises(PathNotFoundError, match="holds no Parquet"):
        found(hub, files, card)


def test_patterns_stay_in_a_folder_and_hidden_files_are_no_images(hub: Hub) -> None:
    shown = ["images/a.png", "images/b/c.png", "images/masks/a.png"]
    hidden = ["images/._a.png", "images/.ipynb_checkpoints/a.png", ".cache/images/a.png"]
    files = dict.fromkeys([*shown, *hidden, "train/images/a.png"], b"x")
    for pattern, expected in {
        "images/*.png": shown[:1],
        "images/**": shown,
        "./images/**/a.png": [shown[0], shown[2]],
        "images/**a.png": [shown[0], shown[2]],
        "**/images/?.png": [shown[0], "train/images/a.png"],
        "images/[!b]*/*": shown[2:],
        "images/.*.png": hidden[:1],
    }.items():
        card = f"configs: [{{config_name: hands, data_files: '{pattern}'}}]"
        assert names(found(hub, files, card)) == expected, pattern
    card = "configs: [{config_name: hands, data_dir: ./images}]"
    assert names(found(hub, files, card)) == shown
    assert names(found(hub, files)) == [*shown, "train/images/a.png"]
    assert names(found(hub, files, subset="images")) == shown
    assert names(found(hub, files, subset="images/.ipynb_checkpoints")) == [hidden[1]]
    assert names(found(hub, files, subset=hidden[0])) == [hidden[0]]
