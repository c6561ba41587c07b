"""What benchmarks keep of earlier parts, say of the processor, and derive from sizes."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import growth
import measuring
import sweep
from made_table import make_table
from medembed.core import system


def test_the_widest_instructions_are_named_unless_pytorch_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for flags, expected in (
        ({"sse2"}, None),
        ({"avx2"}, "AVX2"),
        ({"avx2", "avx512f"}, "AVX-512"),
        ({"avx2", "avx512f", "amx_bf16"}, "AMX"),
    ):
        monkeypatch.setattr(system, "processor_flags", lambda flags=flags: flags)
        assert measuring.instructions() == expected
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert measuring.instructions() == "AMX"  # oneDNN still multiplies in it
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert measuring.instructions() == "AVX2"


def test_parts_keep_their_results_and_the_machine_that_they_were_measured_on(
    tmp_path: Path,
) -> None:
    path, there = tmp_path / "sweep.json", {**measuring.machine(), "processor": "another"}
    results = {"rows": 10, "ratios": {"mlp_vs_vmap": 3.0}, "machine": there}
    path.write_text(json.dumps(results))
    kept = sweep.read_kept(path, 10, ["mlp", "nih"])
    assert kept == {**results, "machines": {"mlp": there, "nih": there}}
    kept["machines"]["nih"] = measuring.machine()
    path.write_text(json.dumps(kept))
    again = sweep.read_kept(path, 10, ["mlp", "nih"])
    assert again["machines"] == {"mlp": there, "nih": measuring.machine()}
    with pytest.raises(SystemExit, match="is of 10 rows, not 11"):
        sweep.read_kept(path, 11, ["mlp"])
    assert sweep.read_kept(tmp_path / "none.json", 11, ["mlp"]) == {"ratios": {}}


def test_a_new_part_takes_the_place_of_not_measured() -> None:
    results = {"nih": "not measured", "ratios": {"a": 1}}
    sweep.merge(results, {"nih": {"seconds": 3}, "ratios": {"b": 2}})
    assert results == {"nih": {"seconds": 3}, "ratios": {"a": 1, "b": 2}}


def test_exponents_and_memory_beyond_the_table() -> None:
    memory = {
        "rows": {
            "1000": {"peak_gb": 1.0, "table_gb": 0.0, "estimate_gb": 1.5},
            "100000": {"peak_gb": 2.0, "table_gb": 0.4, "estimate_gb": 2.5},
        }
    }
    seconds = {"rows": {"1000": 1.0, "100000": 100.0}, "columns": {"10": 2.0, "1000": 2.0}}
    found = growth.summarise({"seconds": seconds, "memory": memory})
    assert found["exponents"]["rows"] == {"fitted": 1.0, "last": 1.0}
    assert found["largest_exponent"] == 1.0
    assert found["ratios"]["columns"] == pytest.approx(0.01)
    assert found["memory"]["rows"][100000]["beyond_gb"] == pytest.approx(0.6)
    assert found["copies"] == {"rows": 1.5}
    assert found["estimate"] == {"least": 1.25, "most": 1.5}
    assert growth.summarise({"seconds": seconds, "memory": {}})["copies"] == {}


def test_a_made_table_has_the_asked_share_of_abnormal_studies_and_test_rows() -> None:
    table = make_table(3_000, 1_000, 4, n_test=1_500, share=0.01)
    assert 0.003 < table.y.mean() < 0.03
    assert table.is_test.mean() == pytest.approx(1 / 3, abs=0.05)
    assert not set(table.patients[table.is_test]) & set(table.patients[~table.is_test])
