# SPDX-License-Identifier: Apache-2.0
"""A kernel with every kind of argument that the launchers pass, compiled at once."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A tensor and the distance between its rows."""

    ptr: Any
    stride: Any


@triton.jit
def small_kernel(
    rows, out_ptr, scale_ptr, count, sizes, SHAPE: tl.constexpr, DTYPE: tl.constexpr
):
    """``out[0] = rows[count, sizes[0]]``, scaled or not."""
    value = tl.load(rows.ptr + count * rows.stride + sizes[0]).to(DTYPE)
    if scale_ptr is not None:
        value *= tl.load(scale_ptr)
    tl.store(out_ptr + SHAPE[0], value.to(out_ptr.dtype.element_ty))
