# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints through ``prepare`` and vLLM, on the CPU's kernels.

The plain PyTorch model has the dequantised weights; float32 keeps greedy choices from
hanging on rounding, and of vLLM's own methods compressed-tensors allows it.
"""

import json
import sysconfig
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.cli import main
from vllm_rsparse.formats.fp8 import FP8_WHILE_LOADING
from vllm_rsparse.formats.int8_planes import PLANES_WHILE_LOADING
from vllm_rsparse.testing.quantized import write_plain, write_quantized

from .served import (
    ALWAYS,
    NEW_TOKENS,
    PROMPTS,
    assert_same_scores,
    assert_same_tokens,
)

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def quantized(pyllama, tmp_path_factory):
    """Call with a layout: the prepared directory, and one of the dequantised model."""

    def make(layout):
        folder = tmp_path_factory.mktemp(layout)
        meant = write_quantized(pyllama, folder / "base", layout)
        exact = {name: tensor.to(torch.float32) for name, tensor in meant.items()}
        write_plain(pyllama, folder / "plain", exact)
        prepare(folder / "base", folder / "prepared")
        return folder / "prepared", folder / "plain"

    return make


MAX = "VLLM_RSPARSE_MAX_SPARSE_TOKENS"


def one_at_a_time(offline, prepared, env, **engine):
    """Greedy tokens of each prompt in steps of its own: its tokens, then one by one."""
    sampling = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    engine |= {"model": str(prepared), "max_model_len": 256, "max_num_seqs": 1}
    return [found["tokens"] for found in offline.run(env, engine, PROMPTS, sampling)]


UNIFORM = ("--sparsity", "0.4", "--recipe", "uniform")


def prepare(base, output, *options, target=UNIFORM):
    command = ["prepare", base, output, *options, *target, "--device", "cpu"]
    command += ["--calibration-samples", "4", "--calibration-tokens", "256"]
    texts = Path(sysconfig.get_path("stdlib")).glob("arg*.py")
    command += ["--calibration-data", *texts]
    assert main([str(word) for word in command]) == 0


@pytest.mark.parametrize(
    "layout", ["w4a16-asym-g32", "w4a16-channel", "fp8-channel", "fp8-block"]
)
def test_log_probabilities_equal_plain_pytorch(
    layout, quantized, offline, plain_pytorch
):
    prepared, plain = quantized(layout)
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    tokens = tokenizer(Path(json.__file__).read_text()).input_ids[:192]
    served = offline.score(prepared, tokens)
    sparse, dense = (
        plain_pytorch(prepared, limit, plain).log_probabilities(tokens)
        for limit in (int(ALWAYS), 0)
    )
    assert_same_scores(served, sparse, dense)


def test_tokens_of_two_planes_equal_plain_pytorch(
    pyllama, tmp_path, offline, plain_pytorch
):
    """Prompts on the dense route, with eight bits; compiled."""
    prepared = tmp_path / "prepared"
    target = ("--bits", "3.2", "--recipe", "wina")
    prepare(pyllama, prepared, "--weights", "int8-planes", target=target)
    tensors, first = load_file(pyllama / "model.safetensors"), {}
    for name in Artifact(prepared / "rsparse").info.linears:
        stored = PLANES_WHILE_LOADING.encode(tensors[f"{name}.weight"])
        first[name], second = stored.format.dequantise_planes(stored)
        tensors[f"{name}.weight"] = first[name] + second
    write_plain(pyllama, tmp_path / "plain", tensors)
    tokens = one_at_a_time(offline, prepared, {MAX: "1"}, enforce_eager=False)
    reference = plain_pytorch(prepared, 1, weights=tmp_path / "plain", first=first)
    assert_same_tokens(tokens, reference)
    dense = plain_pytorch(prepared, limit=0, weights=tmp_path / "plain")
    assert tokens != [dense.generate(p, len(tokens[0]))[0] for p in PROMPTS]


def test_two_ranks_with_prompts_on_the_dense_route(quantized, offline, plain_pytorch):
    """Groups of 64 divide each rank's 192 of 384 input channels."""
    prepared, plain = quantized("w4a16-g64")
    tokens = one_at_a_time(offline, prepared, {}, tensor_parallel_size=2)
    assert "rsparse: backend cpu" in offline.log.read_text()
    assert_same_tokens(tokens, plain_pytorch(prepared, limit=1, weights=plain))
    dense = plain_pytorch(prepared, limit=0, weights=plain)
    assert tokens != [dense.generate(p, len(tokens[0]))[0] for p in PROMPTS]


def rounded(pyllama, prepared, target):
    """The model that is served, as a plain checkpoint."""
    tensors = load_file(pyllama / "model.safetensors")
    info = Artifact(prepared / "rsparse").info
    names = info.linears if info.weights == "fp8" else ()
    for name in names:
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = FP8_WHILE_LOADING.round_trip(weight)
    if info.head == "fp8":
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = FP8_WHILE_LOADING.round_trip(embedding)
    write_plain(pyllama, target, tensors)
    return target


def test_two_ranks_quantize_a_plain_checkpoint_while_loading(
    pyllama, tmp_path, offline, plain_pytorch
):
    """Each rank of a row-parallel layer rounds its slice by the whole rows' scales."""
    prepared = tmp_path / "prepared"
    prepare(pyllama, prepared, "--weights", "fp8")
    plain = rounded(pyllama, prepared, tmp_path / "plain")
    tokens = one_at_a_time(offline, prepared, {MAX: ALWAYS}, tensor_parallel_size=2)
    assert_same_tokens(tokens, plain_pytorch(prepared, int(ALWAYS), weights=plain))


def test_a_quantized_sparse_output_layer_next_to_a_tied_embedding(
    pyllama, tmp_path, offline, plain_pytorch
):
    """The embedding is looked up as it is stored."""
    prepared = tmp_path / "prepared"
    prepare(pyllama, prepared, "--head", "fp8", "--head-sparsity", "0.4")
    plain = rounded(pyllama, prepared, tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    tokens = tokenizer(Path(json.__file__).read_text()).input_ids[:192]
    served = offline.score(prepared, tokens)
    mine, unrounded = (
        plain_pytorch(prepared, int(ALWAYS), weights).log_probabilities(tokens)
        for weights in (plain, pyllama)
    )
    # Channels at their thresholds move some positions of both, not the bulk.
    assert (served - mine).abs().median() < 1e-3
    assert (served - unrounded).abs().median() > 0.01
