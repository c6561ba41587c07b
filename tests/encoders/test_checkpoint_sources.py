"""Two files of a checkpoint that tell the same thing: what transformers takes, or a refusal."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, ask, serving
from made_towers import INDEX, NESTING, PROCESSOR, SIDE, WEIGHTS, make_model, quiet, rename, save
from safetensors.torch import load_file, save_file

from medembed.core.errors import EncoderError
from medembed.encoders.loading import load_encoder
from medembed.encoders.preprocessing import read_preprocessing

SHARDED = {"max_shard_size": "6KB"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Old and new weights of each kind, the old ones in shards."""
    root = tmp_path_factory.mktemp("made")
    for kind in ("siglip", "gemma", "vit"):
        save(root / f"{kind}-old", kind, 0, **SHARDED)
        save(root / f"{kind}-new", kind, 1)
        assert len(list((root / f"{kind}-old").glob("model-*.safetensors"))) > 1
    return root


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub


def mark(directory: Path) -> str:
    return str(load_encoder(directory, device="cpu").fingerprint)


def lay_over(first: Path, second: Path, target: Path) -> Path:
    shutil.copytree(first, target)
    return Path(shutil.copytree(second, target, dirs_exist_ok=True))


def theirs(directory: Path) -> torch.Tensor:
    """Read the bias of the last norm as transformers does."""
    from transformers import AutoModel

    with quiet():
        state = AutoModel.from_pretrained(directory).state_dict()
    return next(
        v for k, v in state.items() if k.endswith(("post_layernorm.bias", "layernorm.bias"))
    )


def ours(directory: Path) -> torch.Tensor:
    encoder: Any = load_encoder(directory, device="cpu")
    return next(v for k, v in encoder.stored_tensors().items() if k.endswith("layernorm.bias"))


def touch(directory: Path, pattern: str, seconds: int) -> None:
    for path in directory.glob(pattern):
        os.utime(path, (seconds, seconds))


@pytest.mark.parametrize("kind", ["siglip", "gemma"])
def test_one_file_copied_over_old_shards_is_read(made: Path, tmp_path: Path, kind: str) -> None:
    both = lay_over(made / f"{kind}-old", made / f"{kind}-new", tmp_path / "both")
    touch(both, "model*", 1_000_000)
    touch(both, WEIGHTS, 2_000_000)
    assert mark(both) == mark(made / f"{kind}-new") != mark(made / f"{kind}-old")
    assert torch.equal(ours(both), theirs(both))


@pytest.mark.parametrize("kind", ["siglip", "gemma", "vit"])
@pytest.mark.parametrize("left", [0, 1])
def test_an_index_whose_shards_are_gone_is_not_asked(
    made: Path, tmp_path: Path, kind: str, left: int
) -> None:
    both = lay_over(made / f"{kind}-old", made / f"{kind}-new", tmp_path / "both")
    for shard in sorted(both.glob("model-*.safetensors"))[left:]:
        shard.unlink()
    touch(both, INDEX, 4_000_000_000)
    assert mark(both) == mark(made / f"{kind}-new")
    assert torch.equal(ours(both), theirs(both))


def test_saving_over_itself_is_read(tmp_path: Path) -> None:
    save(tmp_path / "one", "siglip", 0, **SHARDED)
    save(tmp_path / "one", "siglip", 1)
    assert (tmp_path / "one" / INDEX).is_file()
    assert mark(tmp_path / "one") == mark(save(tmp_path / "other", "siglip", 1))


@pytest.mark.parametrize("kind", ["siglip", "gemma", "vit"])
@pytest.mark.parametrize("newer", [INDEX, "model-0*"])
def test_shards_that_are_newer_than_the_one_file_are_not_passed_over(
    made: Path, tmp_path: Path, kind: str, newer: str
) -> None:
    both = lay_over(made / f"{kind}-new", made / f"{kind}-old", tmp_path / "both")
    touch(both, "model*", 1_000_000)
    touch(both, newer, 1_000_001)
    with pytest.raises(
        EncoderError, match=rf"both holds .*{WEIGHTS}.* Keep one of the two"
    ) as told:
        load_encoder(both)
    assert INDEX in str(told.value)


