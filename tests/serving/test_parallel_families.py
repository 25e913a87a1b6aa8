# SPDX-License-Identifier: Apache-2.0
"""Every slice of every supported family, over tensor and pipeline ranks that are faked.

vLLM builds its own model of the family for one rank after another and loads the whole
checkpoint; put together, the ranks must compute what the definition gives on the whole
linears. Eight ranks share two key-value heads, and 515 tokens divide by none of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_rsparse.plugin import register
from vllm_rsparse.testing.cases import one_linear
from vllm_rsparse.testing.families import FAMILIES, separate

from .simulated import build_model, output, sparse_linears

pytestmark = pytest.mark.usefixtures("torchvision", "inspected_here")

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


@dataclass(frozen=True)
class Base:
    """A random checkpoint with an artifact.

    Attributes:
        directory: of both.
        tensors: the checkpoint's.
        linears: weights and biases, every linear on its own.
        artifact: tensors by linear.
        shares_keys: layers take keys and values from others.
    """

    directory: Path
    tensors: dict[str, torch.Tensor]
    linears: dict[str, torch.Tensor]
    artifact: dict[str, dict[str, torch.Tensor]]
    shares_keys: bool = False

    def tensor(self, ending):
        """The language model's tensor of this name."""
        found = [t for name, t in self.tensors.items() if name.endswith(ending)]
        return found[0] if found else None


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory, write_artifact):
    """A random model of the family with an artifact."""
    family = FAMILIES[request.param]
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("family")
    tensors = family.save(directory, SIZES)
    linears = separate(tensors, SIZES)
    shapes = [
        (name.removesuffix(".weight"), weight.shape)
        for name, weight in linears.items()
        if name.endswith(".weight")
    ]
    artifact = write_artifact(
        directory / "rsparse",
        {
            name: (*shape, (index % 3) * 2, index % 2 == 1)
            for index, (name, shape) in enumerate(shapes)
        },
    )
    values = json.loads((directory / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "rsparse",
        "artifact": "rsparse",
        "backend": "reference",
        "max_sparse_tokens": 8,
    }
    (directory / "config.json").write_text(json.dumps(values))
    shares_keys = bool(family.options.get("num_kv_shared_layers"))
    return Base(directory, tensors, linears, artifact, shares_keys)


@pytest.fixture
def build(checkpoint, monkeypatch):
    """Call with tensor rank and size, pipeline rank and size: that rank's model."""
    register()
    model_config = ModelConfig(
        str(checkpoint.directory), skip_tokenizer_init=True, dtype="float32"
    )

    def make(*ranks):
        return build_model(monkeypatch, model_config, checkpoint.tensors, *ranks)

    return make


def whole(name, x, checkpoint):
    """The definition on one whole linear of the checkpoint."""
    linears, mine = checkpoint.linears, checkpoint.artifact[name]
    weight, bias = linears[f"{name}.weight"], linears.get(f"{name}.bias")
    return one_linear(x, weight, mine, bias)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_tensor_parallel_ranks_give_the_whole(checkpoint, build, size):
    models = [build(rank, size) for rank in range(size)]
    layers = [sparse_linears(model) for model in models]
    names = {n for mine in layers[0].values() for n in mine.quant_method.names}
    assert names == set(checkpoint.artifact)
    with torch.no_grad():
        for name, first in layers[0].items():
            ranks = [mine[name] for mine in layers]
            x = torch.randn(3, first.input_size)
            kinds = first.quant_method.names
            if isinstance(first, RowParallelLinear):
                parts = x.chunk(size, dim=-1)
                total = sum(
                    output(rank, part) for rank, part in zip(ranks, parts, strict=True)
                )
                torch.testing.assert_close(total, whole(kinds[0], x, checkpoint))
                continue
            outputs = [
                output(rank, x).split(rank.quant_method.shard_sizes, dim=-1)
                for rank in ranks
            ]
            for shard, kind in enumerate(kinds):
                expected = whole(kind, x, checkpoint)
                # Where ranks outnumber key-value heads, neighbours hold the same one.
                parts = [output[shard] for output in outputs]
                copies = sum(p.shape[1] for p in parts) // expected.shape[1]
                replicated = kind.endswith(("k_proj", "v_proj"))
                assert copies == (max(1, size // 2) if replicated else 1)
                joined = torch.cat(parts[::copies], dim=-1)
                torch.testing.assert_close(joined, expected)
                for index, part in enumerate(parts):
                    assert torch.equal(part, parts[index // copies * copies])

        tokens = torch.tensor([0, 1, 257, 258, VOCABULARY - 1])
        embeddings = [find(model, VocabParallelEmbedding) for model in models]
        table = checkpoint.tensor("embed_tokens.weight")
        embedded = sum(embedding(tokens) for embedding in embeddings)
        assert torch.equal(embedded, table[tokens])
        heads = [find(model, ParallelLMHead) or find_tied(model) for model in models]
        x = torch.randn(3, table.shape[1])
        logits = [head.quant_method.apply(head, x) for head in heads]
        logits = torch.cat(logits, dim=-1)[:, :VOCABULARY]
        head = checkpoint.tensor("lm_head.weight")
        expected = x @ (table if head is None else head).T
        torch.testing.assert_close(logits, expected)


def find(model, kind):
    return next((m for m in model.modules() if type(m) is kind), None)


def find_tied(model):
    return find(model, VocabParallelEmbedding)


def test_pipeline_stages_share_the_layers(checkpoint, build):
    if checkpoint.shares_keys:
        pytest.skip("vLLM does not take keys and values from another stage")
    stages = [sparse_linears(build(0, 1, stage, 2)) for stage in range(2)]
    names = [{n for m in s.values() for n in m.quant_method.names} for s in stages]
    assert all(".layers.0." in name for name in names[0])
    assert all(".layers.1." in name for name in names[1])
    assert names[0] | names[1] == set(checkpoint.artifact)
