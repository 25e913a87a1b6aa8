# SPDX-License-Identifier: Apache-2.0
"""Comparing tensors bit by bit: -0 is not 0, and a NaN is itself."""

import torch
from torch import Tensor

_INTEGERS = {torch.float32: torch.int32}


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = _INTEGERS.get(a.dtype, torch.int16)
    return torch.equal(a.view(kind), b.view(kind))