def repository(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", ["siglip", "gemma", "vit"])
def test_the_hub_gives_what_the_directory_gives(
    hub: Hub, made: Path, tmp_path: Path, kind: str
) -> None:
    both = lay_over(made / f"{kind}-old", made / f"{kind}-new", tmp_path / "both")
    hub.put("x/both", repository(both))
    hub.put("x/new", repository(made / f"{kind}-new"))
    refs = ("x/both", "x/new")
    answers = ask(hub.address, tmp_path / "home", *refs, TEST_TOLD="1")
    assert not [request for request in hub.requests if "model-0" in request.path]
    assert (
        len({mark(Path(answer["path"])) for answer in answers} | {mark(made / f"{kind}-new")}) == 1
    )
    sizes = ask(hub.address, tmp_path / "anew", *refs, TEST_DESCRIBE="1")
    assert sizes[0]["tower_bytes"] == sizes[1]["tower_bytes"]


@pytest.mark.parametrize("kind", ["siglip", "vit"])
@pytest.mark.parametrize(
    "change",
    [{"transformers_weights": "other.safetensors"}, {"configuration_files": ["config.4.0.0.json"]}],
)
def test_a_config_that_names_other_files_is_refused(
    hub: Hub, made: Path, tmp_path: Path, kind: str, change: dict[str, object]
) -> None:
    target = Path(shutil.copytree(made / f"{kind}-new", tmp_path / "named"))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(EncoderError, match=f"config.json of named names other .* in {min(change)}"):
        load_encoder(target)
    hub.put("x/named", repository(target))
    (answer,) = ask(hub.address, tmp_path / "home", "x/named")
    assert "config.json of x/named names other" in answer["error"]


def test_a_towers_config_with_another_tower_in_it_is_refused(made: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(made / "siglip-new", tmp_path / "nested"))
    config = json.loads((target / "config.json").read_text())
    for nested, is_other in (({}, False), (dict(config), False), ({"layer_norm_eps": 1e-5}, True)):
        (target / "config.json").write_text(json.dumps({**config, "vision_config": nested}))
        if is_other:
            with pytest.raises(EncoderError, match="describes two towers: layer_norm_eps is 1e-06"):
                load_encoder(target)
        else:
            assert mark(target) == mark(made / "siglip-new")


def test_quantised_weights_of_a_backbone_are_refused(made: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(made / "vit-new", tmp_path / "quantised"))
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="quanti"):
        load_encoder(target)


def processor(directory: Path, name: str = PROCESSOR, **changes: object) -> Path:
    """Write a processor's file, nested where it is processor_config.json."""
    config: dict[str, object] = {"image_processor_type": "SiglipImageProcessor", "resample": 2}
    config |= {"size": {"height": SIDE, "width": SIDE}, "rescale_factor": 1 / 255}
    config |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **changes}
    config = {key: value for key, value in config.items() if value is not None}
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(
        json.dumps({"image_processor": config} if name == NESTING else config)
    )
    return directory


DIFFERENT: list[dict[str, object]] = [
    {"size": {"height": SIDE, "width": 2 * SIDE}},
    {"resample": 3},
    {"resample": None},  # bicubic, by its class
    {"image_mean": [0.485, 0.456, 0.406]},
    {"image_std": [0.5, 0.5, 0.25]},
    {"rescale_factor": 1 / 127.5},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_pan_and_scan": True},
    {"size": {"shortest_edge": SIDE}},
]


@pytest.mark.parametrize("which", [PROCESSOR, NESTING])
@pytest.mark.parametrize("change", DIFFERENT, ids=str)
def test_two_processors_that_disagree_are_both_named(
    tmp_path: Path, which: str, change: dict[str, object]
) -> None:
    for name in (PROCESSOR, NESTING):
        processor(tmp_path / "two", name, **(change if name == which else {}))
    with pytest.raises(EncoderError, match=r"(disagree|asks for|fixed height)") as told:
        read_preprocessing(tmp_path / "two")
    if which == PROCESSOR or "disagree" in str(told.value):
        assert f"{NESTING} and {PROCESSOR} of two disagree" in str(told.value)


def test_two_processors_that_agree_are_one_and_transformers(tmp_path: Path) -> None:
    from transformers import SiglipImageProcessorPil

    two = processor(processor(tmp_path / "two", image_mean=0.5, do_convert_rgb=True), NESTING)
    found = read_preprocessing(two)
    assert found == read_preprocessing(processor(tmp_path / "one"))
    mine = SiglipImageProcessorPil.from_pretrained(two)
    assert (mine.size["height"], int(mine.resample)) == (found.height, 2)


