# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: the calls into ``kernels/*.cpp``.

A call costs 7 us here and 12 us through the op, in addition to the kernel's time (AMD
EPYC). The kernels keep their scratch memory: a call allocates only the output.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import NoReturn

import torch
from torch import Tensor

from vllm_rsparse.errors import BuildError
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.plain import FLOAT
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
    sparse.argtypes = [*[ctypes.c_int] * 3, *[_I64] * 6, *[_POINTER] * 12]
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
        x: [M, K], float32, bfloat16 or float16; in the weight's dtype where that is one
            of them.
        operands: the weight's rows, an input channel each, must follow one another; u
            and v are copied at every call unless ``from_shards`` laid them out.
        bias: [N] in x's dtype, or None.

    Raises:
        OperandError: a tensor does not fit the others.
        BuildError: the kernel was not built yet and cannot be.
    """
    operands.check(x, bias)
    u, v = operands.u, operands.v
    if any(operands.ranks):
        u, v = u.t().contiguous(), v.t().contiguous()
    return _sparse_call(
        x,
        operands.weight,
        bias,
        operands.thresholds,
        (u, v),
        operands.correction,
        tuple(operands.shard_sizes),
        tuple(operands.ranks),
    )


def dense_by_rows(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """The dense route for a few tokens on a quantized weight: every channel is kept.

    The result is the same bits for any number of threads, and for a token whatever
    other tokens are in the call.

    Args:
        x: [M, K], float32, bfloat16 or float16.
        weight: in any format.
        bias: [N] in x's dtype, or None.

    Raises:
        OperandError: a tensor does not fit the others.
        BuildError: the kernel was not built yet and cannot be.
    """
    check_input(x, weight, bias)
    no_factors = x.new_empty(0)
    return _sparse_call(
        x,
        weight,
        bias,
        _keep_all(weight.format.planes, weight.k),
        (no_factors, no_factors),
        None,
        (weight.n,),
        (0,),
    )


def _sparse_call(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    thresholds: Tensor,
    factors: tuple[Tensor, Tensor],
    correction: Tensor | None,
    sizes: tuple[int, ...],
    ranks: tuple[int, ...],
) -> Tensor:
    """Call the kernel; ``factors`` are U stored [R, N] and V stored [K, R]."""
    if weight.format is FLOAT:
        require_whole_rows(weight)
    tokens, n = x.shape[0], weight.n
    out = torch.empty(tokens, n, dtype=x.dtype)
    if tokens == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    scales, zeros = weight.scales, weight.zeros
    sparse, _ = _kernels()
    status = sparse(
        _ELEMENTS[x.dtype],
        weight.format.code,
        _ELEMENTS[x.dtype if scales is None else scales.dtype],
        tokens,
        n,
        weight.k,
        x.stride(0),
        weight.group,
        len(sizes),
        _array(sizes),
        _array(ranks),
        x.data_ptr(),
        weight.data.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        thresholds.data_ptr(),
        factors[0].data_ptr(),
        factors[1].data_ptr(),
        None if correction is None else correction.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    if status:
        _refuse(x, weight)
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
    status = dense(
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
    if status:
        _refuse(x, weight)
    return out


def _refuse(x: Tensor, weight: StoredWeight) -> NoReturn:
    """Report a number that the compiled kernel does not know; nothing was written."""
    raise BuildError(
        f"the compiled kernel of the backend cpu does not know {x.dtype} with weights"
        f" of the format {weight.format.name}; remove the cached builds in"
        f" {cpu_build.cache_directory()}"
    )


@lru_cache(maxsize=64)
def _keep_all(planes: int, k: int) -> Tensor:
    """Thresholds [planes, K] that no magnitude falls below."""
    return torch.full((planes, k), -1.0)


@lru_cache(maxsize=256)
def _array(values: tuple[int, ...]) -> ctypes.Array:
    return (_I64 * len(values))(*values)
