"""The doctor: one line for each thing that an extraction will need, with what to do."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from hub_server import Hub, serving
from made_checkpoints import sharded

from medembed import __version__, doctor
from medembed.cli import main
from medembed.core.errors import EncoderError
from medembed.dataset.manifest import Manifest, write_manifest
from medembed.encoders import devices
from medembed.encoders.loading import choose_device
from medembed.extraction.report import describe_execution

REF = "google/medgemma"
USAGE = namedtuple("USAGE", "total used free")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def ask(hub_address: str, home: Path, *options: str, **environment: str) -> dict[str, doctor.Check]:
    """Run the command as a user would, against a hub: it reads its address at import."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    kept |= {"HF_ENDPOINT": hub_address, "HF_HOME": str(home), "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", "medembed", "doctor", *options, "--json"],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=home.parent,
    )
    checks = [doctor.Check(**check) for check in json.loads(done.stdout)["checks"]]
    assert done.returncode == (0 if all(check.ok for check in checks) else 1)
    assert all(bool(check.remedy) != check.ok for check in checks)
    return by_name(checks)


def test_the_demo_encoder_will_do_here() -> None:
    checks = by_name(doctor.examine("demo"))
    assert all(check.ok for check in checks.values())
    assert "on this machine" in checks["encoder"].detail
    assert "40,005 images (MURA's)" in checks["disk (cache)"].detail
    assert checks["precision"].detail.startswith(("fp32", "bf16"))


def test_without_an_encoder_only_the_machine_is_looked_at() -> None:
    names = set(by_name(doctor.examine()))
    machine = {"python", "libraries", "dicom", "device", "precision", "token", "disk (cache)"}
    assert names == machine


def test_an_open_repository_is_described_without_fetching_its_weights(
    hub: Hub, tmp_path: Path
) -> None:
    hub.put(REF, sharded())
    checks = ask(hub.address, tmp_path / "home", "--encoder", REF)
    assert checks["encoder"].ok
    assert "to be downloaded" in checks["encoder"].detail
    assert checks["disk (hub)"].ok
    assert checks["token"].ok
    assert hub.sent < sum(map(len, hub.repos[REF]["b" * 40].values())) / 2


def test_a_gate_is_told_with_the_way_through_it(hub: Hub, tmp_path: Path) -> None:
    hub.put(REF, sharded())
    hub.tokens[REF] = "Bearer hf_right"
    refused = ask(hub.address, tmp_path / "home", "--encoder", REF)
    assert not refused["encoder"].ok
    assert not refused["token"].ok
    assert "accept its terms" in refused["encoder"].remedy
    assert "HF_TOKEN" in refused["token"].remedy
    opened = ask(hub.address, tmp_path / "home", "--encoder", REF, HF_TOKEN="hf_right")
    assert opened["encoder"].ok
    assert opened["token"].detail == "set"


def test_no_connection_is_told(tmp_path: Path) -> None:
    checks = ask("http://127.0.0.1:9", tmp_path / "home", "--encoder", REF)
    assert not checks["encoder"].ok
    assert "cannot be reached" in checks["encoder"].remedy


@pytest.mark.parametrize(("digests", "n"), [(["a", "b", "a"], 2), (["", "", ""], 3)])
def test_the_disk_is_measured_for_the_distinct_images_of_a_manifest(
    digests: list[str], n: int, tmp_path: Path
) -> None:
    rows = pd.DataFrame(
        {
            "image": [f"{i}.png" for i in range(3)],
            "sha256": [digest * 64 for digest in digests],
            "patient": "p",
            "study": "s",
            "region": "hand",
            "label": pd.array([0] * 3, dtype="Int8"),
            "split": "train",
        }
    )
    write_manifest(Manifest(rows, "study"), tmp_path / "m.csv")
    checks = by_name(doctor.examine("demo", manifest=tmp_path / "m.csv", cache=tmp_path / "cache"))
    assert f"mean, max of {n} images" in checks["disk (cache)"].detail


def test_too_little_memory_and_disk_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: USAGE(100, 90, 10))
    monkeypatch.setattr(doctor, "_free_memory", lambda _device: 1_000)
    checks = by_name(doctor.examine("demo"))
    assert not checks["memory"].ok
    assert not checks["disk (cache)"].ok
    assert "--cache" in checks["disk (cache)"].remedy