def test_a_processor_config_that_nests_none_says_nothing_of_images(tmp_path: Path) -> None:
    one = processor(tmp_path / "one")
    alone = read_preprocessing(one)
    for text in (
        '{"processor_class": "x", "image_seq_length": 256}',
        '{"image_processor": null}',
        "[]",
    ):
        (one / NESTING).write_text(text)
        assert read_preprocessing(one) == alone
    (one / NESTING).write_text('{"image_processor": {"resample": 3}}')
    with pytest.raises(EncoderError, match=f"image_processor of {NESTING} holds no image size"):
        read_preprocessing(one)
    # One file that says it twice: transformers reads what stands on top of this one.
    (one / NESTING).unlink()
    config = json.loads((one / PROCESSOR).read_text())
    (one / PROCESSOR).write_text(
        json.dumps({**config, "image_processor": {**config, "resample": 3}})
    )
    assert read_preprocessing(one) == alone


def test_processors_of_the_hub_are_compared_too(hub: Hub, made: Path, tmp_path: Path) -> None:
    two = Path(shutil.copytree(made / "siglip-new", tmp_path / "two"))
    processor(two, NESTING, image_mean=[0.1, 0.2, 0.3])
    hub.put("x/two", repository(two))
    (answer,) = ask(hub.address, tmp_path / "home", "x/two", TEST_TOLD="1")
    assert {PROCESSOR, NESTING} < set(answer["files"])
    for directory, name in ((two, "two"), (Path(answer["path"]), "x/two")):
        with pytest.raises(
            EncoderError, match=f"of {name} disagree on how images are prepared: resample"
        ):
            load_encoder(directory)


Name = Callable[[str], str]


def inside(name: str) -> str:
    """Wrap a layer and, in it, a module, as activation checkpointing and FSDP do."""
    name = name.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")
    name = name.replace("layer.0.", "layer.0._fsdp_wrapped_module.")
    return name.replace("layernorm.", "layernorm._orig_mod.")


WRAPPERS: dict[str, Name] = {
    "ddp": lambda name: f"module.{name}",
    "compile": lambda name: f"_orig_mod.{name}",
    "compiled ddp": lambda name: f"module._orig_mod.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "ddp of peft of a model": lambda name: f"module.base_model.model.model.{name}",
    "trainer": lambda name: f"model.{name}",
    "inside": inside,
}


@pytest.mark.parametrize("kind", ["siglip", "gemma", "vit"])
@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_what_is_in_wrappers_is_the_same_encoder(
    made: Path, tmp_path: Path, kind: str, wrapper: str
) -> None:
    plain = made / f"{kind}-new"
    wrapped = rename(plain, tmp_path / "wrapped", WRAPPERS[wrapper])
    assert set(load_file(wrapped / WEIGHTS)) != set(load_file(plain / WEIGHTS))
    assert mark(wrapped) == mark(plain)
    assert torch.equal(ours(wrapped), theirs(plain))


@pytest.mark.parametrize("prefix", ["model.vision_model.", "vision_model.", "model.vision_tower."])
def test_a_tower_under_the_names_of_another_model_is_the_same(
    made: Path, tmp_path: Path, prefix: str
) -> None:
    named = rename(made / "siglip-new", tmp_path / "named", lambda name: f"{prefix}{name}")
    assert mark(named) == mark(made / "siglip-new")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its own
@pytest.mark.parametrize("kind", ["siglip", "vit"])
def test_wrappers_of_torch_itself_are_taken_off(tmp_path: Path, made: Path, kind: str) -> None:
    model = make_model(kind, 1)
    marks = []
    for module in (model, torch.compile(model), torch.nn.DataParallel(torch.compile(model))):
        target = tmp_path / str(len(marks))
        shutil.copytree(made / f"{kind}-new", target)
        save_file(module.state_dict(), target / WEIGHTS, {"format": "pt"})
        marks.append(mark(target))
    assert len(set(marks)) == 1


def test_a_wrapped_tower_of_the_hub_is_the_same(hub: Hub, made: Path, tmp_path: Path) -> None:
    wrapped = rename(made / "gemma-new", tmp_path / "w", WRAPPERS["ddp of peft of a model"])
    hub.put("x/wrapped", repository(wrapped))
    (answer,) = ask(hub.address, tmp_path / "home", "x/wrapped", TEST_TOLD="1", TEST_PROJECTOR="1")
    assert "medembed-projector.safetensors" in answer["files"]
    fetched = load_encoder(answer["path"], device="cpu", poolings=["projector"])
    whole = load_encoder(made / "gemma-new", device="cpu", poolings=["projector"])
    assert fetched.fingerprint == whole.fingerprint


