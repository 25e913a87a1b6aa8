# SPDX-License-Identifier: Apache-2.0
"""Launch configurations that are worth trying for a layer."""

import math
from collections.abc import Iterator

import torch

from vllm_rsparse.bench.layers import Layer
from vllm_rsparse.formats.registry import format_of_name
from vllm_rsparse.kernels.launch_config import MOST_LISTED, LaunchConfig
from vllm_rsparse.op.dense_defaults import DENSE_TOKENS, WIDE_TOKENS, dense_config
from vllm_rsparse.op.launch_rules import SLOTTED_TOKENS
from vllm_rsparse.op.sparse_defaults import VECTOR_TOKENS, sparse_default
from vllm_rsparse.op.tables import PACKABLE, PACKED_ONLY

# More splits would spend their time on adding partial sums.
_MOST_SPLITS = 128

# (block_n, block_k, warps, stages, use_dot, listed)
_Kind = tuple[int, int, int, int, bool, bool]
_LISTED: list[_Kind] = [
    (block_n, block_k, warps, 1, False, True)
    for block_n, block_k, warps in (
        (128, 32, 1),
        (256, 16, 1),
        (512, 16, 2),
        (1024, 8, 4),
        (1024, 16, 4),
    )
]
# Half a warp or more reads one row: an unwanted row costs almost nothing.
_MASKED: list[_Kind] = [
    (block_n, block_k, warps, 1, False, False)
    for block_n, block_k, warps in ((128, 32, 1), (128, 64, 2), (256, 16, 1))
]
_DOT: list[_Kind] = [
    (block_n, 32, 4, stages, True, False) for block_n in (128, 256) for stages in (1, 3)
]
# Elements of a byte: 16 of them a thread, 8 threads a row of 128.
_LISTED_BYTES: list[_Kind] = [
    (block_n, block_k, warps, 1, False, True)
    for block_n, block_k, warps in ((256, 32, 1), (1024, 8, 2), (1024, 16, 2))
]
_MASKED_BYTES: list[_Kind] = [
    (block_n, block_k, warps, 1, False, False)
    for block_n, block_k, warps in (
        (128, 32, 1),
        (128, 64, 1),
        (256, 32, 1),
        (256, 64, 2),
    )
]
# Columns of a packed warp: 8 or 16 bytes a thread, 8 threads a row.
_PACKED_COLUMNS = {"int4": (256, 128), "int8-planes": (256, 128)}
_PACKED_BYTE_COLUMNS = (128, 64)
# Steps of 16 channels whose words are in flight together: for programs of one block of
# channels, and of several, where one step was never the fastest
# (docs/notes/kernels-quantized.md).
_STEPS_OF_ONE, _STEPS_OF_MORE = (1, 2, 4), (2, 4)
# Tokens from which the alternative of the packed kernel is tried on the dense route.
_FEWEST_DOT_TOKENS = 8
# (block_n, block_k, warps, stages) of the kernel that widens tiles.
_DENSE_TILES = (
    (64, 64, 4, 4),
    (64, 128, 4, 3),
    (128, 64, 4, 3),
    (128, 64, 4, 4),
    (128, 128, 4, 3),
    (128, 128, 8, 3),
    (256, 64, 4, 3),
)
# (words of a thread, channels, stages) of the kernel of warpgroups.
_COLUMNS = ((1, 128, 3), (1, 128, 4), (2, 128, 3), (1, 64, 1), (1, 64, 3), (2, 64, 3))
# From here on, a packed configuration of one warp is one of ``wide_linear``.
_FEWEST_WIDE_TOKENS = 17
# Warps of a packed launch, a multiprocessor: registers allow 8 to 16 at a time.
_PACKED_WARPS = (4, 28)
_SLOTTED_WARPS = (1, 4)


def candidates(layer: Layer, tokens: int, processors: int) -> list[LaunchConfig]:
    """Configurations worth trying for a shape, the most likely first.

    The first is what is used without a table; those that resemble it follow.

    Args:
        layer: shape, format and group.
        tokens: rows of the call.
        processors: multiprocessors.
    """
    kind = kind_of_layer(layer)
    default = sparse_default(layer.n, layer.k, kind, tokens, processors)
    found = dict.fromkeys([default, *_vector_or_dot(layer, kind, tokens, processors)])
    if kind in PACKABLE:
        found |= dict.fromkeys(_packed(layer, kind, tokens, processors))
    return sorted(found, key=lambda config: _distance(config, default))


def dense_candidates(layer: Layer, tokens: int, processors: int) -> list[LaunchConfig]:
    """Configurations of the dense route, the most likely first; none for floats.

    Args:
        layer: shape, format and group.
        tokens: rows of the call.
        processors: multiprocessors.
    """
    kind = kind_of_layer(layer)
    if kind not in PACKABLE or tokens > DENSE_TOKENS:
        return []
    default = dense_config(layer.n, layer.k, kind, tokens, processors)
    found = dict.fromkeys([default])
    if tokens <= (WIDE_TOKENS if kind == "int4" else _FEWEST_WIDE_TOKENS - 1):
        found |= dict.fromkeys(_packed_dense(layer, kind, tokens, processors))
    if tokens >= _FEWEST_DOT_TOKENS:
        found |= dict.fromkeys(_dot_dense(layer, processors))
        found |= dict.fromkeys(_columns_dense(layer, kind, processors))
    return sorted(found, key=lambda config: _distance(config, default))


