# SPDX-License-Identifier: Apache-2.0
"""The streaming safetensors writer, read back by the safetensors library."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.prepare.store.writer import SafetensorsWriter, TensorSpec


def _specs(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in tensors.items()
    }


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with SafetensorsWriter(path, _specs(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    # Odd counts of 2-byte elements before float32 would misalign the latter.
    return {
        "b.u": torch.randn(3, 5).bfloat16(),
        "b.thresholds": torch.tensor([0.5, float("inf"), -1.0]),
        "a.v": torch.randn(7, 1).half(),
        "a.thresholds": torch.randn(1),
        "empty": torch.empty(0, 4),
    }


def test_safetensors_reads_back_what_was_written(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "x.safetensors"
    _write(path, tensors)
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert opened.get_slice(name).get_shape() == list(tensor.shape)
            assert torch.equal(opened.get_tensor(name), tensor)
            assert opened.get_tensor(name).dtype == tensor.dtype
        assert torch.equal(opened.get_slice("b.u")[1:, 2:], tensors["b.u"][1:, 2:])


def test_any_order_of_writing_gives_the_same_file(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    for name, order in (("forth", list(tensors)), ("back", list(tensors)[::-1])):
        with SafetensorsWriter(tmp_path / name, _specs(tensors)) as writer:
            for key in order:
                writer.write(key, tensors[key])
    assert (tmp_path / "forth").read_bytes() == (tmp_path / "back").read_bytes()


def test_tensors_are_aligned_and_without_holes(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "x.safetensors"
    _write(path, tensors)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    del header["__metadata__"]
    assert size % 8 == 0
    end = 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end
        assert start % tensors[name].element_size() == 0
        end = stop
    assert 8 + size + end == len(raw)


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {"transposed": base.T, "strided": base[::2, 1::2]}
    _write(tmp_path / "x", views)
    with safe_open(tmp_path / "x", framework="pt") as opened:
        for name, view in views.items():
            assert torch.equal(opened.get_tensor(name), view)


def test_misuse_is_told(tmp_path: Path) -> None:
    specs = {"a": TensorSpec((2,), torch.float32), "b": TensorSpec((1,), torch.float32)}
    with SafetensorsWriter(tmp_path / "1", specs) as writer:
        writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError, match=r"'a' was already written"):
            writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError, match=r"'c' was not declared"):
            writer.write("c", torch.zeros(2))
        with pytest.raises(ValueError, match=r"float32 \(2,\), declared .* \(1,\)"):
            writer.write("b", torch.zeros(2))
        with pytest.raises(ValueError, match=r"float16 \(1,\), declared .*float32"):
            writer.write("b", torch.zeros(1).half())
        writer.write("b", torch.zeros(1))
    with pytest.raises(PrepareError, match="File exists"):
        SafetensorsWriter(tmp_path / "1", specs)


def test_a_tensor_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "1", {"a": TensorSpec((2,), torch.float32)})
    with pytest.raises(ValueError, match=r"never written: a"), writer:
        pass


def test_an_error_inside_is_not_hidden_by_missing_tensors(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "1", {"a": TensorSpec((2,), torch.float32)})
    with pytest.raises(KeyError, match="cause"), writer:
        raise KeyError("cause")


@contextmanager
def _file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lack_of_room_shows_before_anything_is_computed(tmp_path: Path) -> None:
    specs = {"a": TensorSpec((1 << 20,), torch.float32)}
    with (
        _file_size_limit(1 << 20),
        pytest.raises(
            PrepareError,
            match=r"1\.safetensors: cannot be .*needs 4194\d{3} bytes",
        ),
    ):
        SafetensorsWriter(tmp_path / "1.safetensors", specs)
