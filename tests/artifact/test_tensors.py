# SPDX-License-Identifier: Apache-2.0
"""The format on disk: round trip, slices, and an error that names what is wrong."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_rsparse.artifact import tensors
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.artifact.versions import read_info, write_info
from vllm_rsparse.errors import ArtifactError

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
LINEARS = {Q: (6, 10, 2, True), DOWN: (10, 7, 0, False)}


# What the versions of the format call the constant.
WORD = {1: "bias", 2: "correction"}


@pytest.fixture(params=WORD)
def version(request):
    return request.param


@pytest.fixture
def artifact_dir(tmp_path, write_artifact, version):
    write_artifact(tmp_path, LINEARS, version=version)
    return tmp_path


def test_reads_what_was_written(tmp_path, write_artifact, version):
    written = write_artifact(tmp_path, LINEARS, dtype=torch.bfloat16, version=version)
    artifact = Artifact(tmp_path)
    artifact.verify_digest()
    q, down = artifact.read(Q), artifact.read(DOWN)
    for field, tensor in written[Q].items():
        assert torch.equal(getattr(q, field), tensor)
    assert torch.equal(down.thresholds, written[DOWN]["thresholds"])
    assert down.u is None
    assert down.v is None
    assert down.correction is None


def test_slice_is_the_slice_of_the_whole(artifact_dir):
    artifact = Artifact(artifact_dir)
    whole = artifact.read(Q)
    part = artifact.read(Q, rows=slice(2, 5), columns=slice(4, 10))
    assert torch.equal(part.thresholds, whole.thresholds[4:10])
    assert torch.equal(part.u, whole.u[2:5])
    assert torch.equal(part.v, whole.v[:, 4:10])
    assert torch.equal(part.correction, whole.correction[2:5])


def test_info_round_trip(artifact_dir):
    info = Artifact(artifact_dir).info
    assert read_info(write_info(info), "x") == replace(info, format_version=2)


def drop(key):
    return lambda raw: raw.pop(key)


def put(key, value):
    return lambda raw: raw.update({key: value})


def drop_linear(key):
    return lambda raw: raw["linears"][Q].pop(key)


def put_linear(key, value):
    return lambda raw: raw["linears"][Q].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format_version", 3), "format_version is 3.* reads 1 and 2; install"),
        (put("format_version", [1]), r"format_version is \[1\]"),
        (drop("format_version"), "format_version is None"),
        (put("format_version", True), "format_version is True"),
        (put("surprise", 1), "unknown key 'surprise'; known are .*sparsity"),
        (drop("linears"), "key 'linears' is missing"),
        (put("linears", []), "must be a non-empty object"),
        (put("linears", {}), "must be a non-empty object"),
        (put("linears", {"a": 3}), "expected an object, got int"),
        (put("dtype", "int4"), "dtype must be one of bfloat16.*, got 'int4'"),
        (put("sparsity", 1.5), r"sparsity must lie in \[0, 1\]"),
        (put("sparsity", "half"), "sparsity must lie"),
        (put("provenance", 3), "provenance must be an object, got 3"),
        (put("tensors_sha256", "\x1f" * 64), "tensors_sha256 must .* 64 hexadecimal"),
        (put("tensors_sha256", None), "tensors_sha256 must be a string .*, got None"),
        (put_linear("shape", [6]), r"shape must be \[N, K\]"),
        (put_linear("shape", [6, -1]), "two positive integers"),
        (put_linear("rank", 7), r"rank must lie in \[0, 6\]"),
        (put_linear("rank", -1), "rank must lie"),
        (put_linear("rank", "2"), "rank must lie"),
        (put_linear("rho", 1.2), "rho must lie"),
        (put_linear("kept_fraction", None), "kept_fraction must lie"),
        (put_linear("rank", 3), r"u is F32 \[6, 2\], expected .* \[6, 3\]"),
        (put_linear("rank", 0), "belongs to no linear"),
        (put_linear("rank", True), "rank must lie"),
        (put_linear("surprise", 1), "unknown key 'surprise'; known are shape, "),
        (drop_linear("rank"), r"linears\['model.*q_proj'\]: key 'rank' is missing"),
        (lambda raw: raw["linears"].update({"a b": {}}), "not a name of a linear"),
        (put_linear("shape", [6, 11]), "expected F32"),
    ],
)
def test_malformed_json_is_named(artifact_dir, edit_json, change, message):
    path = artifact_dir / "rsparse.json"
    edit_json(path, change)
    with pytest.raises(ArtifactError, match=message) as error:
        Artifact(artifact_dir)
    assert str(artifact_dir) in str(error.value)


def test_flag_decides_which_tensors_belong(artifact_dir, version, edit_json):
    edit_json(artifact_dir / "rsparse.json", put_linear(WORD[version], False))
    with pytest.raises(ArtifactError, match="belongs to no linear"):
        Artifact(artifact_dir)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_not_a_json_object(artifact_dir, text):
    (artifact_dir / "rsparse.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"not valid JSON|expected a JSON object"):
        Artifact(artifact_dir)


def test_missing_files(tmp_path, artifact_dir):
    with pytest.raises(ArtifactError, match="vllm-rsparse prepare"):
        Artifact(tmp_path / "nowhere")
    (artifact_dir / "rsparse.safetensors").unlink()
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        Artifact(artifact_dir)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_tensors(artifact_dir, keep):
    path = artifact_dir / "rsparse.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        Artifact(artifact_dir)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q}.thresholds", torch.rand(9), r"F32 \[9\], expected F32 \[10\]"),
        (f"{Q}.thresholds", torch.rand(10).double(), "expected F32"),
        (f"{Q}.u", torch.zeros(6, 2, dtype=torch.int32), "expected F32 or F16 or BF16"),
        (f"{Q}.v", None, "is missing"),
        ("model.layers.9.mlp.up_proj.u", torch.rand(2, 2), "belongs to no linear"),
    ],
)
def test_tensors_that_do_not_fit_the_json(artifact_dir, name, tensor, message):
    path = artifact_dir / "rsparse.safetensors"
    tensors = load_file(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=message):
        Artifact(artifact_dir)


@pytest.mark.parametrize(
    ("field", "value"),
    [("thresholds", float("nan")), ("u", float("inf")), ("correction", float("nan"))],
)
def test_non_finite_tensors_are_refused(artifact_dir, version, field, value):
    field = WORD[version] if field == "correction" else field
    path = artifact_dir / "rsparse.safetensors"
    tensors = load_file(path)
    tensors[f"{Q}.{field}"].view(-1)[3] = value
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=rf"{field} contains NaN"):
        Artifact(artifact_dir).read(Q)


def test_a_json_beyond_any_models(artifact_dir, monkeypatch):
    size = (artifact_dir / "rsparse.json").stat().st_size
    monkeypatch.setattr(tensors, "_MAX_JSON_BYTES", size)
    Artifact(artifact_dir)
    monkeypatch.setattr(tensors, "_MAX_JSON_BYTES", size - 1)
    with pytest.raises(ArtifactError, match=rf"{size} bytes, no artifact's has more"):
        Artifact(artifact_dir)


def test_infinite_threshold_is_allowed(artifact_dir):
    path = artifact_dir / "rsparse.safetensors"
    tensors = load_file(path)
    tensors[f"{Q}.thresholds"][3] = float("inf")  # a zero column
    save_file(tensors, path)
    assert Artifact(artifact_dir).read(Q).thresholds[3] == float("inf")


def test_changed_bytes_fail_the_digest(artifact_dir):
    path = artifact_dir / "rsparse.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="sha256 is"):
        Artifact(artifact_dir).verify_digest()


def test_digest_of_the_config_is_checked_too(artifact_dir):
    with pytest.raises(ArtifactError, match="artifact_sha256"):
        Artifact(artifact_dir).verify_digest("0" * 64)


def test_unknown_linear(artifact_dir):
    with pytest.raises(ArtifactError, match="no linear named 'x'"):
        Artifact(artifact_dir).read("x")


def test_json_is_plain_data(artifact_dir):
    raw = json.loads((artifact_dir / "rsparse.json").read_text())
    assert raw["linears"][Q]["shape"] == [6, 10]
