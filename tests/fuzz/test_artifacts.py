# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile artifacts: an ArtifactError, or an artifact that can be used."""

import json
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_rsparse.artifact.inspect import describe
from vllm_rsparse.artifact.tensors import (
    JSON_NAME,
    TENSORS_NAME,
    Artifact,
    scales_name,
)
from vllm_rsparse.artifact.versions import read_info, write_info
from vllm_rsparse.errors import ArtifactError

from .documents import examples, mutated

LINEARS = {
    "model.layers.0.self_attn.q_proj": (8, 6, 2, False),
    "model.layers.0.mlp.down_proj": (6, 8, 0, True),
}


# Version of the format, and what the weights are quantized to while they load.
ARTIFACTS = {"version-1": (1, None), "version-2-fp8": (2, "fp8")}


@pytest.fixture(scope="module", params=ARTIFACTS)
def artifact(
    request: pytest.FixtureRequest,
    write_artifact: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A sound artifact; the tests write their variants over it."""
    directory: Path = tmp_path_factory.mktemp("fuzz")
    version, weights = ARTIFACTS[request.param]
    more: dict[str, Any] = {"provenance": {"base": "x", "seed": 0}}
    if weights is not None:
        scales = {scales_name(name): torch.ones(s[0]) for name, s in LINEARS.items()}
        entry = {"shape": [9, 6], "rho": 1.0, "rank": 0}
        entry |= {"sparsity": 0.4, "kept_fraction": 0.6}
        scales["lm_head.thresholds"] = torch.rand(6)
        more |= {"weights": weights, "head": weights, "more": scales}
        more["sparse_head"] = entry
    write_artifact(directory, LINEARS, version=version, **more)
    use(directory)  # what is imported and allocated once
    return directory


@pytest.fixture(scope="module")
def sound(artifact: Path) -> tuple[bytes, bytes]:
    json_bytes = (artifact / JSON_NAME).read_bytes()
    return json_bytes, (artifact / TENSORS_NAME).read_bytes()


@pytest.fixture
def bounded_memory(artifact: Path) -> Iterator[None]:
    """Sizes are checked before anything is allocated: no size in a file is believed."""

    @examples(200)
    @given(mutated({"a": {"b": [1, 2]}}))
    def warm_up(document: Any) -> None:
        """Hypothesis's own tables took 206 MiB in the first test of a process."""

    warm_up()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (200 << 10), f"peak memory grew by {grown >> 10} MiB"


def use(directory: Path) -> None:
    """What a server does with an artifact; only ArtifactError may come out."""
    try:
        opened = Artifact(directory)
        for name in opened.info.entries:
            opened.read(name)
            opened.read(name, slice(0, 2), slice(1, 3))
            opened.read_scales(name, slice(0, 2))
        text = describe(opened.info)
        opened.verify_digest()
    except ArtifactError as error:
        text = str(error)
    # Nothing in the files steers the terminal.
    assert not [line for line in text.split("\n") if not line.isprintable()]


@pytest.mark.usefixtures("bounded_memory")
def test_rsparse_json_with_changed_values(
    artifact: Path, sound: tuple[bytes, bytes]
) -> None:
    (artifact / TENSORS_NAME).write_bytes(sound[1])

    @examples(1000)
    @given(mutated(json.loads(sound[0])))
    def check(document: Any) -> None:
        (artifact / JSON_NAME).write_text(json.dumps(document))
        use(artifact)

    check()


def test_rsparse_json_that_is_accepted_survives_a_round_trip(
    sound: tuple[bytes, bytes],
) -> None:
    @examples(500)
    @given(mutated(json.loads(sound[0])))
    def check(document: Any) -> None:
        try:
            info = read_info(json.dumps(document), "here")
        except ArtifactError:
            return
        again = read_info(write_info(info), "here")
        assert again.entries == info.entries

    check()


@pytest.mark.usefixtures("bounded_memory")
def test_rsparse_json_of_any_bytes(artifact: Path, sound: tuple[bytes, bytes]) -> None:
    (artifact / TENSORS_NAME).write_bytes(sound[1])

    @examples(300)
    @given(
        st.binary(max_size=200)
        | st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"\xff\xfe"])
        | st.integers(0, len(sound[0])).map(lambda end: sound[0][:end])
    )
    def check(data: bytes) -> None:
        (artifact / JSON_NAME).write_bytes(data)
        use(artifact)

    check()


@pytest.mark.usefixtures("bounded_memory")
def test_tensor_file_of_changed_bytes(
    artifact: Path, sound: tuple[bytes, bytes]
) -> None:
    (artifact / JSON_NAME).write_bytes(sound[0])
    whole = sound[1]
    places = st.integers(0, len(whole) - 1)

    @examples(1000)
    @given(st.lists(st.tuples(places, st.binary(max_size=9)), max_size=3), places)
    def check(edits: list[tuple[int, bytes]], end: int) -> None:
        data = bytearray(whole)
        for place, patch in edits:
            data[place : place + len(patch)] = patch
        if not edits:
            del data[end:]
        (artifact / TENSORS_NAME).write_bytes(data)
        use(artifact)

    check()


@pytest.mark.usefixtures("bounded_memory")
def test_tensor_file_with_a_lying_header(
    artifact: Path, sound: tuple[bytes, bytes]
) -> None:
    """Shapes, dtypes, offsets and the header's length, changed one by one."""
    (artifact / JSON_NAME).write_bytes(sound[0])
    (length,) = struct.unpack("<Q", sound[1][:8])
    header = json.loads(sound[1][8 : 8 + length])
    body = sound[1][8 + length :]
    lengths = st.none() | st.sampled_from([0, 1, 1 << 27, 1 << 40, 1 << 63])

    @examples(800)
    @given(mutated(header), lengths)
    def check(document: Any, claimed: int | None) -> None:
        text = json.dumps(document).encode()
        size = len(text) if claimed is None else claimed
        data = struct.pack("<Q", size) + text + body
        (artifact / TENSORS_NAME).write_bytes(data)
        use(artifact)

    check()
