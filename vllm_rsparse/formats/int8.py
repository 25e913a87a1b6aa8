# SPDX-License-Identifier: Apache-2.0
"""The format ``int8``: signed eight-bit codes with a scale per group, no zero points.

    W[n, k] = q[n, k] * s[k // G, n]

``data`` is contiguous int8 [N, K], ``scales`` are contiguous float32 [K/G, N]. The
group G is 128, or K (one scale per output channel). Checkpoints have it; kernels do not
read it: it is served as two planes (``int8_planes``).
"""

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormat, WeightFormatError
from vllm_rsparse.formats.require import require_tensor

GROUP = 128


class Int8Format(WeightFormat):
    """Groups of input channels share a scale per output channel."""

    name = "int8"
    code = 5

    def check(self, weight: StoredWeight) -> None:
        """See the base class."""
        n, k, group = weight.n, weight.k, weight.group
        if group not in (GROUP, k) or k % group:
            raise WeightFormatError(
                f"weight [N, K] = [{n}, {k}]: groups of {group} input channels; the"
                f" format int8 takes {GROUP} if that divides K, or K itself"
            )
        require_tensor("weight", weight.data, (n, k), (torch.int8,))
        require_tensor("scales", weight.scales, (k // group, n), (torch.float32,))
        if weight.zeros is not None:
            raise WeightFormatError("the format int8 has no zeros")

    def dequantise(self, weight: StoredWeight) -> Tensor:
        """See the base class."""
        assert weight.scales is not None
        groups = weight.data.float().view(weight.n, -1, weight.group)
        return (groups * weight.scales.t()[..., None]).flatten(1)


INT8 = Int8Format()


def store_int8(codes: Tensor, scales: Tensor) -> StoredWeight:
    """A weight as the format has it.

    Args:
        codes: int8 [N, K].
        scales: [N, K/G], in any float dtype.

    Raises:
        WeightFormatError: shapes or dtypes that the format does not have.
    """
    n, k = codes.shape
    rows = scales.t().float().contiguous()
    return StoredWeight(INT8, codes.contiguous(), n, k, rows, group=k // len(rows))
