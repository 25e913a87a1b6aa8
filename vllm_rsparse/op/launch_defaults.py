# SPDX-License-Identifier: Apache-2.0
"""Launch configurations for shapes and devices that no table has.

They follow what won on an H100 and an H200, scaled by the number of multiprocessors;
the measurements are in docs/notes/kernels.md and docs/notes/kernels-quantized.md.
"""

from vllm_rsparse.kernels.launch_config import LaunchConfig

# Up to this many tokens the vector units keep up with memory; beyond it the matrix
# units win (H200, kernels/README.md).
VECTOR_TOKENS = 2
# Columns of a program of the packed kernel: 16 bytes a thread, 8 threads a row.
_PACKED_COLUMNS = {
    "int4": 256,
    "int8-planes": 256,
    "float8_e4m3fn": 128,
    "fp8-block": 128,
}
_FOUR_BIT = ("int4", "int8-planes")
# Columns of a warp, with one token and blocks that are scaled.
_ONE_TOKEN_COLUMNS = 128
# Up to this many elements the packed kernel takes blocks of 64 channels, not 128.
_SMALL_ELEMENTS = 40 * 10**6
# Tokens up to which the packed kernel reads a whole weight fastest, by kind; up to
# which ``wide_linear`` does, which reads int4; and up to which any kernel that reads
# the weight once does. Beyond, the weight is widened for the library.
_PACKED_TOKENS = {"int4": 8, "int8-planes": 8, "float8_e4m3fn": 8, "fp8-block": 8}
WIDE_TOKENS = 32
DENSE_TOKENS = 64
# Tokens up to which ``columns_linear`` beats the library's product of fp8, for which
# the weight must be turned over first: the four linears of Llama-3-8B on the H200 take
# 187 and 323 us with 256 and 512 tokens, by the library 245 and 303.
ROUNDED_TOKENS = 384
# Layers of this many elements are listed by default, as most of them were on the H200.
_LISTED_ELEMENTS = 80 * 2**20
# A layer of more columns a multiprocessor has more tiles of 64 columns than programs
# run at once: on the H200 from 16,896 columns on.
_MANY_COLUMNS = 128
# Channels that share a scale; the most of a packed block.
SCALED_CHANNELS = 128
# Multiprocessors of an H100 and an H200. Defaults fit this number and are scaled.
PROCESSORS = 132


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
    if kind in _PACKED_COLUMNS and tokens == 1:
        return one_token_config(n, k, kind, processors)
    if kind in _PACKED_COLUMNS:
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


