# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the sparse routes, for what no table has."""

from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.op.launch_rules import (
    FOUR_BIT,
    PACKED_COLUMNS,
    PROCESSORS,
    SLOTTED_TOKENS,
    SMALL_ELEMENTS,
    even_splits,
)

# Up to this many tokens the vector units keep up with memory; beyond it the matrix
# units win (H200, kernels/README.md).
VECTOR_TOKENS = 2
# Columns of a warp where blocks have slots.
_SLOTTED_COLUMNS = 128
# Most four-bit blocks of a program then, times tokens, and warps of a multiprocessor
# with 128 registers a thread.
_INTEGER_BLOCKS, _RESIDENT_WARPS = 4, 16
# Layers of this many elements are listed by default, as most of them were on the H200.
_LISTED_ELEMENTS = 80 * 2**20
# Channels that share a scale; the most of a packed block.
SCALED_CHANNELS = 128


def sparse_default(
    n: int, k: int, kind: str, tokens: int, processors: int
) -> LaunchConfig:
    """A configuration of the sparse route.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: ``StoredWeight.kind``.
        tokens: rows of the call.
        processors: multiprocessors of the device.
    """
    if kind == "float8_e4m3fn" and tokens <= VECTOR_TOKENS:
        return fp8_config(n, k, tokens, processors)
    if kind in SLOTTED_TOKENS and tokens <= SLOTTED_TOKENS[kind]:
        return slotted_config(n, k, kind, tokens, processors)
    if kind in PACKED_COLUMNS:
        return packed_config(n, k, kind, processors)
    return default_config(n, k, tokens, processors)


def fp8_config(n: int, k: int, tokens: int, processors: int) -> LaunchConfig:
    """A configuration of the vector units for fp8, from what won on the H200.

    Small layers are masked in place, with about 12 programs per multiprocessor; large
    ones are listed. 28672 x 4096 takes 19.4 us listed with 1024 columns and two warps,
    31.4 with four warps, and 21.8 masked.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        tokens: rows of the call, 1 or 2.
        processors: multiprocessors of the device.
    """
    if n * k >= _LISTED_ELEMENTS:
        split_k = max(1, 8 * processors // -(-n // 1024))
        block_k = 16 if tokens == 1 else 8
        return LaunchConfig(1024, block_k, split_k, 2, 1, False, listed=True)
    block_n, block_k = (128, 64) if tokens == 1 else (256, 32)
    most = max(1, k // block_k)
    split_k = min(most, max(1, 12 * processors // -(-n // block_n)))
    return LaunchConfig(block_n, block_k, split_k, 1, 1, False)


def slotted_config(
    n: int, k: int, kind: str, tokens: int, processors: int
) -> LaunchConfig:
    """A packed configuration for ``SLOTTED_TOKENS``.

    Layers of few columns take fewer warps a program, so that there are more programs.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: of the weight, packable and not fp8 with scales per channel.
        tokens: rows of the call.
        processors: multiprocessors of the device.
    """
    blocks = -(-k // SCALED_CHANNELS)
    programs = 220 * processors // PROCESSORS
    four_bit = kind in FOUR_BIT
    # The loop of two planes with four warps takes 134 registers, with eight 128: 12 and
    # 16 warps of a multiprocessor.
    many = kind == "int8-planes" and n * k >= _LISTED_ELEMENTS
    warps = 8 if many else 4
    while warps > 1 and -(-n // (warps * _SLOTTED_COLUMNS)) * blocks < programs:
        warps //= 2
    block_n = warps * _SLOTTED_COLUMNS
    tiles = -(-n // block_n)
    if four_bit:
        # All warps of a launch should be resident, and enough of them: 4096 x 14336 in
        # int4 takes 9.6 us with 896 warps and 10.4 with 1,792 (50% kept), in planes
        # 14.5 and 15.9 with 1,792 and 896 (4.16 bits).
        enough = (1500 if kind == "int8-planes" else 880) * processors // PROCESSORS
        fewest = -(-blocks // (_INTEGER_BLOCKS // tokens))
        split_k = even_splits(tiles * warps, blocks, enough, fewest)
        resident = _RESIDENT_WARPS * processors // (tiles * warps)
        if split_k > resident:
            # Fewer than would be enough, but all resident, if there is such a number.
            below = range(resident, fewest - 1, -1)
            split_k = next((s for s in below if blocks % s == 0), split_k)
    else:
        split_k = even_splits(tiles, blocks, 2 * programs)
    return LaunchConfig(block_n, SCALED_CHANNELS, split_k, warps, 2, False, packed=True)


def packed_config(n: int, k: int, kind: str, processors: int) -> LaunchConfig:
    """A configuration of the sparse route for two tokens or more of int4 and fp8.

    A program is one warp. Registers allow 12 of them per multiprocessor and 6 are
    enough; a layer that would have fewer is divided into shorter blocks of channels.
    The more blocks a program has, the more steps have their words in flight together:
    in int4 with four blocks a program, 28672 x 4096 took 27.5, 22.3 and 20.3 us with
    one, two and four steps (the first two on an H100); 6144 x 4096 with one block took
    7.3 us with one and 7.9 with two.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: of the weight.
        processors: multiprocessors of the device.
    """
    block_n = PACKED_COLUMNS[kind]
    block_k = 64 if n * k < SMALL_ELEMENTS else 128
    enough = 800 * processors // PROCESSORS
    blocks = -(-k // block_k)
    split_k = even_splits(-(-n // block_n), blocks, enough)
    each = blocks // split_k
    stages = 1 if each == 1 else 2 if each < 4 else 4
    return LaunchConfig(block_n, block_k, split_k, 1, stages, False, packed=True)


def default_config(n: int, k: int, tokens: int, processors: int) -> LaunchConfig:
    """A configuration for any shape on any device, from the best ones on the H200.

    Channels are split until there are enough programs to hide the latency of memory:
    about ten warps per multiprocessor. On the vector units, listing pays if there is
    much to read; smaller layers are masked.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        tokens: rows of the call.
        processors: multiprocessors of the device.
    """
    use_dot = tokens > VECTOR_TOKENS
    listed = not use_dot and n * k >= _LISTED_ELEMENTS
    # Enough programs for 132 multiprocessors.
    block_n, block_k, warps, enough = 128, 32, 1, 1500
    if use_dot:
        block_n, warps, enough = 256, 4, 256
    elif listed:
        block_n, block_k, warps, enough = 1024, 16, 4, 400
    split_k = 1
    enough = enough * processors // PROCESSORS
    while -(-n // block_n) * split_k < enough and k >= 2 * split_k * block_k:
        split_k *= 2
    stages = 3 if use_dot else 1
    return LaunchConfig(block_n, block_k, split_k, warps, stages, use_dot, listed)
