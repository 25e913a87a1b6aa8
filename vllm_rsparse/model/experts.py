# SPDX-License-Identifier: Apache-2.0
"""Routed experts of a decoder layer: they stay as the base model has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# transformers' names of the tensors that hold all experts of a layer, [experts, N, K],
# and the linears of each that a checkpoint may hold instead, one below the other.
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Experts:
    """Where the experts of a family are.

    Attributes:
        module: its name within the layer, "mlp.experts".
        chosen_key: of the config, how many of them a token reads.
    """

    module: str = "mlp.experts"
    chosen_key: str = "num_experts_per_tok"

    def share_read(self, config: Mapping[str, Any]) -> float:
        """The share of the experts that a token reads."""
        return config[self.chosen_key] / number_of_experts(config)

    def parts(
        self, path: str, tensor: str, config: Mapping[str, Any]
    ) -> list[list[str]] | None:
        """The tensors of each expert that make up one of transformers' tensors.

        Args:
            path: of the module in the checkpoint, "model.layers.0.mlp.experts".
            tensor: name within the module.
            config: of the language model.
        """
        linears = _STACKED.get(tensor)
        if linears is None:
            return None
        return [
            [f"{path}.{expert}.{linear}.weight" for linear in linears]
            for expert in range(number_of_experts(config))
        ]


def number_of_experts(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer; 0 in a dense model.

    Args:
        config: of the language model. transformers 5 writes the second name where
            published files have the first.
    """
    return config.get("num_experts") or config.get("num_local_experts") or 0
