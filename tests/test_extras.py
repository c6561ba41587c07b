"""What runs without the libraries of an extra, and what names the extra instead."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_sweeps import command, make_data
from made_towers import save

from medembed import doctor
from medembed.core.errors import MedembedError, MissingLibraryError
from medembed.core.system import require_libraries
from medembed.encoders.loading import load_encoder

# The rest of the command line, as JSON, is a list of commands: what each ends with is printed.
SCRIPT = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
for name in {absent}:
    sys.modules[name] = None  # as if it were not installed
from medembed.cli import main
ended = []
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        try:
            main(arguments)
        except SystemExit as end:
            ended.append([end.code, said.getvalue()])
print(json.dumps(ended))
"""
ENCODERS = ("transformers", "huggingface_hub", "tokenizers")


def end_without(absent: tuple[str, ...], *commands: list[str]) -> list[tuple[int, str]]:
    """Run commands in one process without these libraries; return exit codes and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(absent=absent), json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(end) for end in json.loads(done.stdout)]


def test_a_laptop_needs_no_transformers_and_extract_names_the_extra(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    run, report = tmp_path / "run", tmp_path / "report"
    extract = ["extract", str(data[1]), "--image-root", str(tmp_path)]
    extract += ["--cache", str(tmp_path / "cache"), "--encoder"]
    *swept, hub = end_without(
        ENCODERS,
        command(data, run, "--configs", "1", "--heads", "logistic"),
        ["compare", str(run)],
        ["report", str(run), "-o", str(report)],
        [*extract, "google/medgemma-4b-pt"],
    )
    assert [code for code, _ in swept] == [0, 0, 0], swept
    assert (report / "index.html").is_file()
    code, said = hub
    assert code == 1
    assert "encoder google/medgemma-4b-pt needs" in said
    assert "pip install 'medembed[encoders]'" in said
    assert not (tmp_path / "cache").exists()


def test_a_siglip_tower_needs_no_transformers_and_a_backbone_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "siglip")
    save(tmp_path / "vit", "vit")
    monkeypatch.setattr("medembed.core.system.find_spec", lambda name: None)
    assert load_encoder("demo", device="cpu").dimensions["mean"]
    assert load_encoder(tmp_path / "siglip", device="cpu").dimensions["mean"] == (16,)
    with pytest.raises(MissingLibraryError, match=r"medembed\[encoders\]"):
        load_encoder(tmp_path / "vit", device="cpu")


def test_doctor_names_a_library_of_the_extra_that_is_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wishes = ['not-there>=2; extra == "encoders"', 'peft>=9999; extra == "lora"', "numpy>=9999"]
    monkeypatch.setattr(doctor, "_wishes", lambda: wishes)
    check = next(check for check in doctor.examine() if check.name == "libraries")
    assert not check.ok
    assert "not-there is missing" in check.detail
    assert "numpy is" in check.detail
    assert "peft" not in check.detail
    assert "medembed[encoders]" in check.remedy


def test_a_missing_library_is_an_import_error_of_ours() -> None:
    require_libraries("this test", ("pytest",), "dev")
    with pytest.raises(MissingLibraryError, match="this test needs not_there") as caught:
        require_libraries("this test", ("pytest", "not_there"), "dev")
    assert isinstance(caught.value, MedembedError)
    assert isinstance(caught.value, ImportError)
