"""The layout of safetensors files; the library itself is the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from medembed.core.errors import EncoderError
from medembed.encoders.stored_tensors import (
    StoredTensor,
    compose_header,
    find_non_finite,
    header_length,
    parse_header,
    read_header,
)

MADE = {
    "half": torch.arange(7).half(),
    "brain": torch.arange(9).bfloat16().reshape(3, 3),
    "single": torch.tensor(1.5),
    "double": torch.ones(2, 2, dtype=torch.float64),
    "none": torch.empty(0, 3),
    "whole": torch.arange(4),
    "flags": torch.tensor([True, False]),
    "eight": torch.ones(5).to(torch.float8_e4m3fn),
}


def test_tensors_lie_where_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(MADE, {"format": "pt"}))
    content = path.read_bytes()
    found = {tensor.name: tensor for tensor in read_header(path)}
    assert set(found) == set(MADE)
    for name, tensor in MADE.items():
        lying = content[found[name].start : found[name].stop]
        assert lying == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert found[name].shape == tuple(tensor.shape)


def test_a_composed_file_is_read_by_the_library(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    header = compose_header([("é", "F32", (2, 3), 24), ("b", "U8", (1,), 1)], {"format": "pt"})
    assert len(header) % 8 == 0
    path = tmp_path / "a.safetensors"
    path.write_bytes(header + values.numpy().tobytes() + b"\x07")
    found = load_file(path)
    assert torch.equal(found["é"], values)
    assert found["b"].tolist() == [7]
    n = len(header)
    assert read_header(path) == [
        StoredTensor("é", "F32", (2, 3), n, n + 24),
        StoredTensor("b", "U8", (1,), n + 24, n + 25),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 999])
def test_a_value_that_is_not_finite_is_found(
    tmp_path: Path, dtype: torch.dtype, bad: float, at: int
) -> None:
    limits = torch.finfo(dtype)
    good = torch.tensor([limits.max, limits.min, limits.tiny, -0.0] * 250, dtype=dtype)
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"good": good, "none": torch.empty(0, dtype=dtype)}))
    assert find_non_finite(path, read_header(path)) is None
    wrong = good.clone()
    wrong[at] = bad
    path.write_bytes(save({"good": good, "wrong": wrong}))
    assert find_non_finite(path, read_header(path)) == "wrong"


def test_every_chunk_of_a_long_tensor_is_looked_at(tmp_path: Path) -> None:
    long = torch.zeros((1 << 22) + 10, dtype=torch.bfloat16)
    path = tmp_path / "a.safetensors"
    for at in (-1, (1 << 22) - 1, 1 << 22):
        wrong = long.clone()
        wrong[at] = float("nan")
        path.write_bytes(save({"long": wrong}))
        assert find_non_finite(path, read_header(path)) == "long"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}, "has 7 bytes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "lies at byte"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "its tensors end at"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "at 8 to 0"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "shape"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "shape"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "no dtype, shape and offsets"),
        ({"a": 3}, "no dtype, shape and offsets"),
        ([], "not a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(entry: Any, said: str) -> None:
    text = entry.encode() if isinstance(entry, str) else json.dumps(entry).encode()
    with pytest.raises(EncoderError, match=f"x is not a whole safetensors file: .*{said}"):
        parse_header(text, 8 + len(text) + 8, "x")


@pytest.mark.parametrize("length", [0, 1, 93, 10**12, 2**64 - 1])
def test_a_length_that_does_not_fit_its_file_is_refused(length: int) -> None:
    with pytest.raises(EncoderError, match="its header would be"):
        header_length(length.to_bytes(8, "little"), 100, "x")
    assert header_length((92).to_bytes(8, "little"), 100, "x") == 92