def test_memory_is_that_of_the_tower_its_reference_and_one_image() -> None:
    vision = {"image_size": 896, "patch_size": 14, "hidden_size": 1152, "intermediate_size": 4304}
    config = {"model_type": "gemma3", "dtype": "bfloat16", "vision_config": vision}
    found = doctor.RemoteCheckpoint("google/medgemma-4b-pt", None, False, 833_700_000, config)
    one_image = 4096 * (4304 + 8 * 1152) * 4
    assert doctor._needed_bytes(found, "bf16") == 416_850_000 * (2 + 4) + one_image
    assert doctor._needed_bytes(found, "fp32") == 416_850_000 * 4 + one_image
    assert doctor._columns(config, "grid4") == 16 * 1152


def test_lines_fit_a_terminal_and_failures_say_what_to_do() -> None:
    checks = [doctor.Check("token", True, "set"), doctor.Check("disk", False, "full", "Free some.")]
    assert list(doctor.lines(checks)) == [
        "ok  token  set",
        "NO  disk   full",
        "           -> Free some.",
    ]
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 0
    assert done.stdout.startswith("ok  python")


def test_codecs_of_dicom_are_listed_and_missing_ones_with_their_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = by_name(doctor.examine())["dicom"]
    assert check.ok
    assert check.detail.startswith("uncompressed, RLE, JPEG, JPEG of 12 bits, lossless JPEG")
    from medembed.images.dicom import codecs

    monkeypatch.setattr(codecs, "find_spec", lambda _: None)
    check = by_name(doctor.examine())["dicom"]
    assert check.ok  # whoever has no such files needs no codec
    assert "not JPEG of 12 bits, lossless JPEG" in check.detail
    assert "pip install 'medembed[dicom]'" in check.detail


def fake_driver(monkeypatch: pytest.MonkeyPatch, *, built_for: str | None, says: str) -> None:
    """Pretend that the machine has an NVIDIA driver which torch makes nothing of."""
    monkeypatch.setattr(devices, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def init() -> None:
        raise RuntimeError(says)

    monkeypatch.setattr(torch.cuda, "init", init)


TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version"
)


@pytest.mark.parametrize(
    ("built_for", "says", "visible", "detail", "remedy"),
    [
        (None, "", None, "is a build without CUDA", "make setup TORCH=torch==2.13.0"),
        ("13.0", TOO_OLD, None, "too old (found version 11040)", "for an older CUDA than 13.0"),
        ("13.0", "No CUDA GPUs are available", None, "No CUDA GPUs are", "Run nvidia-smi"),
        ("13.0", "", "", "CUDA_VISIBLE_DEVICES='' hides every GPU", "Unset it"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_told_with_a_remedy_that_fits(
    monkeypatch: pytest.MonkeyPatch,
    built_for: str | None,
    says: str,
    visible: str | None,
    detail: str,
    remedy: str,
) -> None:
    fake_driver(monkeypatch, built_for=built_for, says=says)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check = by_name(doctor.examine())["device"]
    assert not check.ok
    assert detail in check.detail
    assert remedy in check.remedy
    with pytest.raises(EncoderError, match="--device auto, or fix this"):
        choose_device("cuda")
    execution = {"device": "cpu", "card": None, "precision": "fp32", "attention": None}
    said = describe_execution("demo", {**execution, "compiled": False}, 8)
    assert said.startswith("Encoder: demo on cpu in fp32, batches of 8. There is an NVIDIA GPU")
    assert detail in said


@pytest.mark.parametrize("fault", ["no kernel image is available for execution", ""])
def test_a_card_on_which_no_kernel_runs_will_not_do(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])

    def ones(*shape: int, device: str) -> torch.Tensor:
        if fault:
            raise RuntimeError(f"CUDA error: {fault}")
        return torch.zeros(shape)

    monkeypatch.setattr(torch, "ones", ones)
    check = doctor._check_gpu()
    assert not check.ok
    assert (fault or "of ones is wrong") in check.detail
    assert "sm_90" in check.remedy


def test_a_checkout_that_is_not_installed_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    monkeypatch.setattr(metadata, "version", missing)
    assert by_name(doctor.examine())["libraries"].ok
    assert CliRunner().invoke(main, ["--version"]).output == f"medembed, version {__version__}\n"
