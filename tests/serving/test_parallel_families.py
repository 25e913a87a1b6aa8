# SPDX-License-Identifier: Apache-2.0
"""Every slice of every supported family, over tensor and pipeline ranks that are faked.

vLLM builds its own model of the family for one rank after another and loads the whole
checkpoint; put together, the ranks must compute what the definition gives on the whole
linears. Eight ranks share two key-value heads, and 515 tokens divide by none of them.
"""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

import transformers
from vllm.config import (
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)

from vllm_rsparse.plugin import register
from vllm_rsparse.serving.linear import RSparseLinearMethod
from vllm_rsparse.testing.cases import one_linear

VOCABULARY, LAYERS = 515, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GEMMA = {"sliding_window": 32, "query_pre_attn_scalar": 32}
FAMILIES = {
    "Llama": ("Llama", "Llama", UNTIED),
    "Llama tied": ("Llama", "Llama", TIED),
    "Mistral": ("Mistral", "Mistral", {**UNTIED, "sliding_window": 32}),
    "Qwen2": ("Qwen2", "Qwen2", TIED),
    "Qwen3": ("Qwen3", "Qwen3", UNTIED),
    "Gemma2": ("Gemma2", "Gemma2", {**TIED, **GEMMA}),
    "Gemma3": ("Gemma3", "Gemma3Text", {**TIED, **GEMMA}),
}


class FakeGroup(SimpleNamespace):
    """One rank of a group whose collectives leave the joining to the test."""

    def all_reduce(self, x):
        return x

    @property
    def is_first_rank(self):
        return self.rank_in_group == 0

    @property
    def is_last_rank(self):
        return self.rank_in_group == self.world_size - 1


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory, write_artifact):
    """A random model of the family with an artifact: directory, weights, tensors."""
    family, config_class, options = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{config_class}Config")(**SIZES, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    weights = model.state_dict()
    for name, tensor in weights.items():
        if name.endswith(".bias"):
            tensor.normal_(std=0.5)  # zeros would hide its absence
    directory = tmp_path_factory.mktemp("family")
    linears = {
        name: (*module.weight.shape, (index % 3) * 2, index % 2 == 1)
        for index, (name, module) in enumerate(
            item
            for item in model.named_modules()
            if isinstance(item[1], torch.nn.Linear) and ".layers." in item[0]
        )
    }
    assert len(linears) == 7 * LAYERS
    tensors = write_artifact(directory / "rsparse", linears)
    config.architectures = [f"{family}ForCausalLM"]
    config.dtype = torch.float32
    values = config.to_dict()
    values["quantization_config"] = {
        "quant_method": "rsparse",
        "artifact": "rsparse",
        "backend": "reference",
        "max_sparse_tokens": 8,
    }
    (directory / "config.json").write_text(json.dumps(values))
    return directory, weights, tensors


@pytest.fixture
def build(checkpoint, monkeypatch):
    """Call with tensor rank and size, pipeline rank and size: that rank's model."""
    directory, weights, _ = checkpoint

    register()
    model_config = ModelConfig(str(directory), skip_tokenizer_init=True)

    def make(rank, size, stage=0, stages=1):
        for name, group in (
            ("_TP", FakeGroup(rank_in_group=rank, world_size=size)),
            ("_PP", FakeGroup(rank_in_group=stage, world_size=stages)),
        ):
            monkeypatch.setattr(parallel_state, name, group)
        world = FakeGroup(rank_in_group=0, world_size=1)
        monkeypatch.setattr(parallel_state, "_WORLD", world)
        config = VllmConfig(model_config=model_config)
        config.parallel_config.pipeline_parallel_size = stages
        with set_current_vllm_config(config), torch.no_grad():
            model = initialize_model(vllm_config=config)
            # A tied head is not in a checkpoint.
            tied = model_config.hf_config.tie_word_embeddings
            model.load_weights(
                (name, weight)
                for name, weight in weights.items()
                if not (tied and name == "lm_head.weight")
            )
            process_weights_after_loading(model, model_config, torch.device("cpu"))
        return model

    return make


def sparse_linears(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), RSparseLinearMethod)
    }


def whole(name, x, checkpoint):
    """The definition on one whole linear of the checkpoint."""
    _, weights, tensors = checkpoint
    weight, mine = weights[f"{name}.weight"], tensors[name]
    return one_linear(x, weight, mine, weights.get(f"{name}.bias"))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_tensor_parallel_ranks_give_the_whole(checkpoint, build, size):
    _, weights, _ = checkpoint
    models = [build(rank, size) for rank in range(size)]
    layers = [sparse_linears(model) for model in models]
    assert len(layers[0]) == 4 * LAYERS
    with torch.no_grad():
        for name, first in layers[0].items():
            ranks = [mine[name] for mine in layers]
            x = torch.randn(3, first.input_size)
            kinds = first.quant_method.names
            if isinstance(first, RowParallelLinear):
                parts = x.chunk(size, dim=-1)
                total = sum(
                    rank(part)[0] for rank, part in zip(ranks, parts, strict=True)
                )
                torch.testing.assert_close(total, whole(kinds[0], x, checkpoint))
                continue
            outputs = [
                rank(x)[0].split(rank.quant_method.shard_sizes, dim=-1)
                for rank in ranks
            ]
            for shard, kind in enumerate(kinds):
                expected = whole(kind, x, checkpoint)
                # Where ranks outnumber key-value heads, neighbours hold the same one.
                parts = [output[shard] for output in outputs]
                copies = sum(p.shape[1] for p in parts) // expected.shape[1]
                assert copies == (max(1, size // 2) if kind[-6:-5] in "kv" else 1)
                joined = torch.cat(parts[::copies], dim=-1)
                torch.testing.assert_close(joined, expected)
                for index, part in enumerate(parts):
                    assert torch.equal(part, parts[index // copies * copies])

        tokens = torch.tensor([0, 1, 257, 258, VOCABULARY - 1])
        embeddings = [find(model, VocabParallelEmbedding) for model in models]
        table = weights["model.embed_tokens.weight"]
        embedded = sum(embedding(tokens) for embedding in embeddings)
        assert torch.equal(embedded, table[tokens])
        heads = [find(model, ParallelLMHead) or find_tied(model) for model in models]
        x = torch.randn(3, table.shape[1])
        logits = [head.quant_method.apply(head, x) for head in heads]
        logits = torch.cat(logits, dim=-1)[:, :VOCABULARY]
        expected = x @ weights["lm_head.weight"].T
        torch.testing.assert_close(logits, expected)


def find(model, kind):
    return next((m for m in model.modules() if type(m) is kind), None)


def find_tied(model):
    return find(model, VocabParallelEmbedding)


def test_pipeline_stages_share_the_layers(checkpoint, build):
    stages = [sparse_linears(build(0, 1, stage, 2)) for stage in range(2)]
    names = [{n for m in s.values() for n in m.quant_method.names} for s in stages]
    assert all(".layers.0." in name for name in names[0])
    assert all(".layers.1." in name for name in names[1])
    assert names[0] | names[1] == set(checkpoint[2])
