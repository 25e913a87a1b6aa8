# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints are read as the plain ones that they stand for."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.linears import find_linears
from vllm_rsparse.model.loading import load_model
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.testing.families import FAMILIES
from vllm_rsparse.testing.quantized import LAYOUTS, write_plain, write_quantized

UP = "model.layers.2.mlp.up_proj"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linears_are_read_dequantised(
    layout: str, pyllama: Path, tmp_path: Path
) -> None:
    meant = write_quantized(pyllama, tmp_path / "q", layout)
    checkpoint = Checkpoint(tmp_path / "q")
    assert checkpoint.quantized
    assert set(checkpoint.plain_names()) == set(meant)
    tensors = checkpoint.read(checkpoint.plain_names(), dequantised=torch.float32)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, meant[name]), name
    assert checkpoint.linear_shape(UP) == (1024, 384)
    assert checkpoint.linear_dtype(UP) == "BF16"
    by_default = checkpoint.read([f"{UP}.weight"])[f"{UP}.weight"]
    assert torch.equal(by_default, meant[f"{UP}.weight"].bfloat16())


def test_a_plain_checkpoint_is_read_as_it_is(pyllama: Path) -> None:
    checkpoint = Checkpoint(pyllama)
    assert not checkpoint.quantized
    assert set(checkpoint.plain_names()) == set(checkpoint.tensors)
    assert checkpoint.linear_shape(UP) == (1024, 384)
    assert checkpoint.linear_shape("model.layers.9.mlp.up_proj") is None
    stored = checkpoint.read_stored([f"{UP}.weight"])[f"{UP}.weight"]
    assert torch.equal(checkpoint.read([f"{UP}.weight"])[f"{UP}.weight"], stored)


@pytest.mark.parametrize("layout", ["w4a16-asym-g32", "awq", "fp8-block-native"])
def test_streaming_runs_on_the_weights_that_will_be_served(
    layout: str, pyllama: Path, tmp_path: Path
) -> None:
    meant = write_quantized(pyllama, tmp_path / "q", layout)
    plain = {name: tensor.bfloat16() for name, tensor in meant.items()}
    write_plain(pyllama, tmp_path / "plain", plain)
    hidden = []
    for name in ("q", "plain"):
        model = StreamedModel(
            Checkpoint(tmp_path / name), torch.device("cpu"), torch.float32
        )
        hidden.append(model.embed(torch.arange(40).view(2, 20)))
        for index in range(2):
            with model.layer(index):
                model.run_layer(index, hidden[-1])
    assert torch.equal(hidden[0], hidden[1])


