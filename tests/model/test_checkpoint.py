# SPDX-License-Identifier: Apache-2.0
"""Finding and opening a checkpoint, and refusing what is not supported by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.checkpoint_files import resolve_model
from vllm_rsparse.model.families import DENSE
from vllm_rsparse.model.linears import find_linears

KINDS = [kind.name for kind in DENSE.spec]
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def _make(directory: Path, change: Change = lambda config, tensors: None) -> Path:
    """A two-layer skeleton of a checkpoint: names and shapes only, no real model."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
    }
    tensors = {"model.embed_tokens.weight": torch.zeros(5, 8)}
    for layer in range(2):
        for kind in KINDS:
            shape = (
                (4, 8) if kind in ("self_attn.k_proj", "self_attn.v_proj") else (8, 8)
            )
            name = f"model.layers.{layer}.{kind}.weight"
            tensors[name] = torch.full(shape, float(layer)).bfloat16()
    change(config, tensors)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_linears_come_layer_by_layer_with_their_true_shapes(tmp_path: Path) -> None:
    linears, dtype = find_linears(Checkpoint(_make(tmp_path)))
    assert dtype == "bfloat16"
    assert [(linear.layer, linear.kind) for linear in linears] == [
        (layer, kind) for layer in range(2) for kind in KINDS
    ]
    assert linears[8].name == "model.layers.1.self_attn.k_proj"
    assert linears[8].shape == (4, 8)


def test_reading_from_shards(tmp_path: Path) -> None:
    first, second = torch.randn(3), torch.randn(2).half()
    save_file({"a": first}, tmp_path / "model-1.safetensors")
    save_file({"b": second}, tmp_path / "model-2.safetensors")
    save_file({"a": second}, tmp_path / "consolidated.safetensors")
    index = {
        "weight_map": {"b": "model-2.safetensors", "a": "model-1.safetensors"},
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    assert [f.name for f in checkpoint.weight_files] == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    tensors = checkpoint.read(["b", "a"])
    assert torch.equal(tensors["a"], first)
    assert torch.equal(tensors["b"], second)
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        checkpoint.read(["c"])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-9.safetensors"}, r"lists model-9.safetensors, which is missing"),
        ({"a": "../model.safetensors"}, r"not a plain file name"),
        ({}, r"`weight_map` is missing or empty"),
        (["a"], r"`weight_map` is missing or empty"),
    ],
)
def test_a_broken_index(weight_map: object, message: str, tmp_path: Path) -> None:
    _make(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_other_weight_formats_are_named(tmp_path: Path) -> None:
    _make(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"there is pytorch_model.bin.*save_pretr"
    ):
        Checkpoint(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    file = _make(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ('{"rope_theta": NaN}', r"not valid JSON \(a value is NaN"),
        (None, r"cannot be read \(No such file.*; pass the directory of a model"),
    ],
)
def test_a_broken_config(text: str | None, message: str, tmp_path: Path) -> None:
    config = _make(tmp_path) / "config.json"
    config.unlink()
    if text is not None:
        config.write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        Checkpoint(tmp_path)


def _config(**values: Any) -> Change:
    return lambda config, tensors: config.update(values)


def _tensor(name: str) -> Change:
    return lambda config, tensors: tensors.update({name: torch.zeros(2, 2)})


def _without(name: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def _as_float8(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


REFUSED: dict[str, tuple[Change, str]] = {
    "quantized": (
        _config(quantization_config={"quant_method": "fp8"}),
        r"q_proj a quantized linear, but it has no tensor weight_scale",
    ),
    "prepared": (
        _config(quantization_config={"quant_method": "rsparse"}),
        r"written by `vllm-rsparse prepare`; prepare the base model",
    ),
    "experts": (_config(num_local_experts=8), "LlamaForCausalLM is a mixture of exp"),
    "expert tensors": (
        _tensor("model.layers.1.mlp.experts.0.up_proj.weight"),
        "is a mixture of experts",
    ),
    "latent attention": (_config(kv_lora_rank=512), "latent attention"),
    "latent tensors": (
        _tensor("model.layers.0.self_attn.kv_b_proj.weight"),
        "latent attention",
    ),
    "fused": (
        _tensor("model.layers.0.self_attn.qkv_proj.weight"),
        r"fused linears \(qkv_proj\)",
    ),
    "vision": (_config(vision_config={"depth": 2}), "a vision-language model"),
    "residual streams": (
        # Gemma 3n.
        _config(altup_num_inputs=4, num_kv_shared_layers=2),
        r"several residual streams \(AltUp\) \(altup_num_inputs = 4\)",
    ),
    "shared keys": (_config(num_kv_shared_layers=2), "layers share keys and values"),
    "encoder": (_config(is_encoder_decoder=True), "an encoder-decoder model"),
    "layers": (_config(num_hidden_layers=None), "num_hidden_layers is None"),
    "no gate": (
        _without("model.layers.1.mlp.gate_proj.weight"),
        r"LlamaForCausalLM has no linear model.layers.1.mlp.gate_proj \(layer 1 of 2\)",
    ),
    "more layers": (
        _config(num_hidden_layers=3),
        r"num_hidden_layers = 3, but the weights have no layer 2 \(model\.layers\.2\.",
    ),
    "nested settings": (
        _config(num_hidden_layers=None, text_config={"num_hidden_layers": 2}),
        "decoder's settings in text_config",
    ),
    "float8": (_as_float8, r"weights are BF16, F8_E4M3; prepare needs all in one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    checkpoint = Checkpoint(_make(tmp_path, change))
    with pytest.raises(CheckpointError, match=message):
        find_linears(checkpoint)


def test_zero_experts_are_no_mixture(tmp_path: Path) -> None:
    checkpoint = Checkpoint(_make(tmp_path, _config(num_experts=0)))
    assert len(find_linears(checkpoint)[0]) == 14


def test_a_hub_name_downloads_only_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("meta-llama/Llama-3.1-8B", "abc123") == tmp_path
    assert asked["name"] == "meta-llama/Llama-3.1-8B"
    assert asked["revision"] == "abc123"

    from huggingface_hub.utils import filter_repo_objects

    repository = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "LICENSE",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "original/tokenizer.model",
        "params.json",
        "pytorch_model.bin",
        "model.gguf",
        "README.md",
    ]
    wanted = filter_repo_objects(
        repository,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(wanted) == repository[:8]


def test_a_hub_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **settings: Any) -> str:
        raise OSError("401 Client Error: gated")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"MODEL a/b: not a local.*gated.*hf a"):
        resolve_model("a/b")


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    model = _make(tmp_path / "model")
    (model / "README.md").symlink_to(tmp_path / "gone")  # nobody reads it
    Checkpoint(model)
    (model / "blob").symlink_to(tmp_path / "gone")
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(model / "blob")
        message = rf"{name}: is a link to .*/gone, which is gone; download the model"
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(model)
    (tmp_path / "name").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"name: is a link to .*/gone, which is"):
        resolve_model(str(tmp_path / "name"))


@pytest.mark.parametrize("model", ["/no/such/dir", "./nothing", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve_model(model)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(CheckpointError, match="is a file; pass the model's directory"):
        resolve_model(str(tmp_path / "x"))


def test_a_local_directory_has_no_revisions(tmp_path: Path) -> None:
    message = f"--revision v2: MODEL {tmp_path} is a local directory"
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(tmp_path), "v2")


def test_an_empty_name_is_no_model() -> None:
    with pytest.raises(CheckpointError, match="MODEL is empty; give a model's"):
        resolve_model("")
