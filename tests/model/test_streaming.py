# SPDX-License-Identifier: Apache-2.0
"""Streaming one layer at a time gives what the whole model gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.families import DENSE
from vllm_rsparse.model.linears import find_linears
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.observers import LayerInputs

LAYERS = 3
KINDS = [kind.name for kind in DENSE.spec]
COMMON = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
# What each adds to a plain Llama: rope scaling, a window, biases, q/k norms, per-layer
# window types, scaled embeddings with post-norms, two rotary tables.
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3 rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral window": ("MistralConfig", {"sliding_window": 8}),
    "qwen2 bias": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2 mixed windows": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3 norms": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 8}),
    "granite": (
        "GraniteConfig",
        {
            "logits_scaling": 16.0,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
        },
    ),
}
# The logits that each model makes of its last hidden states.
HEADS = {name: MODELS[name] for name in ("llama", "qwen2 bias", "gemma2", "granite")}
HEADS["cohere"] = ("CohereConfig", {"logit_scale": 0.125})


def _save_random_model(
    directory: Path, config_class: str, extra: dict[str, object], **save: object
) -> nn.Module:
    config = getattr(transformers, config_class)(**COMMON, **extra)
    # Eager: the fused attention leaves out the soft cap of Gemma 2.
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    for parameter in model.parameters():
        # Also what is initialised to 0 or 1 (biases, norms), which would hide a loss.
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory, **save)
    return model.eval()


def _whole_model(model: nn.Module, windows: Tensor) -> tuple[list[Tensor], list]:
    """Each layer's output [windows, tokens, hidden], and the inputs of its linears."""
    outputs: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    inputs: list[dict[str, list[Tensor]]] = [
        {kind: [] for kind in KINDS} for _ in range(LAYERS)
    ]

    def keep(target: list[Tensor]) -> Callable[..., None]:
        return lambda module, args, out: target.append(
            out[0] if isinstance(out, tuple) else out
        )

    def keep_input(target: list[Tensor]) -> Callable[..., None]:
        return lambda module, args: target.append(args[0][0])

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(outputs[index]))
        for kind in KINDS:
            layer.get_submodule(kind).register_forward_pre_hook(
                keep_input(inputs[index][kind])
            )
    with torch.inference_mode():
        for window in windows:
            model(window[None])
    return [torch.cat(out) for out in outputs], inputs


@pytest.mark.parametrize("name", MODELS)
def test_layers_see_and_give_what_they_do_in_the_whole_model(
    name: str, tmp_path: Path
) -> None:
    model = _save_random_model(tmp_path, *MODELS[name])
    windows = torch.randint(0, 101, (3, 29))
    outputs, inputs = _whole_model(model, windows)

    streamed = StreamedModel(Checkpoint(tmp_path), torch.device("cpu"), torch.float32)
    hidden = streamed.embed(windows)
    linears, _ = find_linears(streamed.checkpoint)
    for index in range(LAYERS):
        members = [linear for linear in linears if linear.layer == index]
        collected = LayerInputs(members, windows.numel())
        with streamed.layer(index) as layer, collected.observe(layer):
            streamed.run_layer(index, hidden)
        # The same code on the same numbers; only memory alignment may differ.
        torch.testing.assert_close(hidden, outputs[index], rtol=1e-5, atol=1e-5)
        for kind in KINDS:
            expected = torch.cat(inputs[index][kind])
            torch.testing.assert_close(collected[kind], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    model = _save_random_model(tmp_path, *HEADS[name])
    seen: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.inference_mode():
        expected = model(torch.randint(0, 101, (1, 29))).logits[0]

    streamed = StreamedModel(Checkpoint(tmp_path), torch.device("cpu"), torch.float32)
    hidden = seen[0].clone().requires_grad_()
    with streamed.head() as head:
        logits = head(hidden)
        (gradient,) = torch.autograd.grad(logits.sum(), hidden)
    # The same code on the same numbers; only memory alignment may differ.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert gradient.abs().max() > 0
    assert all(p.device.type == "meta" for p in streamed._model.parameters())


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    windows = torch.randint(0, 101, (2, 13))
    results = []
    for name, size in (("one", "1GB"), ("many", "30KB")):
        torch.manual_seed(0)
        _save_random_model(tmp_path / name, "LlamaConfig", {}, max_shard_size=size)
        checkpoint = Checkpoint(tmp_path / name)
        streamed = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
        hidden = streamed.embed(windows)
        with streamed.layer(0):
            streamed.run_layer(0, hidden)
        results.append((len(checkpoint.weight_files), hidden))
    assert results[0][0] == 1
    assert results[1][0] > 5
    assert torch.equal(results[0][1], results[1][1])


def test_only_the_current_layer_holds_weights(tmp_path: Path) -> None:
    _save_random_model(tmp_path, "Qwen3Config", {})
    streamed = StreamedModel(Checkpoint(tmp_path), torch.device("cpu"), torch.float32)

    def real() -> set[str]:
        return {
            name.split(".")[2] if ".layers." in name else name
            for name, tensor in [
                *streamed._model.named_parameters(),
                *streamed._model.named_buffers(),
            ]
            if tensor.device.type != "meta"
        }

    assert real() == set()
    streamed.embed(torch.zeros(1, 5, dtype=torch.int64))
    assert real() == set()
    with streamed.layer(1):
        assert real() == {"1"}
    assert real() == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = _save_random_model(tmp_path, "LlamaConfig", {})
    windows = torch.randint(0, 101, (1, 9))
    outputs, _ = _whole_model(model.to(dtype), windows)
    streamed = StreamedModel(Checkpoint(tmp_path), torch.device("cpu"), dtype)
    hidden = streamed.embed(windows)
    for index in range(LAYERS):
        with streamed.layer(index):
            streamed.run_layer(index, hidden)
    assert hidden.dtype == dtype
    # One unit in the last place of either dtype, at the largest output.
    scale = float(outputs[-1].abs().max()) * torch.finfo(dtype).eps
    torch.testing.assert_close(hidden, outputs[-1], rtol=0, atol=2 * scale)


def test_config_and_weights_of_different_models(
    tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    _save_random_model(tmp_path, "LlamaConfig", {})
    edit_json(tmp_path / "config.json", lambda c: c.update(intermediate_size=96))
    streamed = StreamedModel(Checkpoint(tmp_path), torch.device("cpu"), torch.float32)
    with (
        pytest.raises(CheckpointError, match=r"gate_proj.weight is \[80, 48\].*\[96, "),
        streamed.layer(0),
    ):
        pass


def test_an_architecture_that_transformers_does_not_know(
    tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    _save_random_model(tmp_path, "LlamaConfig", {})
    edit_json(tmp_path / "config.json", lambda c: c.update(model_type="llama9"))
    with pytest.raises(CheckpointError, match=r"config.json: transformers cannot buil"):
        StreamedModel(Checkpoint(tmp_path), torch.device("cpu"), torch.float32)
