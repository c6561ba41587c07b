"""Names in datasets of a hub: which files a card means, what their classes are, what is shown."""

import io
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import NEW, OLD, Hub
from huggingface_hub import constants

from medembed.core.errors import ImageError, PathNotFoundError, StorageError
from medembed.dataset.build_record import FORMAT, VERSION, build_path, follow_build
from medembed.dataset.manifest import Manifest
from medembed.images.hub_dataset import (
    DatasetFiles,
    HubRoot,
    list_data_files,
    parse_hub_root,
    pin_commit,
)

if TYPE_CHECKING:
    from collections.abc import Callable

FILMS = "datasets/owner/films"


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


def labelled(*class_names: str) -> bytes:
    """Return a Parquet file with a column of labels, whose classes its schema may name."""
    table = pa.table({"image": [b"x", b"y"], "label": [0, 1]})
    features = {"label": {"names": list(class_names), "_type": "ClassLabel"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(about if class_names else {}), sink)
    return sink.getvalue()


def info(config: str, class_label: Any) -> dict[str, Any]:
    features = [{"name": "label", "dtype": {"class_label": class_label}}]
    return {"config_name": config, "features": features}


def card(*infos: dict[str, Any]) -> str:
    return f"dataset_info: {json.dumps(infos)}"


USUAL, TURNED = {"names": {"0": "ok", "1": "bent"}}, {"names": {"0": "bent", "1": "ok"}}
TWO = {"hands/a.parquet": labelled(), "feet/a.parquet": labelled()}


@pytest.mark.parametrize(
    ("infos", "subset"),
    [
        ([info("default", {"names": {"1": "ok", "2": "bent"}})], ""),
        ([info("default", {"names": {"no": "ok", "yes": "bent"}})], ""),
        ([info("one", USUAL), info("two", TURNED)], "hands"),
        ([info("one", USUAL), info("two", None)], "hands"),
        ([info("hands", USUAL), info("legs", None)], "feet"),
    ],
)
def test_names_of_classes_without_their_numbers_are_refused(
    hub: Hub, infos: list[dict[str, Any]], subset: str
) -> None:
    with pytest.raises(ImageError, match="classes of column 'label', and not clearly which number"):
        found(hub, TWO, card(*infos), subset)
    own = dict.fromkeys(TWO, labelled("bent", "ok"))
    assert not found(hub, own, card(*infos), subset).class_names["label"]


@pytest.mark.parametrize(
    ("infos", "subset", "expected"),
    [
        ([info("hands", USUAL), info("feet", TURNED)], "feet", {"label": ("bent", "ok")}),
        ([info("one", USUAL), info("two", USUAL)], "feet", {"label": ("ok", "bent")}),
        ([info("one", USUAL)], "feet", {"label": ("ok", "bent")}),
        ([info("one", None)], "", {}),
    ],
)
def test_names_of_classes_are_of_the_subset(
    hub: Hub, infos: list[dict[str, Any]], subset: str, expected: dict[str, tuple[str, ...]]
) -> None:
    listed = found(hub, TWO, card(*infos), subset)
    assert (listed.class_names, listed.problem) == (expected, "")


def test_a_retry_that_answers_with_other_content_is_refused(hub: Hub) -> None:
    (file,) = found(hub, {"a.png": bytes(300_000)}).files
    hub.cut_after = lambda request: 100_000 if len(hub.asked("GET", "a.png")) == 1 else None
    hub.etag_of = lambda body: f"tag{len(hub.asked('GET', 'a.png'))}"
    with file.open() as handle, pytest.raises(StorageError, match=r"a\.png .* changed at the hub"):
        handle.read1(300_000)


@pytest.mark.parametrize("revision", ["", "v1", "feature/x", "refs/heads/é", "refs/pr/1", "a%2Fb"])
@pytest.mark.parametrize("subset", ["", "hands/left"])
def test_an_address_is_read_as_it_is_written(revision: str, subset: str) -> None:
    root = HubRoot("owner/films", revision, subset)
    assert parse_hub_root(str(root)) == root


def test_an_image_is_read_with_one_request(hub: Hub) -> None:
    image = random.Random(0).randbytes(100_000)
    (file,) = found(hub, {"a.png": image}).files
    with file.open() as handle:
        assert handle.read() == image
        assert handle.read() == b""
    assert len(hub.asked("GET", "a.png")) == 1


def test_a_revision_that_is_asked_for_is_read(hub: Hub, tmp_path: Path) -> None:
    hub.put(FILMS, {"a.png": b"x"})
    hub.repos[FILMS][OLD] = {"a.png": b"y"}
    hub.branches[FILMS] = {"main": NEW, "v1": OLD, "same": NEW}
    rows = pd.DataFrame({"image": ["a.png"], "study": ["s"], "patient": ["p"], "label": [1]})
    manifest = Manifest(rows.assign(region="all", split="train"), "study")
    document = {"format": FORMAT, "version": VERSION, "manifest": manifest.digest()}
    stream = {"kind": "hub", "dataset": "owner/films", "commit": NEW, "revision": None}
    build_path(tmp_path / "m.csv").write_text(json.dumps({**document, "stream": stream}))
    told: list[str] = []

    def follow(revision: str) -> Any:
        root = HubRoot("owner/films", revision)
        return follow_build(root, tmp_path / "m.csv", manifest, told.append)

    for revision in ("", "main", "same", NEW):
        assert follow(revision).revision == NEW
    assert told == []
    assert follow("v1").revision == OLD
    assert follow("gone").revision == "gone"  # and who reads it says so
    assert told == [
        f"hf://datasets/owner/films@v1 is read, commit {OLD[:12]}; the manifest was built from "
        f"commit {NEW[:12]}."
    ]


@pytest.mark.parametrize("status", [0, 403, 404, 418, 429, 500])
def test_a_password_in_hf_endpoint_is_not_shown(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    address = hub.address.replace("://", "://user:pass@word@")
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    (file,) = found(hub, {"a.png": b"x"}).files
    hub.status_for = lambda request: status or None
    hub.cut_after = lambda request: 0
    calls: list[Callable[[], Any]] = [
        lambda: file.open().read(),
        lambda: pin_commit(HubRoot("owner/films", "v1")),
    ]
    for call in calls:
        with pytest.raises(StorageError) as caught:
            call()
        assert "pass" not in str(caught.value)
        assert "word" not in str(caught.value)
