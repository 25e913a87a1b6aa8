# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters on a sparse model: ``vllm serve --enable-lora``.

The adapter's part is dense and sees the whole input: y = sparse(x) + scale B A x.
"""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

pytest.importorskip("vllm")
from .served import ALWAYS, NEW_TOKENS, PROMPTS, complete

pytestmark = pytest.mark.serve

RANK, ALPHA = 8, 16


@pytest.fixture(scope="module")
def adapter(pyllama, tmp_path_factory):
    """A random adapter on every linear, as peft writes it.

    B A has a fifth of the weight's norm: greedy tokens turn within a few steps.
    """
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    tensors, kinds = {}, set()
    with safe_open(pyllama / "model.safetensors", "pt") as weights:
        for key in list(weights.keys()):
            name = key.removesuffix(".weight")
            if not name.endswith("_proj"):
                continue
            weight = weights.get_tensor(key).float()
            a = torch.randn(RANK, weight.shape[1])
            b = torch.randn(weight.shape[0], RANK)
            b *= 0.2 * weight.norm() / (ALPHA / RANK * (b @ a).norm())
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            kinds.add(name.rpartition(".")[2])
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(pyllama),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(kinds),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_adapter_and_base_model_in_one_batch(serve, prepared, adapter, plain_pytorch):
    base = plain_pytorch(prepared, limit=int(ALWAYS))
    adapted = plain_pytorch(prepared, limit=int(ALWAYS))
    adapted.add_adapter(adapter)
    options = ["--quantization", "rsparse", "--enable-lora"]
    # A second place for adapters, never filled: vLLM 0.32's kernels for CPUs take the
    # last place for requests that want none (docs/distributed.md).
    options += ["--lora-modules", f"a={adapter}", "--max-loras", "2"]
    env = {"VLLM_RSPARSE_MAX_SPARSE_TOKENS": ALWAYS}
    with serve(prepared, *options, **env) as server, ThreadPoolExecutor(8) as pool:
        asked = [(p, model) for p in PROMPTS for model in ("m", "a")]
        tokens = [t for t, _ in pool.map(lambda ask: complete(server, *ask), asked)]
        with urllib.request.urlopen(f"{server.base_url}/metrics") as page:
            metrics = page.read().decode()
    # Served dense all are equal. Sparse, a channel at its threshold falls either way
    # when sums are ordered otherwise: one prompt of eight was seen to part.
    for got, model in ((tokens[0::2], base), (tokens[1::2], adapted)):
        expected = [model.generate(prompt, NEW_TOKENS)[0] for prompt in PROMPTS]
        equal = sum(a == b for a, b in zip(got, expected, strict=True))
        assert equal >= 0.75 * len(PROMPTS)
    for without, wanted in zip(tokens[0::2], tokens[1::2], strict=True):
        assert without != wanted
    counts = dict(
        line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#"
    )
    assert float(counts['vllm_rsparse_step_tokens_count{route="sparse"}']) >= NEW_TOKENS
    for kind in ("q_proj", "up_proj", "down_proj"):  # merged layers and a plain one
        label = f'{{kind="{kind}"}}'
        kept = float(counts[f"vllm_rsparse_sampled_channels_kept_total{label}"])
        seen = float(counts[f"vllm_rsparse_sampled_channels_total{label}"])
        assert 0.1 < kept / seen < 0.9