def _packed_dense(
    layer: Layer, kind: str, tokens: int, processors: int
) -> Iterator[LaunchConfig]:
    """Of the packed kernel without lists; programs that take as many blocks each."""
    fewest, most = (processors * warps for warps in _PACKED_WARPS)
    columns = {*_PACKED_COLUMNS.get(kind, _PACKED_BYTE_COLUMNS), 64}
    steps_tried: tuple[int, ...] = (2, 4)
    if tokens >= _FEWEST_WIDE_TOKENS:
        # 256 columns leave registers for the sums of 16 tokens, and two steps were
        # always slower with 64 tokens (docs/notes/kernels-quantized.md).
        columns -= {256}
        steps_tried = (4,)
    for block_n in sorted(columns, reverse=True):
        tiles = -(-layer.n // block_n)
        blocks = -(-layer.k // 128)
        for split_k in (split for split in range(1, blocks + 1) if not blocks % split):
            if fewest <= tiles * split_k <= most or split_k == blocks:
                for steps in steps_tried:
                    yield LaunchConfig(
                        block_n, 128, split_k, 1, steps, False, packed=True
                    )


def _dot_dense(layer: Layer, processors: int) -> Iterator[LaunchConfig]:
    """Of the kernel that widens tiles."""
    for block_n, block_k, warps, stages in _DENSE_TILES:
        for split_k in _splits(layer, block_n, block_k, processors):
            yield LaunchConfig(block_n, block_k, split_k, warps, stages, True)


def _columns_dense(layer: Layer, kind: str, processors: int) -> Iterator[LaunchConfig]:
    """Of the kernel that multiplies words by warpgroups."""
    for words, channels, stages in _COLUMNS:
        block_n = words * 32 * (8 if kind in _PACKED_COLUMNS else 4)
        block_k = min(channels, layer.group or channels)
        for split_k in _splits(layer, block_n, block_k, processors):
            yield LaunchConfig(block_n, block_k, split_k, 4, stages, False, packed=True)


def _splits(layer: Layer, block_n: int, block_k: int, processors: int) -> Iterator[int]:
    """Powers of two, and as many programs as run at once, two a multiprocessor."""
    tiles = -(-layer.n // block_n)
    for split_k in sorted({1, 2, 4, 8, 16, max(1, 2 * processors // tiles)}):
        programs = tiles * split_k / processors
        if 0.9 <= programs <= 8 and split_k * block_k <= layer.k:
            yield split_k


def kind_of_layer(layer: Layer) -> str:
    """``StoredWeight.kind`` of the layer's weight; bfloat16 stands for all floats."""
    dtypes = {"float": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    dtype = dtypes.get(layer.format, torch.int32)
    return format_of_name(layer.format).kind(dtype)


def _vector_or_dot(
    layer: Layer, kind: str, tokens: int, processors: int
) -> Iterator[LaunchConfig]:
    """Of the kernels that widen elements as they load them.

    Splits are powers of two, and numbers that give every multiprocessor the same number
    of programs: 448 programs on 132 of them leave a quarter idle at the end.
    """
    if kind in PACKED_ONLY:
        return
    kinds = _DOT
    if tokens <= VECTOR_TOKENS and layer.format == "fp8":
        kinds = _MASKED_BYTES + _LISTED_BYTES
    elif tokens <= VECTOR_TOKENS:
        kinds = _LISTED + _MASKED
    for block_n, block_k, warps, stages, use_dot, listed in kinds:
        tiles = _tiles(layer, block_n)
        even = {waves * processors // tiles for waves in (1, 2, 3, 4, 6, 8, 12)}
        for split_k in sorted({8, 16, 32, 64} | even):
            warps_each = tiles * split_k * warps / processors
            if not 1 <= split_k <= _MOST_SPLITS or not 4 <= warps_each <= 48:
                continue
            if split_k * block_k > layer.k * (2 if listed else 1):
                continue
            yield LaunchConfig(
                block_n, block_k, split_k, warps, stages, use_dot, listed
            )


def _packed(
    layer: Layer, kind: str, tokens: int, processors: int
) -> Iterator[LaunchConfig]:
    """Of the packed kernel: programs that all take as many blocks of channels.

    And those whose warps are just all resident at once, even if some take a block more
    than others.
    """
    planes = format_of_name(layer.format).planes
    group = layer.group if 0 < layer.group < layer.k else 128
    fewest, most = (processors * warps for warps in _PACKED_WARPS)
    columns = _PACKED_COLUMNS.get(kind, _PACKED_BYTE_COLUMNS)
    several = _SLOTTED_WARPS if tokens <= SLOTTED_TOKENS.get(kind, 0) else (1,)
    for block_n, warps in ((c * warps, warps) for c in columns for warps in several):
        tiles = _tiles(layer, block_n)
        for block_k in sorted({min(64, group), min(128, group)}):
            blocks = -(-layer.k // block_k)
            least = max(1, -(-planes * layer.k // MOST_LISTED))
            resident = 12 * processors // (tiles * warps)
            splits = {
                split_k
                for split_k in range(least, blocks + 1)
                if blocks % split_k == 0 or split_k == resident
            }
            for split_k in sorted(splits):
                launched = tiles * split_k * warps
                if not fewest <= launched <= most and split_k < blocks:
                    continue
                for steps in _STEPS_OF_ONE if split_k == blocks else _STEPS_OF_MORE:
                    yield LaunchConfig(
                        block_n, block_k, split_k, warps, steps, False, packed=True
                    )


def _tiles(layer: Layer, block_n: int) -> int:
    return sum(-(-size // block_n) for size in layer.shard_sizes)


def _distance(one: LaunchConfig, other: LaunchConfig) -> float:
    """How much two configurations differ: doublings of a size, and kinds of kernel."""
    kinds = ("use_dot", "listed", "packed")
    sizes = ("block_n", "block_k", "split_k", "num_warps", "num_stages")
    doublings = sum(
        abs(math.log2(getattr(one, size) / getattr(other, size))) for size in sizes
    )
    return doublings + 2 * sum(getattr(one, k) != getattr(other, k) for k in kinds)
