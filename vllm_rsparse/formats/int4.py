# SPDX-License-Identifier: Apache-2.0
"""The format ``int4``: four-bit codes with a scale, and maybe a zero point, per group.

    W[n, k] = (q[k, n] - z[k // G, n]) * s[k // G, n]

``data`` is contiguous int32 [K, N/8]: bits 4i to 4i+3 of word j in row k are the code q
of output channel 8j+i, 0 to 15. ``scales`` are contiguous [K/G, N] in bfloat16, float16
or float32. ``zeros`` are contiguous int32 [K/G, N/8], packed like ``data``, or None
for a zero point of 8 everywhere. The group G is 32, 64, 128, or K (one scale per output
channel).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormat, WeightFormatError
from vllm_rsparse.formats.nibbles import PER_WORD, pack_nibbles, unpack_nibbles
from vllm_rsparse.formats.require import require_nibbles, require_whole_words

GROUPS = (32, 64, 128)
SYMMETRIC_ZERO = 8


class Int4Format(WeightFormat):
    """Groups of input channels share a scale per output channel."""

    name = "int4"
    code = 3

    def check(self, weight: StoredWeight) -> None:
        """See the base class."""
        require_nibbles(weight, GROUPS, whole=True)

    def check_shards(self, sizes: Sequence[int]) -> None:
        """See the base class. No word holds channels of two linears."""
        require_whole_words(self.name, sizes)

    def dequantise(self, weight: StoredWeight) -> Tensor:
        """See the base class."""
        assert weight.scales is not None
        codes = unpack_nibbles(weight.data).float()
        groups = codes.view(-1, weight.group, weight.n)
        if weight.zeros is None:
            groups -= SYMMETRIC_ZERO
        else:
            groups -= unpack_nibbles(weight.zeros).float()[:, None]
        groups *= weight.scales.float()[:, None]
        return codes.t()


INT4 = Int4Format()


def store_int4(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> StoredWeight:
    """Pack codes into the layout of the kernels.

    Args:
        codes: uint8 [K, N], each 0 to 15.
        scales: [K/G, N]; G follows from its rows.
        zeros: uint8 [K/G, N], each 0 to 15, or None for 8 everywhere.

    Raises:
        WeightFormatError: shapes, dtypes or values that the format does not have.
    """
    k, n = codes.shape
    if n % PER_WORD:
        raise WeightFormatError(
            f"weight [N, K] = [{n}, {k}]: the format int4 packs eight output channels"
            f" to a word, so N must be a multiple of {PER_WORD}"
        )
    if scales.dim() != 2 or not scales.shape[0] or k % scales.shape[0]:
        raise WeightFormatError(
            f"scales must be [K/G, N] for [N, K] = [{n}, {k}] and a group G that"
            f" divides K, got {list(scales.shape)}"
        )
    _require_codes("codes", codes)
    if zeros is not None:
        _require_codes("zeros", zeros)
        if zeros.shape != scales.shape:
            raise WeightFormatError(
                f"zeros must be {list(scales.shape)} like the scales, got"
                f" {list(zeros.shape)}"
            )
    return StoredWeight(
        INT4,
        pack_nibbles(codes),
        n,
        k,
        scales.contiguous(),
        None if zeros is None else pack_nibbles(zeros),
        k // scales.shape[0],
    )


def _require_codes(name: str, codes: Tensor) -> None:
    if codes.dtype != torch.uint8:
        raise WeightFormatError(f"{name} must be uint8, got {codes.dtype}")
    if codes.numel() and int(codes.max()) > 15:
        raise WeightFormatError(
            f"{name} must lie between 0 and 15, got {int(codes.max())}"
        )
