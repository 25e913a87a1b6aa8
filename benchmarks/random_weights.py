# SPDX-License-Identifier: Apache-2.0
"""A load format for vLLM that fills every parameter with random values of a real scale.

vLLM's dummy format leaves packed integers as they are in memory and rounds FP8 weights
to zero, so that most inputs of the linears would be zero and masks would mean nothing.
"""

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

LOAD_FORMAT = "rsparse_random"
# Standard deviation of a weight, as in Llama's initialisation.
_STD = 0.02
# Standard deviation of sixteen equally likely codes.
_INT4_STD = 4.6


@register_model_loader(LOAD_FORMAT)
class RandomWeightLoader(DummyModelLoader):
    """Dummy weights, then random values in the layout of the checkpoint."""

    def load_weights(self, model: torch.nn.Module, model_config: object) -> None:
        super().load_weights(model, model_config)  # type: ignore[arg-type]
        for index, (name, parameter) in enumerate(model.named_parameters()):
            fill(name.rpartition(".")[2], parameter.data, index)


@torch.no_grad()
def fill(suffix: str, tensor: torch.Tensor, seed: int) -> None:
    """Random content for one parameter, by the last word of its name and its dtype."""
    generator = torch.Generator(tensor.device).manual_seed(seed)
    if suffix == "weight_shape":
        return
    if tensor.dtype == torch.int32:
        tensor.random_(-(2**31), 2**31 - 1, generator=generator)
    elif "scale" in suffix:
        # FP8 weights have a standard deviation of 1 before they are scaled.
        tensor.fill_(_STD / (1.0 if tensor.dtype == torch.float32 else _INT4_STD))
    elif tensor.dtype == torch.float8_e4m3fn:
        # In rows, for a copy of gate_up in float32 would be half a gigabyte.
        for rows in tensor.split(1024):
            values = torch.empty(rows.shape, device=rows.device)
            rows.copy_(values.normal_(generator=generator).to(torch.float8_e4m3fn))
    elif tensor.dim() == 1:
        tensor.fill_(1.0 if "norm" in suffix or suffix == "weight" else 0.0)
    else:
        tensor.normal_(0.0, _STD, generator=generator)
