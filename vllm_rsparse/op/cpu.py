# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: the calls into ``kernels/*.cpp``.

A call costs 7 us here and 12 us through the op, beside the kernel's time (AMD EPYC).
The kernels keep their scratch memory: the output is all that a call allocates.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from vllm_rsparse.op import cpu_build

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
        cpu_build.BuildError: that is not possible here.
    """
    _kernels()


def rsparse_linear(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    u: Tensor,
    v: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    shard_sizes: list[int],
    ranks: list[int],
) -> Tensor:
    """Sparse-plus-low-rank linear on the CPU; see ``reference.rsparse_linear``.

    The result is the same bits for any number of threads, and for a token whatever
    other tokens are in the call.

    Args:
        x: [M, K] in the weight's dtype (float32, bfloat16 or float16).
        weight: [N, K] whose transpose is contiguous.
        thresholds: float32 [S, K], contiguous.
        u, v: in the weight's dtype; copied at every call unless they are stored as
            ``packing.pack_factors`` does.

    Raises:
        ValueError: the weight is not stored [K, N], or a dtype or shape does not fit.
        cpu_build.BuildError: the kernel was not built yet and cannot be.
    """
    (tokens, k), (n, columns), dtype = x.shape, weight.shape, weight.dtype
    _check_storage(weight)
    if (
        dtype not in _ELEMENTS
        or not dtype == x.dtype == u.dtype == v.dtype
        or (bias is not None and bias.dtype != dtype)
        or thresholds.dtype != torch.float32
        or (correction is not None and correction.dtype != torch.float32)
    ):
        named = {"x": x, "weight": weight, "u": u, "v": v, "bias": bias}
        named |= {"thresholds": thresholds, "correction": correction}
        given = [f"{key} {t.dtype}" for key, t in named.items() if t is not None]
        raise ValueError(
            "x, weight, u, v and bias must share float32, bfloat16 or float16, and"
            f" thresholds and correction be float32; found {', '.join(given)}"
        )
    if (
        k != columns
        or sum(shard_sizes) != n
        or thresholds.shape != (len(shard_sizes), k)
        or len(ranks) != len(shard_sizes)
        or v.shape != (sum(ranks), k)
        or u.shape != (n, max(ranks))
        or (bias is not None and bias.shape != (n,))
        or (correction is not None and correction.shape != (n,))
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, thresholds"
            f" {tuple(thresholds.shape)}, u {tuple(u.shape)}, v {tuple(v.shape)} do not"
            f" fit shards of sizes {shard_sizes} and ranks {ranks}"
        )
    out = torch.empty(tokens, n, dtype=dtype)
    if tokens == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    thresholds = thresholds.contiguous()
    u_t, v_t = (u.t().contiguous(), v.t().contiguous()) if any(ranks) else (u, v)
    correction = None if correction is None else correction.contiguous()
    bias = None if bias is None else bias.contiguous()
    sparse, _ = _kernels()
    sparse(
        _ELEMENTS[dtype],
        tokens,
        n,
        k,
        x.stride(0),
        len(shard_sizes),
        _array(tuple(shard_sizes)),
        _array(tuple(ranks)),
        x.data_ptr(),
        weight.data_ptr(),
        thresholds.data_ptr(),
        u_t.data_ptr(),
        v_t.data_ptr(),
        None if correction is None else correction.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` for a few tokens on a weight stored [K, N].

    The result is the same bits for any number of threads, and for a token whatever
    other tokens are in the call.

    Args:
        x: [M, K] in the weight's dtype (float32, bfloat16 or float16).
        weight: [N, K] whose transpose is contiguous.
        bias: [N] or None.

    Raises:
        ValueError: the weight is not stored [K, N], or a dtype or shape does not fit.
        cpu_build.BuildError: the kernel was not built yet and cannot be.
    """
    (tokens, k), (n, columns), dtype = x.shape, weight.shape, weight.dtype
    _check_storage(weight)
    if (
        dtype not in _ELEMENTS
        or x.dtype != dtype
        or k != columns
        or (bias is not None and (bias.dtype != dtype or bias.shape != (n,)))
    ):
        given = "" if bias is None else f", bias {tuple(bias.shape)} {bias.dtype}"
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}{given} do not fit the weight"
            f" {tuple(weight.shape)} {dtype}; allowed are float32, bfloat16 and float16"
        )
    out = torch.empty(tokens, n, dtype=dtype)
    if tokens == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    _, dense = _kernels()
    dense(
        _ELEMENTS[dtype],
        tokens,
        n,
        k,
        x.stride(0),
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def _check_storage(weight: Tensor) -> None:
    if weight.stride() != (1, weight.shape[0]) and not weight.t().is_contiguous():
        raise ValueError(
            f"weight [N, K] = {tuple(weight.shape)} has strides {weight.stride()}; the"
            " cpu backend needs [K, N] storage, strides (1, N)"
        )


@lru_cache(maxsize=256)
def _array(values: tuple[int, ...]) -> ctypes.Array:
    return (_I64 * len(values))(*values)
