# SPDX-License-Identifier: Apache-2.0
"""``prepare`` on quantized checkpoints: calibrated on the weights that are served."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.testing.quantized import LAYOUTS, write_plain, write_quantized

from .runs import run, tensors_of


@pytest.mark.parametrize("layout", ["w4a16-asym-g32", "awq", "fp8-block-native"])
def test_the_artifact_is_that_of_the_dequantised_model(
    layout: str, tiny_llama: Path, tmp_path: Path
) -> None:
    meant = write_quantized(tiny_llama, tmp_path / "q", layout)
    plain = {name: tensor.bfloat16() for name, tensor in meant.items()}
    write_plain(tiny_llama, tmp_path / "plain", plain)
    mine = run(tmp_path / "q", tmp_path / "mine")
    other = run(tmp_path / "plain", tmp_path / "other")
    assert mine.dtype == "bfloat16"
    assert mine.linears == other.linears
    tensors, expected = tensors_of(tmp_path / "mine"), tensors_of(tmp_path / "other")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    # Rounding to four or eight bits moves the activations, so thresholds differ.
    run(tiny_llama, tmp_path / "base")
    name = "model.layers.2.mlp.down_proj.thresholds"
    assert not torch.equal(tensors[name], tensors_of(tmp_path / "base")[name])


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("w4a16-g64", ("int4", 64)),
        ("gptq", ("int4", 128)),
        ("fp8-tensor-native", ("fp8", 0)),
    ],
)
def test_the_config_carries_the_bases_own_dictionary(
    layout: str, weights: tuple[str, int], tiny_llama: Path, tmp_path: Path
) -> None:
    write_quantized(tiny_llama, tmp_path / "q", layout)
    run(tmp_path / "q", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "rsparse"
    assert config["quantization_config"]["base"] == LAYOUTS[layout][0]
    base = Artifact(tmp_path / "out" / "rsparse").info.base
    assert (base.format, base.group) == weights


def test_the_older_name_of_the_key_does_not_stay(
    tiny_llama: Path, tmp_path: Path
) -> None:
    write_quantized(tiny_llama, tmp_path / "q", "fp8-channel")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    base = config["compression_config"] = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    run(tmp_path / "q", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "compression_config" not in config
    assert config["quantization_config"]["base"] == base


def test_plain_models_carry_no_base(tiny_llama: Path, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "base" not in config["quantization_config"]


@pytest.mark.parametrize("layout", ["w4a16-channel", "fp8-tensor"])
def test_evaluate_runs_the_dequantised_model(
    layout: str, tiny_llama: Path, tmp_path: Path
) -> None:
    meant = write_quantized(tiny_llama, tmp_path / "q", layout)
    run(tmp_path / "q", tmp_path / "out")
    windows = torch.arange(2 * 40).view(2, 40)
    prepared = PreparedDirectory.open(tmp_path / "out")
    model = SwitchableModel(prepared.checkpoint, torch.device("cpu"), torch.float32)
    model.use(prepared.artifact)
    logits = model.logits(windows, 4, sparse=False)
    exact = {name: tensor.float() for name, tensor in meant.items()}
    write_plain(tiny_llama, tmp_path / "plain", exact)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32
    )
    with torch.inference_mode():
        expected = plain.eval()(input_ids=windows).logits[:, 4:]
    # The same arithmetic; only memory alignment may differ.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    assert model.logits(windows, 4, sparse=True).isfinite().all()


def test_a_damaged_tensor_stops_the_run_and_is_named(
    tiny_llama: Path, tmp_path: Path
) -> None:
    write_quantized(tiny_llama, tmp_path / "q", "fp8-channel")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight_scale"][5] = float("inf")
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    message = r"layers.3.mlp.up_proj: weight_scale has values that are not finite"
    for recipe, rho in (("uniform", 0.95), ("best", None)):
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path / "q", tmp_path / "out", recipe=recipe, rho=rho)
        # Not even what could be resumed from.
        assert [path.name for path in tmp_path.iterdir()] == ["q"]
