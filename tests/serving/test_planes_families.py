# SPDX-License-Identifier: Apache-2.0
"""Two planes in whole models, over tensor and pipeline ranks that are faked.

vLLM loads a base, of which planes are made, and the directory that ``prepare`` wrote
from it, in which they are already: every layer of every rank must be the same, whatever
the names under which the engine builds and the checkpoint stores it.
"""

import json

import pytest
import torch

pytest.importorskip("vllm")

from safetensors.torch import load_file
from vllm.config import ModelConfig

from vllm_rsparse.formats.int8_planes import INT8_PLANES, PLANES_WHILE_LOADING
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.linears import find_linears
from vllm_rsparse.plugin import register
from vllm_rsparse.prepare.store.quantized_copy import QuantizedCopy
from vllm_rsparse.testing.families import FAMILIES

from .simulated import build_model, output, sparse_linears

pytestmark = pytest.mark.usefixtures("torchvision", "inspected_here")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
# Tensor rank and size, pipeline stage and stages.
RANKS = [(0, 1, 0, 1), (1, 2, 0, 1), (0, 1, 0, 2), (0, 1, 1, 2)]


@pytest.fixture(params=["Phi3", "Qwen3.5"])
def directories(request, tmp_path, write_artifact):
    """A base with an artifact for planes, and the directory that holds them."""
    torch.manual_seed(0)
    base, written = tmp_path / "base", tmp_path / "written"
    FAMILIES[request.param].save(base, SIZES)
    checkpoint = Checkpoint(base)
    linears, _ = find_linears(checkpoint)
    shapes = {linear.name: (*linear.shape, 0, True) for linear in linears}
    settings = {"quant_method": "rsparse", "artifact": "rsparse", "backend": "cpu"}
    config = json.loads((base / "config.json").read_text())
    written.mkdir()
    QuantizedCopy(checkpoint, linears, PLANES_WHILE_LOADING, torch.device("cpu")).write(
        written
    )
    for directory, more in (
        (base, {}),
        (written, {"weights_on_disk": INT8_PLANES.name}),
    ):
        torch.manual_seed(1)
        write_artifact(
            directory / "rsparse", shapes, planes=2, weights=INT8_PLANES.name
        )
        config["quantization_config"] = settings | more
        (directory / "config.json").write_text(json.dumps(config))
    return base, written, set(shapes)


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_hold_the_same_either_way(directories, ranks, monkeypatch):
    register()
    *both, names = directories
    found = []
    for directory in both:
        model_config = ModelConfig(
            str(directory), skip_tokenizer_init=True, dtype="float32"
        )
        tensors = load_file(directory / "model.safetensors")
        model = build_model(monkeypatch, model_config, tensors, *ranks)
        found.append((model, sparse_linears(model)))
    (_, made), (_, read) = found
    assert made.keys() == read.keys()
    mine = {name for layer in read.values() for name in layer.quant_method.names}
    stage, stages = ranks[2:]
    layers = {
        f".layers.{i}." for i in range(2) if i * stages // 2 == stage or stages == 1
    }
    assert mine == {n for n in names if any(layer in n for layer in layers)}
    for name, layer in read.items():
        other = made[name]
        for tensor in ("weight", "rsparse_scales", "rsparse_zeros"):
            assert torch.equal(getattr(layer, tensor), getattr(other, tensor))
        x = torch.randn(2, layer.quant_method.partition.k)
        with torch.no_grad():
            assert torch.equal(output(layer, x), output(other, x))
