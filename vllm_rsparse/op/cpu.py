# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: the calls into ``kernels/*.cpp``.

A call costs 7 us here and 12 us through the op, in addition to the kernel's time (AMD
EPYC). The kernels keep their scratch memory: a call allocates only the output.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.op import cpu_build
from vllm_rsparse.op.operands import (
    SparseOperands,
    check_input,
    require_whole_rows,
)

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p


# Tokens up to which ``dense_linear`` is faster than torch's product on [K, N] storage:
# bfloat16 on AMD EPYC (docs/cpu.md); the other types gain beyond it.
MAX_DENSE_TOKENS = 64


@lru_cache(maxsize=1)
def _kernels() -> tuple[Callable[..., int], Callable[..., int]]:
    library = cpu_build.load()
    sparse, dense = library.vllm_rsparse_linear, library.vllm_rsparse_dense_linear
    sparse.restype = dense.restype = ctypes.c_int
    sparse.argtypes = [ctypes.c_int, *[_I64] * 5, *[_POINTER] * 10]
    dense.argtypes = [ctypes.c_int, *[_I64] * 4, *[_POINTER] * 4]
    return sparse, dense


def build() -> None:
    """Compile and load the kernels, so that no request has to wait for it.

    Raises:
        BuildError: this is not possible here.
    """
    _kernels()


def rsparse_linear(x: Tensor, operands: SparseOperands, bias: Tensor | None) -> Tensor:
    """Sparse-plus-low-rank linear on the CPU; see ``reference.rsparse_linear``.

    The result is the same bits for any number of threads, and for a token whatever
    other tokens are in the call.

    Args:
        x: [M, K] in the weight's dtype (float32, bfloat16 or float16).
        operands: the weight's rows, an input channel each, must follow one another; u
            and v are copied at every call unless ``from_shards`` laid them out.
        bias: [N] in x's dtype, or None.

    Raises:
        OperandError: a tensor does not fit the others.
        BuildError: the kernel was not built yet and cannot be.
    """
    operands.check(x, bias)
    require_whole_rows(operands.weight)
    weight, sizes, ranks = operands.weight, operands.shard_sizes, operands.ranks
    tokens, n = x.shape[0], weight.n
    out = torch.empty(tokens, n, dtype=x.dtype)
    if tokens == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    u, v, correction = operands.u, operands.v, operands.correction
    u_t, v_t = (u.t().contiguous(), v.t().contiguous()) if any(ranks) else (u, v)
    sparse, _ = _kernels()
    sparse(
        _ELEMENTS[x.dtype],
        tokens,
        n,
        weight.k,
        x.stride(0),
        len(sizes),
        _array(tuple(sizes)),
        _array(tuple(ranks)),
        x.data_ptr(),
        weight.data.data_ptr(),
        operands.thresholds.data_ptr(),
        u_t.data_ptr(),
        v_t.data_ptr(),
        None if correction is None else correction.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def dense_linear(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` for a few tokens on a weight stored [K, N].

    The result is the same bits for any number of threads, and for a token whatever
    other tokens are in the call.

    Args:
        x: [M, K] in the weight's dtype (float32, bfloat16 or float16).
        weight: its rows, an input channel each, must follow one another.
        bias: [N] in x's dtype, or None.

    Raises:
        OperandError: a tensor does not fit the others.
        BuildError: the kernel was not built yet and cannot be.
    """
    check_input(x, weight, bias)
    require_whole_rows(weight)
    tokens, n = x.shape[0], weight.n
    out = torch.empty(tokens, n, dtype=x.dtype)
    if tokens == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    _, dense = _kernels()
    dense(
        _ELEMENTS[x.dtype],
        tokens,
        n,
        weight.k,
        x.stride(0),
        x.data_ptr(),
        weight.data.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


@lru_cache(maxsize=256)
def _array(values: tuple[int, ...]) -> ctypes.Array:
    return (_I64 * len(values))(*values)