@pytest.mark.parametrize("kind", ["siglip", "gemma", "vit"])
def test_two_tensors_of_one_name_are_refused(made: Path, tmp_path: Path, kind: str) -> None:
    twice = Path(shutil.copytree(made / f"{kind}-new", tmp_path / "twice"))
    tensors = load_file(twice / WEIGHTS)
    name = next(name for name in tensors if name.endswith("layernorm.bias"))
    save_file({**tensors, f"module.{name}": tensors[name] + 1}, twice / WEIGHTS, {"format": "pt"})
    with pytest.raises(EncoderError, match=rf"twice holds \S+ twice, as \S+ of {WEIGHTS} and as"):
        load_encoder(twice)


@pytest.mark.parametrize("kind", ["siglip", "vit"])
def test_a_tensor_that_one_file_describes_twice_is_refused(
    made: Path, tmp_path: Path, kind: str
) -> None:
    """safetensors takes the second in silence, also where it has other bytes."""
    twice = Path(shutil.copytree(made / f"{kind}-new", tmp_path / "twice"))
    data = (twice / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].decode().rstrip()
    name = next(name for name in json.loads(header) if name.endswith("layernorm.bias"))
    other = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    header = f'{{"{name}":{json.dumps(other)},{header[1:]}'
    header += " " * (-len(header) % 8)
    (twice / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[end:])
    with pytest.raises(EncoderError, match=rf"{WEIGHTS} of twice .* it describes {name} twice"):
        load_encoder(twice)


def test_a_backbones_tensor_with_and_without_its_prefix_is_refused(
    made: Path, tmp_path: Path
) -> None:
    twice = Path(shutil.copytree(made / "vit-new", tmp_path / "twice"))
    tensors = load_file(twice / WEIGHTS)
    both = {**tensors, "vit.layernorm.bias": tensors["layernorm.bias"] + 1}
    save_file(both, twice / WEIGHTS, {"format": "pt"})
    with pytest.raises(EncoderError, match="twice, as"):
        load_encoder(twice)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of transformers
@pytest.mark.parametrize("kind", ["siglip", "vit"])
def test_adapters_of_peft_are_said_to_be_adapters(made: Path, tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj"] if kind == "siglip" else ["q_proj", "query", "v_proj", "value"]
    adapted = peft.get_peft_model(make_model(kind, 1), peft.LoraConfig(target_modules=targets))
    with quiet():
        adapted.save_pretrained(tmp_path / "alone")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(
        os.listdir(tmp_path / "alone")
    )
    with pytest.raises(EncoderError, match=r"alone is an adapter of PEFT .*merge_and_unload"):
        load_encoder(tmp_path / "alone")
    beside = lay_over(made / f"{kind}-new", tmp_path / "alone", tmp_path / "beside")
    with pytest.raises(EncoderError, match=r"beside holds a model and an adapter of PEFT"):
        load_encoder(beside)
    unmerged = Path(shutil.copytree(made / f"{kind}-new", tmp_path / "unmerged"))
    save_file(adapted.state_dict(), unmerged / WEIGHTS, {"format": "pt"})
    with pytest.raises(EncoderError, match=r"with an adapter of PEFT in it .*merge_and_unload"):
        load_encoder(unmerged)
    merged = Path(shutil.copytree(made / f"{kind}-new", tmp_path / "merged"))
    with quiet():
        adapted.merge_and_unload().save_pretrained(merged)
    assert mark(merged) == mark(made / f"{kind}-new")  # an adapter that nobody trained adds zero


def test_adapters_of_the_hub_are_said_to_be_adapters(hub: Hub, made: Path, tmp_path: Path) -> None:
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
    hub.repos = {
        "x/alone": {"b" * 40: adapter},
        "x/beside": {"b" * 40: {**repository(made / "gemma-new"), **adapter}},
    }
    hub.branches = {name: {"main": "b" * 40} for name in hub.repos}
    said = [a["error"] for a in ask(hub.address, tmp_path / "home", "x/alone", "x/beside")]
    assert said[0].startswith("x/alone is an adapter of PEFT")
    assert said[1].startswith("x/beside holds a model and an adapter of PEFT")
    assert not hub.asked("GET", ".safetensors")


def test_an_adapted_encoder_with_weights_of_its_own_is_refused(made: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(made / "siglip-new", tmp_path / "adapted"))
    base = {"format": "medembed-adapted-encoder", "version": 1, "base": None}
    base |= {"base_directory": "../x", "base_fingerprint": "f", "fingerprint": "f"}
    (target / "changed.safetensors").write_bytes(b"")
    with pytest.raises(EncoderError, match=r"holds changed.safetensors and no base.json"):
        load_encoder(target)
    (target / "base.json").write_text(json.dumps(base))
    with pytest.raises(
        EncoderError, match=rf"adapted holds two encoders: {WEIGHTS}, and base.json"
    ):
        load_encoder(target)
