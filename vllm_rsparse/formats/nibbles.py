# SPDX-License-Identifier: Apache-2.0
"""Four-bit codes packed eight to an int32 along the last dimension, low nibble first.

Both functions reinterpret bytes, so they assume a little-endian machine; every device
that PyTorch and vLLM support is.
"""

import torch
from torch import Tensor

PER_WORD = 8


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., 8 m], each 0..15, to contiguous int32 [..., m].

    Bits 4i to 4i+3 of word j hold code 8j+i.

    Raises:
        ValueError: the last dimension is no multiple of 8.
    """
    if codes.shape[-1] % PER_WORD:
        raise ValueError(f"cannot pack {list(codes.shape)} eight to a word")
    low, high = codes[..., 0::2], codes[..., 1::2]
    return (low | (high << 4)).contiguous().view(torch.int32)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of ``pack_nibbles``: int32 [..., m] to uint8 [..., 8 m]."""
    # Flat: a dimension of one word may have any stride, which `view` would refuse.
    pairs = packed.reshape(-1).contiguous().view(torch.uint8)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1)
    return codes.view(*packed.shape[:-1], PER_WORD * packed.shape[-1])
