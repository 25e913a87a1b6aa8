# SPDX-License-Identifier: Apache-2.0
"""Image requests to a model that wraps a language model: Gemma 3 with vision."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
from safetensors.torch import load_file, save_file
from transformers import Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import (
    Gemma3ImageProcessorPil,
)

from vllm_rsparse.cli import main
from vllm_rsparse.testing.families import FAMILIES

from .offline import ALWAYS_SPARSE

pytestmark = pytest.mark.serve

SIZES = {
    "vocab_size": 4112,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
IMAGE_TOKENS = 4
PIXELS = 28  # each way; the stand-in's vision model has patches of 14
SPECIAL = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}


@pytest.fixture
def base(pyllama, tmp_path):
    """A random Gemma 3 with vision, its tokenizer and its processor of images."""
    directory = tmp_path / "base"
    FAMILIES["Gemma3 vision"].save(directory, SIZES)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    # transformers makes this one of zeros, and all images alike.
    (projection,) = (name for name in tensors if "mm_input_projection" in name)
    tensors[projection] = torch.randn_like(tensors[projection])
    save_file(tensors, file, {"format": "pt"})

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(pyllama / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=SPECIAL,
    )
    # What the processor puts around an image.
    tokenizer.add_tokens(["\n" * count for count in range(1, 5)])
    assert len(tokenizer) <= SIZES["vocab_size"]
    images = Gemma3ImageProcessorPil(
        size={"height": PIXELS, "width": PIXELS}, image_seq_length=IMAGE_TOKENS
    )
    processor = Gemma3Processor(images, tokenizer, image_seq_length=IMAGE_TOKENS)
    processor.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "image_token_index": tokenizer.image_token_id,
        "boi_token_index": tokenizer.boi_token_id,
        "eoi_token_index": tokenizer.eoi_token_id,
        "mm_tokens_per_image": IMAGE_TOKENS,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_image_requests_dense_and_sparse(base, tmp_path, offline, torchvision_stand_in):
    text = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    prepared = tmp_path / "prepared"
    command = ["prepare", base, prepared, "--device", "cpu", "--sparsity", "0.5"]
    command += ["--recipe", "wina", "--calibration-samples", "2"]
    command += ["--calibration-tokens", "128", "--calibration-data", text]
    assert main([str(word) for word in command]) == 0
    images = torch.randint(256, (2, 40, 40, 3)).tolist()
    prompts = [{"prompt": "<start_of_image> def f(x):", "image": i} for i in images]

    def ask(model, env):
        engine = {"model": str(model), "max_model_len": 256, "max_num_seqs": 2}
        sampling = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
        sampling |= {"logprobs": 0, "detokenize": False}
        return offline.run(env, engine, prompts, sampling, torchvision_stand_in)

    dense = ask(base, {})
    assert dense[0]["chosen"] != dense[1]["chosen"]  # the model sees the images
    assert ask(prepared, {"VLLM_RSPARSE_MAX_SPARSE_TOKENS": "0"}) == dense
    sparse = ask(prepared, ALWAYS_SPARSE)
    # Seven for each layer of the language model, none of vision.
    assert "rsparse: 14 linears loaded" in offline.log.read_text()
    for image, base_image in zip(sparse, dense, strict=True):
        assert image["chosen"] != base_image["chosen"]
    assert sparse[0]["chosen"] != sparse[1]["chosen"]
