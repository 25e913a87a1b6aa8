# SPDX-License-Identifier: Apache-2.0
"""Keys and values that later decoder layers take from earlier ones (Gemma 4 E2B, E4B).

transformers' layers exchange them in a dictionary, by layer type. A streamed model runs
many windows, and several candidates, through one layer before it loads the next: here
they are columns behind the hidden states, one set for each state.
"""

from collections import UserDict
from typing import Any

import torch
from torch import Tensor, nn

# The argument of transformers' layers.
_ARGUMENT = "shared_kv_states"


class SharedKeysValues:
    """The columns behind hidden states that hold shared keys and values.

    Args:
        layers: decoder layers of transformers' model; none of them may share any.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        # By layer type: heads and their size.
        self._heads: dict[str, tuple[int, int]] = {}
        mixers: list[Any] = [getattr(layer, "self_attn", None) for layer in layers]
        if any(getattr(mixer, "is_kv_shared_layer", False) for mixer in mixers):
            for mixer in mixers:
                if mixer.store_full_length_kv:
                    heads = mixer.k_proj.out_features // mixer.head_dim
                    self._heads[mixer.layer_type] = (heads, mixer.head_dim)
        self._width = sum(2 * heads * size for heads, size in self._heads.values())

    def append_empty(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden + columns]; the columns are not set."""
        if not self._width:
            return hidden
        empty = hidden.new_zeros(*hidden.shape[:-1], self._width)
        return torch.cat([hidden, empty], -1)

    def without(self, hidden: Tensor) -> Tensor:
        """[..., hidden + columns] -> [..., hidden], a view."""
        return hidden[..., : hidden.shape[-1] - self._width]

    def split(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states alone, and the argument that layers get because of the columns.

        Args:
            hidden: [windows, tokens, hidden + columns].
        """
        if not self._width:
            return hidden, {}
        states: UserDict[str, tuple[Tensor, Tensor]] = UserDict()
        start = hidden.shape[-1] - self._width
        for layer_type, (heads, size) in self._heads.items():
            columns = hidden[..., start : start + 2 * heads * size]
            start += 2 * heads * size
            both = columns.unflatten(-1, (2, heads, size)).transpose(1, 3)
            states[layer_type] = (both[:, :, 0], both[:, :, 1])
        return self.without(hidden), {_ARGUMENT: states}

    def join(self, out: Tensor, argument: dict[str, Any]) -> Tensor:
        """A layer's output, followed by the columns as the layer has left them.

        Args:
            out: [windows, tokens, hidden].
            argument: from ``split``.
        """
        if not self._width:
            return out
        columns = [
            torch.stack(argument[_ARGUMENT][layer_type], 2).transpose(1, 3).flatten(-3)
            for layer_type in self._heads
        ]
        return torch.cat([out, *columns], -1)
