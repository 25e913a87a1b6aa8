# SPDX-License-Identifier: Apache-2.0
"""AWQ, version ``gemm``: the layout of its linears and its ``quantization_config``.

``qweight`` int32 [K, N/8] packs eight output channels to a word, in AWQ's own order;
``qzeros`` int32 [K/G, N/8] likewise; ``scales`` are [K/G, N].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.checkpoints.groups import group_count
from vllm_rsparse.formats.checkpoints.layout import (
    GroupLayout,
    Layout,
    matrix,
    require_shape,
)
from vllm_rsparse.formats.checkpoints.scheme import (
    Keys,
    Scheme,
    layout_group,
    read_keys,
    refuse,
)
from vllm_rsparse.formats.int4 import INT4, store_int4
from vllm_rsparse.formats.nibbles import PER_WORD, unpack_nibbles

# Output channel 8j+i lies in nibble NIBBLE_OF[i] of word j.
NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AwqGemm(GroupLayout):
    """With zero points."""

    format = INT4
    required = ("qweight", "qzeros", "scales")
    dtypes: ClassVar = {"qweight": torch.int32, "qzeros": torch.int32}
    scales = "scales"

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        k, words = matrix(shapes, "qweight")
        n = words * PER_WORD
        count = group_count("qweight", k, self.group)
        require_shape(shapes, "qzeros", (count, words))
        require_shape(shapes, "scales", (count, n))
        return n, k

    def _stored(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None
    ) -> StoredWeight:
        return store_int4(
            _in_order(tensors["qweight"]),
            tensors["scales"],
            _in_order(tensors["qzeros"]),
        )


def _in_order(packed: Tensor) -> Tensor:
    """int32 [rows, N/8] to uint8 [rows, N]."""
    codes = unpack_nibbles(packed).unflatten(-1, (-1, PER_WORD))
    return codes[..., list(NIBBLE_OF)].flatten(-2)


class _Keys(Keys):
    bits: int = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(validation_alias=AliasChoices("group_size", "q_group_size"))
    zero_point: bool
    version: str = "gemm"
    modules_to_not_convert: list[str] | None = None


class AwqScheme(Scheme):
    """Parsed ``quantization_config`` of an AWQ checkpoint.

    Args:
        config: the dictionary.
        where: its file, for errors.

    Raises:
        CheckpointError: a variant that is not supported; says what to do.
    """

    method = "awq"

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        keys = read_keys(_Keys, config, where)
        if keys.bits != 4:
            refuse(where, f"AWQ with {keys.bits} bits", "use a checkpoint with 4 bits")
        if not keys.zero_point:
            refuse(
                where,
                "AWQ without zero points (zero_point = false)",
                "use a checkpoint with zero points, or a symmetric one in"
                " compressed-tensors W4A16",
            )
        if keys.version.lower() != "gemm":
            refuse(
                where,
                f"AWQ version {keys.version!r}",
                "use a checkpoint of version gemm",
            )
        self._layout = AwqGemm(layout_group(where, keys.group_size))
        self._plain = keys.modules_to_not_convert or []
        # Without a list, vLLM decides by the tensors in the files.
        self.tensors_decide = not self._plain

    def layout(self, name: str) -> Layout | None:
        """See the base class. The list holds substrings of names, as in vLLM."""
        if any(part in name for part in self._plain):
            return None
        return self._layout
