# SPDX-License-Identifier: Apache-2.0
"""``prepare --weights``: calibrated and evaluated on the weights that are served."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import ArtifactError, PrepareError, SettingError
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.formats.fp8 import FP8_WHILE_LOADING, channel_scales
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.linears import find_linears
from vllm_rsparse.testing.quantized import write_plain, write_quantized

from .runs import run, tensors_of


def _rounded(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors with every linear as FP8 stands for it, float32."""
    tensors = load_file(checkpoint / "model.safetensors")
    for linear in find_linears(Checkpoint(checkpoint))[0]:
        name = f"{linear.name}.weight"
        tensors[name] = FP8_WHILE_LOADING.round_trip(tensors[name])
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def prepared(pyllama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fp8") / "out"
    run(pyllama, output, weights="fp8")
    return output


def test_the_artifact_is_that_of_the_quantized_model(
    prepared: Path, pyllama: Path, tmp_path: Path
) -> None:
    write_plain(pyllama, tmp_path / "plain", _rounded(pyllama))
    run(tmp_path / "plain", tmp_path / "other")
    mine, other = tensors_of(prepared), tensors_of(tmp_path / "other")
    thresholds = [name for name in other if name.endswith(".thresholds")]
    for name in thresholds:
        # The norms of the columns are those of weights rounded to the factors' dtype.
        torch.testing.assert_close(mine[name], other[name], rtol=2e-3, atol=0)
    assert len(thresholds) == 28
    # Rounding to eight bits moves the activations, so thresholds differ.
    run(pyllama, tmp_path / "base")
    name = "model.layers.2.mlp.down_proj.thresholds"
    assert not torch.equal(mine[name], tensors_of(tmp_path / "base")[name])


def test_artifact_and_config_record_what_is_served(
    prepared: Path, pyllama: Path
) -> None:
    info = Artifact(prepared / "rsparse").info
    assert (info.weights, info.base.format, info.served_format) == (
        "fp8",
        "float",
        "fp8",
    )
    config = json.loads((prepared / "config.json").read_text())
    assert config["quantization_config"]["weights"] == "fp8"
    weights = load_file(pyllama / "model.safetensors")
    tensors = tensors_of(prepared)
    for name in info.linears:
        expected = channel_scales(weights[f"{name}.weight"])
        assert torch.equal(tensors[f"{name}.scales"], expected)
        assert torch.equal(Artifact(prepared / "rsparse").read_scales(name), expected)


def test_what_prepare_reads_is_what_is_served(prepared: Path, pyllama: Path) -> None:
    model = LanguageModel(Checkpoint(pyllama), FP8_WHILE_LOADING)
    name = "model.layers.1.mlp.up_proj.weight"
    expected = _rounded(pyllama)[name]
    assert torch.equal(model.read([name])[name], expected)
    norm = "model.layers.1.input_layernorm.weight"
    stored = load_file(pyllama / "model.safetensors")
    assert torch.equal(model.read([norm])[norm], stored[norm])


def test_evaluate_compares_the_base_with_what_is_served(
    prepared: Path, pyllama: Path, tmp_path: Path
) -> None:
    windows = torch.arange(2 * 40).view(2, 40)
    opened = PreparedDirectory.open(prepared)
    model = SwitchableModel(opened.checkpoint, torch.device("cpu"), torch.float32)
    model.use(opened.artifact)
    dense = model.logits(windows, 4, sparse=False)
    served = model.logits(windows, 4, sparse=True)
    # A plain model with the rounded weights, and the same thresholds.
    write_plain(pyllama, tmp_path / "plain", _rounded(pyllama))
    other = tmp_path / "other"
    run(tmp_path / "plain", other)
    info = json.loads((prepared / "rsparse" / "rsparse.json").read_text())
    del info["weights"]
    (other / "rsparse" / "rsparse.json").write_text(json.dumps(info))
    tensors = {n: t for n, t in tensors_of(prepared).items() if ".scales" not in n}
    save_file(tensors, other / "rsparse" / "rsparse.safetensors")
    reopened = PreparedDirectory.open(pyllama_with(other))
    plain = SwitchableModel(reopened.checkpoint, torch.device("cpu"), torch.float32)
    plain.use(Artifact(other / "rsparse"))
    # The same arithmetic; only memory alignment may differ.
    expected = plain.logits(windows, 4, sparse=True)
    torch.testing.assert_close(served, expected, rtol=1e-5, atol=1e-4)
    assert not torch.equal(plain.logits(windows, 4, sparse=False), dense)
    base = tmp_path / "base"
    run(pyllama, base)
    as_stored = PreparedDirectory.open(base)
    model.use(as_stored.artifact)
    assert torch.equal(model.logits(windows, 4, sparse=False), dense)
    assert all(linear.served is None for linear in model.linears.values())


def pyllama_with(directory: Path) -> Path:
    """The directory, whose config names the digest of its changed tensors no more."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["artifact_sha256"]
    path.write_text(json.dumps(config))
    info_path = directory / "rsparse" / "rsparse.json"
    info = json.loads(info_path.read_text())
    info["tensors_sha256"] = Artifact(directory / "rsparse").sha256
    info_path.write_text(json.dumps(info))
    return directory


def test_evaluate_runs_the_quantized_output_layer(
    pyllama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(pyllama, out, sparsity=0.0, rho=1.0, head="fp8")
    prepared = PreparedDirectory.open(out)
    assert (prepared.artifact.info.head, prepared.settings.head) == ("fp8", "fp8")
    model = SwitchableModel(prepared.checkpoint, torch.device("cpu"), torch.float32)
    model.use(prepared.artifact)
    windows = torch.arange(2 * 40).view(2, 40)
    dense, served = (model.logits(windows, 4, sparse) for sparse in (False, True))
    # Nothing is dropped: the output layer alone makes the difference.
    embedding = load_file(pyllama / "model.safetensors")["model.embed_tokens.weight"]
    inverse = torch.linalg.pinv(embedding.double())
    hidden = dense.double() @ inverse.T
    expected = hidden @ FP8_WHILE_LOADING.round_trip(embedding).double().T
    torch.testing.assert_close(served.double(), expected, rtol=1e-4, atol=1e-3)
    assert (served - dense).abs().max() > 0.01


def test_a_scale_that_is_no_positive_number_is_refused(
    prepared: Path, tmp_path: Path
) -> None:
    tensors = tensors_of(prepared)
    tensors["model.layers.0.mlp.up_proj.scales"][3] = 0
    (tmp_path / "rsparse").mkdir()
    text = (prepared / "rsparse" / "rsparse.json").read_text()
    (tmp_path / "rsparse" / "rsparse.json").write_text(text)
    save_file(tensors, tmp_path / "rsparse" / "rsparse.safetensors")
    artifact = Artifact(tmp_path / "rsparse")
    with pytest.raises(ArtifactError, match=r"up_proj.scales has values that are not"):
        artifact.read_scales("model.layers.0.mlp.up_proj")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, tmp_path / "rsparse" / "rsparse.safetensors")
    with pytest.raises(ArtifactError, match=r"up_proj.scales' is missing"):
        Artifact(tmp_path / "rsparse")


def test_what_cannot_be_quantized_is_refused(pyllama: Path, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="--weights must be one of as-stored, fp8"):
        run(pyllama, tmp_path / "out", weights="int3")
    write_quantized(pyllama, tmp_path / "q", "w4a16-g64")
    with pytest.raises(SettingError, match=r"fp8 are made from float weights.*int4"):
        run(tmp_path / "q", tmp_path / "out", weights="fp8")
