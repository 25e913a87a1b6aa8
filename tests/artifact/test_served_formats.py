# SPDX-License-Identifier: Apache-2.0
"""Tensors of weights that are made while loading, and of a sparse output layer."""

import pytest
import torch
from safetensors.torch import save_file

from vllm_rsparse.artifact.schema import model_sparsity
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.artifact.versions import read_info, write_info
from vllm_rsparse.errors import ArtifactError

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
LINEARS = {Q: (6, 10, 2, True), DOWN: (10, 7, 0, False)}
HEAD = {"shape": [20, 10], "sparsity": 0.4, "rho": 1.0, "rank": 0, "kept_fraction": 0.6}


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_are_positive_numbers(tmp_path, write_artifact, value):
    scales = {
        f"{name}.scales": torch.rand(shape[0]) + 0.1 for name, shape in LINEARS.items()
    }
    write_artifact(tmp_path, LINEARS, more=scales, weights="fp8")
    artifact = Artifact(tmp_path)
    assert torch.equal(artifact.read_scales(Q), scales[f"{Q}.scales"])
    assert torch.equal(artifact.read_scales(Q, slice(2, 5)), scales[f"{Q}.scales"][2:5])
    scales[f"{Q}.scales"][3] = value
    write_artifact(tmp_path, LINEARS, more=scales, weights="fp8")
    with pytest.raises(ArtifactError, match=r"q_proj.scales has values that are not"):
        Artifact(tmp_path).read_scales(Q)


def test_weights_as_stored_have_no_scales(tmp_path, write_artifact):
    write_artifact(tmp_path, LINEARS)
    artifact = Artifact(tmp_path)
    assert artifact.read_scales(Q) is None
    with pytest.raises(ArtifactError, match="no linear named 'x'"):
        artifact.read_scales("x")


def test_a_second_plane_is_not_read_without_the_first(tmp_path, write_artifact):
    linears = {Q: (8, 32, 0, False)}
    written = write_artifact(tmp_path, linears, planes=2, weights="int8-planes")
    rows = written[Q]["thresholds"]
    artifact = Artifact(tmp_path)
    assert torch.equal(artifact.read(Q, columns=slice(8, 24)).thresholds, rows[:, 8:24])
    for second, allowed in (
        (rows[0, 5], True),
        (rows[0, 5].nextafter(-rows[0, 5]), False),
    ):
        changed = rows.clone()
        changed[1, 5] = second
        save_file({f"{Q}.thresholds": changed}, tmp_path / "rsparse.safetensors")
        if allowed:
            assert torch.equal(artifact.read(Q).thresholds, changed)
            continue
        with pytest.raises(ArtifactError, match="second plane is read where the first"):
            artifact.read(Q)


@pytest.mark.parametrize("planes", [1, 2])
def test_full_fraction_belongs_to_planes(tmp_path, write_artifact, edit_json, planes):
    weights = {"weights": "int8-planes"} if planes == 2 else {}
    linears = {Q: (8, 32, 0, False)}
    write_artifact(tmp_path, linears, planes=planes, **weights)

    def change(raw):
        entry = raw["linears"][Q]
        if planes == 2:
            del entry["full_fraction"]
        else:
            entry["full_fraction"] = 0.1

    edit_json(tmp_path / "rsparse.json", change)
    state = "lacks" if planes == 2 else "has"
    with pytest.raises(ArtifactError, match=f"{Q} {state} full_fraction, but the wei"):
        Artifact(tmp_path)


@pytest.mark.parametrize("planes", [1, 2])
def test_the_thresholds_of_a_sparse_output_layer(tmp_path, write_artifact, planes):
    linears, weights = LINEARS, {}
    if planes == 2:
        linears, weights = {Q: (8, 32, 0, False)}, {"weights": "int8-planes"}
    more = {"lm_head.thresholds": torch.rand(10)}
    write_artifact(
        tmp_path, linears, planes=planes, sparse_head=HEAD, more=more, **weights
    )
    artifact = Artifact(tmp_path)
    assert torch.equal(artifact.read("lm_head").thresholds, *more.values())
    assert artifact.read_scales("lm_head") is None
    assert list(artifact.info.entries) == [*linears, "lm_head"]
    assert artifact.info.head_sparsity == 0.4
    # The target and what was achieved are of the layers' linears.
    assert artifact.info.achieved_sparsity == model_sparsity(artifact.info.linears)
    assert read_info(write_info(artifact.info), "x") == artifact.info


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"rank": 1}, "sparse_head must have rank 0"),
        ({"correction": True}, "sparse_head must have rank 0, and neither corr"),
        ({"shape": [20, 9]}, r"lm_head.thresholds is F32 \[10\], expected F32 \[9\]"),
        ({"sparsity": 2}, r"sparse_head.sparsity must lie in \[0, 1\], got 2"),
        (None, "'lm_head.thresholds' belongs to no linear"),
    ],
)
def test_an_output_layer_that_is_refused(tmp_path, write_artifact, head, message):
    entry = None if head is None else HEAD | head
    more = {"lm_head.thresholds": torch.rand(10)}
    write_artifact(tmp_path, LINEARS, sparse_head=entry, more=more)
    with pytest.raises(ArtifactError, match=message):
        Artifact(tmp_path)


def test_a_linear_called_like_the_output_layer(tmp_path, write_artifact):
    write_artifact(tmp_path, {"lm_head": (20, 10, 0, False)}, sparse_head=HEAD)
    with pytest.raises(ArtifactError, match="linears has lm_head, which sparse_head"):
        Artifact(tmp_path)
