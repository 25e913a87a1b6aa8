# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code of the kernels: the tuples that they pass, and tiles of matrices."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Input(NamedTuple):
    """x [M, K]: channels are contiguous, rows ``stride_m`` apart."""

    ptr: Any
    stride_m: Any
    k: Any


class Matrix(NamedTuple):
    """A stored matrix, an input channel a row: the weight or V."""

    ptr: Any
    stride_k: Any
    stride_n: Any


class Range(NamedTuple):
    """Rows or columns of a program: their indices, and the first one beyond them."""

    offsets: Any
    end: Any


class Split(NamedTuple):
    """Which of the programs that interleave the channels of a column tile."""

    index: Any
    count: Any


class Lists(NamedTuple):
    """Workspace of a listing program; see ``channels.list_channels``."""

    channel_ptr: Any
    value_ptr: Any


class Constants(NamedTuple):
    """Per output column, each a pointer or None."""

    scale_ptr: Any
    correction_ptr: Any
    bias_ptr: Any


class Tiling(NamedTuple):
    """Constants of a compiled program, for one of its two kinds of tile.

    A tuple of numbers, which JSON can hold: where something watches compilations, as
    vLLM does once it is warm, Triton writes a kernel's constants as JSON and fails on
    other objects.

    Attributes:
        block_m: tokens.
        block_n: output columns.
        block_k: input channels of one loop iteration.
        rows: channels that all threads read with one 16-byte load each.
        channels: most channels that a program lists; None if it masks them in place.
        even_n: no tile ends before its last column.
        stages: with ``use_dot``, loop iterations whose loads are in flight.
        use_dot: multiply on the matrix units.
        widen: in float32, not as stored; for the interpreter, see ``dot_dtype``.
        wide: an offset into a matrix may need 64 bits, which cost three more
            instructions per row.
        pdl: programmatic dependent launch.
    """

    block_m: int
    block_n: int
    block_k: int
    rows: int
    channels: int | None
    even_n: bool
    stages: int
    use_dot: bool
    widen: bool
    wide: bool
    pdl: bool


@triton.jit
def load_tile(matrix, offs_k, offs_n, mask, WIDE: tl.constexpr):
    """Elements [offs_k, offs_n] of a matrix; zero, and not read, where masked."""
    if WIDE:
        offsets = offs_k.to(tl.int64) * matrix.stride_k
        offsets = offsets + offs_n.to(tl.int64) * matrix.stride_n
    else:
        offsets = offs_k * matrix.stride_k + offs_n * matrix.stride_n
    if mask is None:
        tile = tl.load(matrix.ptr + offsets, eviction_policy="evict_first")
    else:
        tile = tl.load(
            matrix.ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first"
        )
    return tile


@triton.jit
def prefetch(pointers):
    """Ask for the lines of the cache that these are in, in L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def locate_tile(tile, first_shard_column, sizes, BLOCK_N: tl.constexpr):
    """Shard, first column and end column of a tile; tiles never straddle shards."""
    shard = 0
    begin = 0
    end = 0
    shard_begin = first_shard_column
    for index in tl.static_range(len(sizes)):
        tiles = tl.cdiv(sizes[index], BLOCK_N)
        here = (tile >= 0) & (tile < tiles)
        shard = tl.where(here, index, shard)
        begin = tl.where(here, shard_begin + tile * BLOCK_N, begin)
        end = tl.where(here, shard_begin + sizes[index], end)
        tile -= tiles
        shard_begin += sizes[index]
    return shard, begin, end