def one_token_config(n: int, k: int, kind: str, processors: int) -> LaunchConfig:
    """A packed configuration for one token of scaled blocks.

    Layers of few columns take fewer warps a program, so that there are more programs.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: of the weight, packable and not fp8 with scales per channel.
        processors: multiprocessors of the device.
    """
    blocks = -(-k // SCALED_CHANNELS)
    programs = 220 * processors // PROCESSORS
    four_bit = kind in _FOUR_BIT
    # The loop of two planes with four warps takes 134 registers, with eight 128: 12 and
    # 16 warps of a multiprocessor.
    many = kind == "int8-planes" and n * k >= _LISTED_ELEMENTS
    warps = 8 if many else 4
    while warps > 1 and -(-n // (warps * _ONE_TOKEN_COLUMNS)) * blocks < programs:
        warps //= 2
    block_n = warps * _ONE_TOKEN_COLUMNS
    tiles = -(-n // block_n)
    if four_bit:
        # All warps of a launch should be resident, and enough of them: 4096 x 14336 in
        # int4 takes 9.6 us with 896 warps and 10.4 with 1,792 (50% kept), in planes
        # 14.5 and 15.9 with 1,792 and 896 (4.16 bits).
        enough = (1500 if kind == "int8-planes" else 880) * processors // PROCESSORS
        fewest = -(-blocks // 4)
        split_k = _even_splits(tiles * warps, blocks, enough, fewest)
        if tiles * warps * split_k > 16 * processors:
            # Fewer than would be enough, but all resident, if there is such a number.
            resident = 16 * processors // (tiles * warps)
            below = range(resident, fewest - 1, -1)
            split_k = next((s for s in below if blocks % s == 0), split_k)
    else:
        split_k = _even_splits(tiles, blocks, 2 * programs)
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
    block_n = _PACKED_COLUMNS[kind]
    block_k = 64 if n * k < _SMALL_ELEMENTS else 128
    enough = 800 * processors // PROCESSORS
    blocks = -(-k // block_k)
    split_k = _even_splits(-(-n // block_n), blocks, enough)
    each = blocks // split_k
    stages = 1 if each == 1 else 2 if each < 4 else 4
    return LaunchConfig(block_n, block_k, split_k, 1, stages, False, packed=True)


def dense_config(
    n: int, k: int, kind: str, tokens: int, processors: int
) -> LaunchConfig:
    """A configuration of the dense route for int4 and fp8, from what won on the H200.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: of the weight.
        tokens: rows of the call, at most ``DENSE_TOKENS``.
        processors: multiprocessors of the device.
    """
    if tokens <= packed_dense_tokens(kind):
        block_n = _PACKED_COLUMNS[kind] // (2 if kind in _FOUR_BIT else 1)
        enough = 1500 * processors // PROCESSORS
        blocks = -(-k // 128)
        split_k = _even_splits(-(-n // block_n), blocks, enough)
        return LaunchConfig(block_n, 128, split_k, 1, 4, False, packed=True)
    many = n > _MANY_COLUMNS * processors
    if kind == "int4" and 16 < tokens <= WIDE_TOKENS:
        return wide_config(n, k, processors)
    if kind == "int4" and tokens > WIDE_TOKENS:
        return tiles_config(n, k, kind, processors)
    if kind == "int8-planes" and tokens > WIDE_TOKENS and many:
        return tiles_config(n, k, kind, processors)
    return columns_config(n, k, kind, tokens, processors)


def packed_dense_tokens(kind: str) -> int:
    """Tokens up to which the packed kernel reads the whole weight.

    Two planes are twice the rows for it, while the other kernels join them.
    """
    return _PACKED_TOKENS[kind]


def columns_config(
    n: int, k: int, kind: str, tokens: int, processors: int
) -> LaunchConfig:
    """A configuration of ``columns_linear`` where x is not rounded.

    The four linears of Llama-3-8B on the H200 take 95.5 us with 16 tokens and 112.6
    with 64 in fp8, 101.2 and 116.0 in fp8-block, 136.4 with 16 and 153.0 with 32 in
    int8-planes, 94.6 with 16 in int4; with 64 in int8-planes 177.6, of which gate_up
    takes 81.3 with ``tiles_config`` and would take 85.7.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: of the weight, packable.
        tokens: rows of the call.
        processors: multiprocessors of the device.
    """
    if kind in _FOUR_BIT:
        # A word of a thread is eight columns.
        block_n, block_k, stages = 256, 64, 1
    else:
        block_n, block_k, stages = 128, 128, 3
    each = 3 if tokens <= 16 else 2
    split_k = _splits(n, k, block_n, block_k, each * processors)
    return LaunchConfig(block_n, block_k, split_k, 4, stages, False, packed=True)


def rounded_config(n: int, k: int, tokens: int, processors: int) -> LaunchConfig:
    """A configuration of ``columns_linear`` for fp8 with x rounded to fp8.

    The four linears of Llama-3-8B on the H200 take 82 us with 16 tokens and 94 with 64,
    rounding included where it does not overlap; vLLM's kernels take 68 and 74 without
    it. 28672 x 4096 takes 32.0 and 36.5, vLLM's 34.0 and 37.2: what is missing is in
    the small layers, whose splits must be added.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        tokens: rows of the call, at most ``ROUNDED_TOKENS``.
        processors: multiprocessors of the device.
    """
    block_n, block_k = 128, 128
    # Programs of 128 tokens, of which two fit into shared memory with three stages.
    stages = 4 if tokens <= 64 else 3
    enough = 2 * processors // -(-tokens // 128)
    split_k = _splits(n, k, block_n, block_k, enough)
    if tokens <= 16 and split_k > 1:
        # 4096 x 14336: 23.7 instead of 28.3 us.
        stages = 5
    return LaunchConfig(block_n, block_k, split_k, 4, stages, False, packed=True)


def wide_config(n: int, k: int, processors: int) -> LaunchConfig:
    """A configuration of ``wide_linear``: at least 6.4 programs a multiprocessor.

    Registers allow 8 programs of 128 columns and 12 of 64. With 32 tokens on the H200,
    the four linears of Llama-3-8B in int4 take 43.4 (gate_up), 28.8 (down), 15.3 (qkv)
    and 13.5 us (o), sum 101.0; the best configurations of each 100.1.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        processors: multiprocessors of the device.
    """
    block_n = 64 if n * k < _SMALL_ELEMENTS else 128
    enough = 850 * processors // PROCESSORS
    split_k = _even_splits(-(-n // block_n), -(-k // 128), enough)
    return LaunchConfig(block_n, 128, split_k, 1, 4, False, packed=True)


def tiles_config(n: int, k: int, kind: str, processors: int) -> LaunchConfig:
    """A configuration of ``dense_kernel``: up to two programs a multiprocessor.

    With 64 tokens on the H200, the four linears of Llama-3-8B take, in the order
    above, 57.4, 36.2, 21.0 and 15.4 us in int4, sum 130.0 (best of each 127.3); gate_up
    takes 80.6 in int8-planes. Two programs of any of these tiles fit into a Hopper's
    shared memory; compiled for other devices, one takes at most 66 of the 99 KB that
    they have. fp8 comes here where words of four columns do not divide its rows.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: of the weight.
        processors: multiprocessors of the device.
    """
    block_n, block_k = (128, 128) if kind in _FOUR_BIT else (64, 128)
    if n > _MANY_COLUMNS * processors:
        block_n, block_k = 256, 64
    split_k = _splits(n, k, block_n, block_k, 2 * processors)
    return LaunchConfig(block_n, block_k, split_k, 4, 3, True)


def scaled_tiles_config(n: int, k: int, kind: str, processors: int) -> LaunchConfig:
    """A configuration of ``dense_kernel`` where scales are not of x's type.

    The tiles of ``tiles_config`` would not fit into registers.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: of the weight.
        processors: multiprocessors of the device.
    """
    block_n, stages, enough = (128, 3, 380) if kind in _FOUR_BIT else (64, 4, 256)
    enough = enough * processors // PROCESSORS
    split_k = 1
    while -(-n // block_n) * split_k < enough and k >= 128 * split_k:
        split_k *= 2
    return LaunchConfig(block_n, 64, split_k, 4, stages, True)


def _splits(n: int, k: int, block_n: int, block_k: int, most: int) -> int:
    """Splits with no more than ``most`` programs, unless there are more tiles."""
    return min(max(1, k // block_k), max(1, most // -(-n // block_n)))


def _even_splits(tiles: int, blocks: int, enough: int, fewest: int = 1) -> int:
    """Fewest splits with enough programs that all take as many blocks of channels."""
    for split_k in range(fewest, blocks):
        if blocks % split_k == 0 and tiles * split_k >= enough:
            return split_k
    return max(1, blocks)


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
