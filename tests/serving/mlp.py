# SPDX-License-Identifier: Apache-2.0
"""vLLM's linears of an MLP under an artifact, for weights that change while loading."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers import linear as vllm_linear

from vllm_rsparse.serving.config import RSparseConfig

PREFIX = "model.layers.0.mlp"


def make_config(directory: Path, backend: str = "reference", **options: Any) -> Any:
    """The config of a model's directory, as vLLM makes it."""
    config = RSparseConfig.from_config(
        {"artifact": "rsparse", "backend": backend, **options}
    )
    config.maybe_update_config(str(directory))
    return config


def load(layer: Any, weights: Mapping[str, Tensor]) -> None:
    """Give a layer the checkpoint's tensors through its own loader."""
    names = layer.quant_method.names
    for index, name in enumerate(names):
        arguments = (index,) if len(names) > 1 else ()
        parameter = layer.weight
        parameter.weight_loader(parameter, weights[name], *arguments)


@dataclass(frozen=True)
class Mlp:
    """The sizes of an MLP.

    Attributes:
        hidden: input channels of gate and up, outputs of down.
        inner: the others.
    """

    hidden: int
    inner: int

    def random_weights(self) -> dict[str, Tensor]:
        """A checkpoint's tensors by the names of their linears."""
        shapes = dict.fromkeys(("gate_proj", "up_proj"), (self.inner, self.hidden))
        shapes["down_proj"] = (self.hidden, self.inner)
        return {
            f"{PREFIX}.{kind}": torch.randn(n, k) / k**0.5
            for kind, (n, k) in shapes.items()
        }

    def build(
        self, kind: str, config: Any, weights: Mapping[str, Tensor] | None = None
    ) -> Any:
        """A layer by its name in vLLM, loaded where there are weights."""
        common = {
            "bias": False,
            "quant_config": config,
            "params_dtype": torch.float32,
            "prefix": f"{PREFIX}.{kind}",
        }
        if kind == "gate_up_proj":
            layer = vllm_linear.MergedColumnParallelLinear(
                self.hidden, [self.inner] * 2, **common
            )
        else:
            layer = vllm_linear.RowParallelLinear(
                self.inner, self.hidden, reduce_results=False, **common
            )
        if weights is not None:
            load(layer, weights)
        return layer