FAMILY_SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("Qwen3.5 vision", "fp8-block-native"),
        ("Qwen3 MoE", "fp8-block-native"),
        ("Qwen3 MoE", "gptq"),
        ("Phi3", "awq"),
        ("Gemma4 E2B", "w4a16-g64"),
    ],
)
def test_families_run_on_the_weights_that_will_be_served(
    family: str, layout: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    options = {**FAMILIES[family].options}
    if "num_experts" in options:
        options["moe_intermediate_size"] = 128
    made = replace(FAMILIES[family], options=options)
    made.save(tmp_path / "source", FAMILY_SIZES)
    meant = write_quantized(tmp_path / "source", tmp_path / "q", layout)
    write_plain(tmp_path / "source", tmp_path / "plain", meant)
    windows = torch.arange(40).view(2, 20)
    results = []
    for name in ("q", "plain"):
        checkpoint = Checkpoint(tmp_path / name)
        linears, dtype = find_linears(checkpoint)
        streamed = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
        hidden = streamed.embed(windows)
        for index in range(2):
            with streamed.layer(index):
                streamed.run_layer(index, hidden)
        whole = load_model(checkpoint, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            logits = whole(windows).logits
        results.append((linears, dtype, hidden, logits))
    (linears, dtype, *states), (plain_linears, plain_dtype, *plain_states) = results
    assert linears == plain_linears
    assert dtype == plain_dtype == "float32"
    for state, plain in zip(states, plain_states, strict=True):
        assert torch.equal(state, plain)


def test_a_quantized_head(pyllama: Path, tmp_path: Path) -> None:
    """GPTQ and compressed-tensors may quantize it like any other linear."""
    meant = write_quantized(pyllama, tmp_path / "q", "gptq")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    head = torch.randn(4096, 384)
    parts, expected = LAYOUTS["gptq"][1](head)
    for suffix, part in parts.items():
        tensors[f"lm_head.{suffix}"] = part.contiguous()
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    model = StreamedModel(
        Checkpoint(tmp_path / "q"), torch.device("cpu"), torch.float32
    )
    hidden = torch.randn(3, 384)
    with model.head() as head_of:
        logits = head_of(hidden)
        norm = model._base.norm(hidden)
    assert meant["model.norm.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(logits, norm @ expected.bfloat16().float().t())


def _edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_linears_that_were_left_plain(pyllama: Path, tmp_path: Path) -> None:
    """AWQ and GPTQ without a list of modules: the files tell, as for vLLM."""
    weight = torch.randn(1024, 384)

    def leave(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("qweight", "qzeros", "scales"):
            del tensors[f"{UP}.{suffix}"]
        tensors[f"{UP}.weight"] = weight

    write_quantized(pyllama, tmp_path / "q", "awq")
    _edit(tmp_path / "q", leave)
    checkpoint = Checkpoint(tmp_path / "q")
    assert checkpoint.linear_shape(UP) == (1024, 384)
    assert checkpoint.linear_dtype(UP) == "F32"
    assert torch.equal(checkpoint.read([f"{UP}.weight"])[f"{UP}.weight"], weight)


def test_linears_that_the_config_leaves_plain(pyllama: Path, tmp_path: Path) -> None:
    write_quantized(pyllama, tmp_path / "q", "fp8-channel")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"].append(UP)
    path.write_text(json.dumps(config))
    _edit(
        tmp_path / "q", lambda tensors: tensors.update({f"{UP}.weight": torch.ones(2)})
    )
    read = Checkpoint(tmp_path / "q").read([f"{UP}.weight"])
    assert torch.equal(read[f"{UP}.weight"], torch.ones(2))


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (
            "w4a16-g128",
            lambda tensors: tensors.pop(f"{UP}.weight_scale"),
            "makes model.layers.2.mlp.up_proj a quantized linear, but it has no tensor"
            " weight_scale",
        ),
        (
            "fp8-block",
            lambda tensors: tensors.pop(f"{UP}.weight_scale"),
            "has no tensor weight_scale; config and weights belong to different",
        ),
        (
            "w4a16-g128",
            lambda t: t.update({f"{UP}.weight_scale": torch.ones(1024, 5)}),
            r"up_proj: weight_scale must be \[1024, 3\], got \[1024, 5\]",
        ),
        (
            "gptq",
            lambda t: t.update({f"{UP}.qweight": torch.ones(2, dtype=torch.int32)}),
            "up_proj: qweight must have 2 dimensions",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    layout: str, change: Callable, message: str, pyllama: Path, tmp_path: Path
) -> None:
    write_quantized(pyllama, tmp_path / "q", layout)
    _edit(tmp_path / "q", change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path / "q").linear_shape(UP)


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("scales", float("nan"), "up_proj: scales has values that are not finite"),
        ("g_idx", 1, "up_proj: g_idx orders the input channels"),
    ],
)
def test_values_that_do_not_fit_are_named(
    suffix: str, value: float, message: str, pyllama: Path, tmp_path: Path
) -> None:
    write_quantized(pyllama, tmp_path / "q", "gptq")
    _edit(tmp_path / "q", lambda tensors: tensors[f"{UP}.{suffix}"][:1].fill_(value))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path / "q").read([f"{UP}.weight"])


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "torchao"}, r"config.json: .* torchao is not supported; use"),
        ("awq", "quantization_config must be an object, got str"),
    ],
)
def test_methods_that_are_not_supported(
    quantization: object, message: str, pyllama: Path, tmp_path: Path
) -> None:
    tensors = load_file(pyllama / "model.safetensors")
    write_plain(pyllama, tmp_path / "m", tensors)
    config = json.loads((pyllama / "config.json").read_text())
    config["quantization_config"] = quantization
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path / "m")


def test_modelopt_is_known_by_its_file(pyllama: Path, tmp_path: Path) -> None:
    write_plain(pyllama, tmp_path / "m", load_file(pyllama / "model.safetensors"))
    (tmp_path / "m" / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="ModelOpt is not supported; prepare the"):
        Checkpoint(tmp_path / "m")


def test_a_prepared_directory_holds_its_bases_description(
    pyllama: Path, tmp_path: Path
) -> None:
    meant = write_quantized(pyllama, tmp_path / "q", "awq")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    base = config["quantization_config"]
    config["quantization_config"] = {"quant_method": "rsparse", "base": base}
    path.write_text(json.dumps(config))
    read = Checkpoint(tmp_path / "q").read([f"{UP}.weight"], dequantised=torch.float32)
    assert torch.equal(read[f"{UP}.weight"], meant[f"{UP}.weight"])
