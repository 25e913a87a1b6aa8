# SPDX-License-Identifier: Apache-2.0
"""Versions of both formats: old ones are read for ever, later ones are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vllm_rsparse.artifact.quantization import QuantizationSettings, read_quantization
from vllm_rsparse.artifact.schema import BaseWeights
from vllm_rsparse.artifact.tensors import Artifact, file_sha256
from vllm_rsparse.artifact.versions import read_info, write_info
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.formats.names import (
    AS_STORED,
    LOAD_TIME_FORMATS,
    SERVED_FORMATS,
    WEIGHT_FORMATS,
)
from vllm_rsparse.formats.registry import (
    CHECKPOINT_ONLY,
    FORMATS,
    LOAD_TIME,
    load_time_format,
)

# As release 0.1.0 wrote it (shapes and figures shortened). Not to be changed.
VERSION_1 = """{
 "sparsity": 0.5,
 "linears": {
  "model.layers.0.self_attn.q_proj": {
   "shape": [4, 6],
   "sparsity": 0.5,
   "rho": 0.95,
   "rank": 1,
   "kept_fraction": 0.4751,
   "relative_error": 0.31,
   "bias": false
  },
  "model.layers.0.mlp.down_proj": {
   "shape": [6, 4],
   "sparsity": 0.5,
   "rho": 1.0,
   "rank": 0,
   "kept_fraction": 0.5,
   "relative_error": null,
   "bias": true
  }
 },
 "dtype": "bfloat16",
 "tensors_sha256": "0000000000000000000000000000000000000000000000000000000000000000",
 "provenance": {"vllm_rsparse": "0.1.0", "recipe": {"name": "uniform"}},
 "format_version": 1
}
"""
BASE = {"quant_method": "gptq", "bits": 4}
CONFIG_1 = {
    "quant_method": "rsparse",
    "format_version": 1,
    "artifact": "rsparse",
    "artifact_sha256": "0" * 64,
    "sparsity": 0.5,
    "max_sparse_tokens": 4,
    "backend": "cpu",
}


def test_version_1_artifact(tmp_path):
    tensors = {
        "model.layers.0.self_attn.q_proj.thresholds": torch.rand(6),
        "model.layers.0.self_attn.q_proj.u": torch.rand(4, 1).bfloat16(),
        "model.layers.0.self_attn.q_proj.v": torch.rand(1, 6).bfloat16(),
        "model.layers.0.mlp.down_proj.thresholds": torch.rand(4),
        "model.layers.0.mlp.down_proj.bias": torch.rand(6),
    }
    save_file(tensors, tmp_path / "rsparse.safetensors")
    digest = file_sha256(tmp_path / "rsparse.safetensors")
    (tmp_path / "rsparse.json").write_text(VERSION_1.replace("0" * 64, digest))
    artifact = Artifact(tmp_path)
    artifact.verify_digest()
    down = artifact.read("model.layers.0.mlp.down_proj", rows=slice(1, 3))
    assert torch.equal(
        down.correction, tensors["model.layers.0.mlp.down_proj.bias"][1:3]
    )
    assert artifact.entry("model.layers.0.mlp.down_proj").correction
    assert not artifact.entry("model.layers.0.self_attn.q_proj").correction
    # What version 1 did not record was always so.
    assert artifact.info.base == BaseWeights("float", "bfloat16")
    assert artifact.info.provenance["vllm_rsparse"] == "0.1.0"


def test_version_1_without_bias_has_no_correction():
    raw = json.loads(VERSION_1)
    for entry in raw["linears"].values():
        del entry["bias"]
    info = read_info(json.dumps(raw), "x")
    assert not any(entry.correction for entry in info.linears.values())


def test_version_1_is_written_as_the_newest():
    raw = json.loads(write_info(read_info(VERSION_1, "here")))
    assert raw["format_version"] == 2
    assert raw["base"] == {"format": "float", "dtype": "bfloat16"}
    assert [entry["correction"] for entry in raw["linears"].values()] == [False, True]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version": 1', '"format_version": 2', "unknown key 'bias'"),
        ('"bias": true', '"correction": true', "unknown key 'correction'"),
        ('"dtype"', '"base": {}, "dtype"', "unknown key 'base'"),
    ],
)
def test_words_of_another_version_are_unknown(old, new, message):
    with pytest.raises(ArtifactError, match=message):
        read_info(VERSION_1.replace(old, new), "here")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "base: expected an object, got NoneType"),
        ({"dtype": "bfloat16"}, "base: key 'format' is missing"),
        ({"format": "int3", "dtype": "float16"}, "base.format must be one of float, "),
        ({"format": "float", "dtype": "int8"}, r"base.dtype must be .*got 'int8'"),
        ({"format": "int4", "dtype": "float16", "group": "x"}, "base.group must be"),
        ({"format": "float", "dtype": "float16", "x": 1}, "base: unknown key 'x'"),
    ],
)
def test_weights_of_the_base(base, message):
    raw = json.loads(write_info(read_info(VERSION_1, "here"))) | {"base": base}
    with pytest.raises(ArtifactError, match=message):
        read_info(json.dumps(raw), "here")


def test_names_of_the_formats_are_those_of_the_package():
    assert tuple(one.name for one in FORMATS) == SERVED_FORMATS
    assert tuple(one.name for one in (*FORMATS, *CHECKPOINT_ONLY)) == WEIGHT_FORMATS
    assert tuple(one.name for one in LOAD_TIME) == LOAD_TIME_FORMATS
    for one in LOAD_TIME:
        assert load_time_format(one.name) is one
        assert one.format in FORMATS
        assert {*one.bases} <= {*WEIGHT_FORMATS}
    assert load_time_format(AS_STORED) is None


def test_group_of_the_base_survives():
    raw = json.loads(write_info(read_info(VERSION_1, "here")))
    raw["base"] = {"format": "int4", "dtype": "bfloat16", "group": 128}
    info = read_info(json.dumps(raw), "here")
    assert info.base == BaseWeights("int4", "bfloat16", 128)
    assert json.loads(write_info(info))["base"] == raw["base"]


@pytest.mark.parametrize("version", [1, 2])
def test_quantization_config_of_every_version(version):
    read = read_quantization(CONFIG_1 | {"format_version": version})
    assert read == QuantizationSettings(**CONFIG_1 | {"format_version": version})


def test_quantization_config_without_a_version_is_the_newest():
    # As it is written by hand, for --hf-overrides.
    read = read_quantization({"artifact": "/somewhere", "base": BASE})
    assert (read.format_version, read.base) == (2, BASE)
    assert read.to_dict() == {
        "format_version": 2,
        "artifact": "/somewhere",
        "base": BASE,
    }


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("int4", r"quantization_config must be an object, got 'int4'\. Serve a dir"),
        (None, "must be an object, got None"),
        ({"quant_method": "fp8"}, r"quant_method is 'fp8', not 'rsparse'\. Serve"),
        (CONFIG_1 | {"base": {}}, "unknown key 'base'; known are quant_method, "),
        (
            CONFIG_1 | {"format_version": 2, "base": 4},
            "base must be the quantization_config of .* got 4",
        ),
        ({"base": {"bits": 4}}, r"base: .* has a quant_method, got {'bits'"),
        (CONFIG_1 | {"format_version": 3}, "format_version is 3.* reads 1 and 2"),
        ({"head_sparsity": 1.0}, r"head_sparsity must lie in \[0, 1\), got 1.0"),
        (CONFIG_1 | {"sparsity": "half"}, "sparsity must be a number, got 'half'"),
    ],
)
def test_quantization_config_that_is_refused(raw, message):
    with pytest.raises(ArtifactError, match=message):
        read_quantization(raw)
