# SPDX-License-Identifier: Apache-2.0
"""A streamed model whose last layers take keys and values from earlier ones."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.testing.families import FAMILIES

WINDOWS, TOKENS = 3, 40  # more tokens than a sliding window has
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,  # the family's own number is 4
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base")
    FAMILIES["Gemma4 E2B"].save(directory, SIZES)
    return directory


def whole_model(base: Path, windows: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each layer's output [windows, tokens, hidden], and the logits."""
    from transformers import Gemma4ForCausalLM

    model = Gemma4ForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: outputs.append(out.clone()))
    with torch.inference_mode():
        logits = model(windows).logits
    return outputs, logits


@pytest.mark.parametrize("together", [1, 2])
def test_states_go_through_the_layers_side_by_side(base: Path, together: int) -> None:
    windows = torch.randint(0, SIZES["vocab_size"], (WINDOWS, TOKENS))
    expected, logits = whole_model(base, windows)
    streamed = StreamedModel(Checkpoint(base), torch.device("cpu"), torch.float32)
    streamed._tokens_at_once = together * TOKENS
    hidden = streamed.embed(windows)
    other = hidden.flip(1)  # another candidate, whose keys must not be mixed in
    for index, output in enumerate(expected):
        with streamed.layer(index):
            streamed.run_layer(index, hidden)
            streamed.run_layer(index, other)
        torch.testing.assert_close(
            streamed.visible(hidden), output, rtol=1e-4, atol=1e-4
        )
    with streamed.head() as head:
        torch.testing.assert_close(head(hidden[1]), logits[1], rtol=1e-4, atol=1e-4)


def test_gradients_go_through_the_shared_keys(base: Path) -> None:
    streamed = StreamedModel(Checkpoint(base), torch.device("cpu"), torch.float32)
    hidden = streamed.embed(torch.randint(0, SIZES["vocab_size"], (1, TOKENS)))
    entering = hidden.clone().requires_grad_()
    rows, width = slice(0, 1), SIZES["hidden_size"]
    with streamed.layer(1):
        state = streamed.call_layer(1, entering, rows)
    # Layer 3, of the same type, reads no more of layer 1 than its keys and values.
    keys_only = torch.cat([hidden[..., :width], state[..., width:]], -1)
    with streamed.layer(3):
        out = streamed.visible(streamed.call_layer(3, keys_only, rows))
        (gradient,) = torch.autograd.grad(out.sum(), entering)
    assert gradient.abs().max() > 0
