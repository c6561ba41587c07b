"""Files of a checkpoint that are no plain files: one error at once, where a read would not end."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_towers import INDEX, NESTING, PROCESSOR, WEIGHTS, quiet, save

from medembed.autoencoder.checkpoint import CheckpointDir
from medembed.core.errors import EncoderError
from medembed.encoders.hub import describe_remote
from medembed.encoders.loading import load_encoder
from medembed.finetuning.training import read_state


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """End a test that waits at a pipe, by an error."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def bind(path: Path) -> None:
    """Make a socket; its address may have 107 bytes, so that it is bound where it lies."""
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


KINDS: dict[str, Callable[[Path], object]] = {
    "named pipe": os.mkfifo,
    "socket": bind,
    "directory": os.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    for kind in ("siglip", "vit"):
        save(root / kind, kind)
        save(root / f"{kind}-sharded", kind, max_shard_size="6KB")
    return root


def put(directory: Path, name: str, kind: str) -> Path:
    path = directory / name
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["siglip", "vit"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("config.json", ""),
        (PROCESSOR, ""),
        (NESTING, ""),
        (WEIGHTS, ""),
        (INDEX, ""),
        (INDEX, "-sharded"),
        (WEIGHTS, "-sharded"),
        ("model-00001-of-", "-sharded"),
        ("base.json", ""),
        ("changed.safetensors", ""),
    ],
)
def test_what_is_no_file_is_one_error(
    made: Path, tmp_path: Path, family: str, name: str, layout: str, kind: str
) -> None:
    target = Path(shutil.copytree(made / f"{family}{layout}", tmp_path / "target"))
    name = next((path.name for path in target.glob(f"{name}*")), name)
    put(target, name, kind)
    with pytest.raises(EncoderError) as told:
        load_encoder(target, device="cpu")
    said = f"{name} of target cannot be read: it is a {kind}, not a file."
    assert str(told.value) == said
    if name in (WEIGHTS, INDEX, "config.json"):  # as doctor looks at it
        with pytest.raises(EncoderError, match="cannot be read"):
            describe_remote(target)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_not_read_do_not_matter(made: Path, tmp_path: Path, kind: str) -> None:
    target = Path(shutil.copytree(made / "vit", tmp_path / "target"))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.txt"):
        put(target, name, kind)
    found = load_encoder(target, device="cpu")
    assert found.fingerprint == load_encoder(made / "vit", device="cpu").fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_no_file_is_still_an_adapter(
    made: Path, tmp_path: Path, kind: str
) -> None:
    target = Path(shutil.copytree(made / "siglip", tmp_path / "target"))
    put(target, "adapter_config.json", kind)
    with pytest.raises(EncoderError, match="holds a model and an adapter of PEFT"):
        load_encoder(target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["base.json", "changed.safetensors", "config.json"])
def test_an_adapted_encoder_of_no_files_is_one_error(
    made: Path, tmp_path: Path, name: str, kind: str
) -> None:
    target = Path(shutil.copytree(made / "siglip", tmp_path / "adapted"))
    (target / WEIGHTS).unlink()
    base = {"format": "medembed-adapted-encoder", "version": 1, "base": None, "fingerprint": "f"}
    base |= {"base_directory": os.path.relpath(made / "siglip", target), "base_fingerprint": "f"}
    (target / "base.json").write_text(json.dumps(base))
    (target / "changed.safetensors").write_bytes(b"")
    put(target, name, kind)
    with pytest.raises(EncoderError, match=rf"{name} of adapted cannot be read: it is a {kind}"):
        load_encoder(target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", PROCESSOR, WEIGHTS])
def test_an_autoencoder_of_no_files_is_one_error(tmp_path: Path, name: str, kind: str) -> None:
    target = tmp_path / "coder"
    target.mkdir()
    config: dict[str, Any] = {"model_type": "medembed-autoencoder", "image_size": 16, "fit": "pad"}
    config |= {"widths": [8, 8], "latent_channels": 4, "norm_groups": 8}
    (target / "config.json").write_text(json.dumps(config))
    with quiet():
        from transformers import ViTImageProcessorPil

        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(target)
    put(target, name, kind)
    with pytest.raises(EncoderError, match=rf"{name} of coder cannot be read: it is a {kind}"):
        load_encoder(target, fit="pad")


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_training_that_is_no_file_is_none(tmp_path: Path, kind: str) -> None:
    assert read_state(put(tmp_path, "state.safetensors", kind), "key") is None
    place = CheckpointDir(tmp_path / "out", {"size": 64})
    place.path.mkdir()
    put(place.path, "state.safetensors", kind)
    assert place.load() is None


@pytest.mark.parametrize("name", ["config.json", PROCESSOR, INDEX])
def test_a_file_without_end_is_not_read(made: Path, tmp_path: Path, name: str) -> None:
    target = Path(shutil.copytree(made / "siglip-sharded", tmp_path / "target"))
    os.truncate(target / name, 1 << 40)  # takes no room on the disk
    with pytest.raises(EncoderError, match=rf"{name} of target cannot be read: it has 1,099,511"):
        load_encoder(target)


def test_links_to_plain_files_are_read_and_links_to_nothing_are_not(
    made: Path, tmp_path: Path
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in (made / "siglip").iterdir():
        (linked / path.name).symlink_to(path)
    whole = load_encoder(made / "siglip", device="cpu").fingerprint
    assert load_encoder(linked, device="cpu").fingerprint == whole
    (linked / WEIGHTS).unlink()
    (linked / WEIGHTS).symlink_to("nowhere")
    with pytest.raises(EncoderError, match=r"linked holds neither model\.safetensors nor"):
        load_encoder(linked)
    (linked / WEIGHTS).unlink()
    (linked / WEIGHTS).symlink_to(WEIGHTS)
    with pytest.raises(EncoderError, match=rf"{WEIGHTS} of linked cannot be read: Too many levels"):
        load_encoder(linked)
