# SPDX-License-Identifier: Apache-2.0
"""The format ``fp8-block``: float8_e4m3fn with one scale per block of 128 x 128.

    W[n, k] = q[n, k] * s[k // 128, n // 128]

``data`` is the [N, K] view of contiguous [K, N] storage, ``scales`` are contiguous
float32 [ceil(K/128), ceil(N/128)]. Where several linears are fused, each but the last
must have a multiple of 128 output channels, so that no block spans two of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormat, WeightFormatError
from vllm_rsparse.formats.require import require_fp8_rows, require_tensor

BLOCK = 128


class Fp8BlockFormat(WeightFormat):
    """The scale multiplies the input channel, once for 128 output channels."""

    name = "fp8-block"
    code = 2

    def check(self, weight: StoredWeight) -> None:
        """See the base class."""
        require_fp8_rows(weight)
        blocks = (_blocks(weight.k), _blocks(weight.n))
        require_tensor("scales", weight.scales, blocks, (torch.float32,))
        if weight.group != BLOCK:
            raise WeightFormatError(
                f"the format fp8-block has groups of {BLOCK}, got {weight.group}"
            )

    def check_shards(self, sizes: Sequence[int]) -> None:
        """See the base class. No block spans two linears."""
        if any(size % BLOCK for size in sizes[:-1]):
            raise WeightFormatError(
                f"linears with {', '.join(map(str, sizes))} output channels cannot be"
                f" fused in the format fp8-block: each but the last needs a multiple of"
                f" {BLOCK}; use fewer tensor-parallel ranks"
            )

    def dequantise(self, weight: StoredWeight) -> Tensor:
        """See the base class."""
        assert weight.scales is not None
        rows = weight.scales.repeat_interleave(BLOCK, 1)[:, : weight.n]
        scales = rows.repeat_interleave(BLOCK, 0)[: weight.k]
        return weight.data.float() * scales.t()


FP8_BLOCK = Fp8BlockFormat()


def store_fp8_block(elements: Tensor, scales: Tensor) -> StoredWeight:
    """Lay out a weight with block scales as the kernels read it.

    Args:
        elements: float8_e4m3fn [N, K]; copied unless it is stored [K, N].
        scales: [ceil(N/128), ceil(K/128)] as checkpoints have it, any float dtype.

    Raises:
        WeightFormatError: shapes or dtypes that the format does not have.
    """
    n, k = elements.shape
    return StoredWeight(
        FP8_BLOCK,
        elements.t().contiguous().t(),
        n,
        k,
        scales.t().float().contiguous(),
        group=BLOCK,
    )


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
