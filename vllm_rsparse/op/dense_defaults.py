# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the dense routes, for what no table has."""

from vllm_rsparse.kernels.launch_config import LaunchConfig, Rounding
from vllm_rsparse.op.launch_rules import (
    FOUR_BIT,
    PACKED_COLUMNS,
    PROCESSORS,
    SMALL_ELEMENTS,
    even_splits,
)

# Tokens up to which the packed kernel reads a whole weight fastest, by kind; up to
# which ``wide_linear`` does, which reads int4; and up to which any kernel that reads
# the weight once does. Beyond, the weight is widened for the library.
_PACKED_TOKENS = {"int4": 8, "int8-planes": 8, "float8_e4m3fn": 8, "fp8-block": 8}
WIDE_TOKENS = 32
DENSE_TOKENS = 64
# Tokens up to which ``rounded_linear`` beats the library's product of fp8, for which
# the weight must be turned over first: the four linears of Llama-3-8B on the H200 take
# 187 and 323 us with 256 and 512 tokens, by the library 245 and 303.
ROUNDED_TOKENS = 384
# Tokens up to which ``byte_linear`` is the fastest, by kind, and up to which x is two
# bytes, as good as bfloat16: with 64 tokens, the four linears of Llama-3-8B in planes
# take 146 us on the H200, and 114 with one.
BYTE_TOKENS = {"int4": 32, "int8-planes": 128}
EXACT_BYTE_TOKENS = 32
# A layer of more columns a multiprocessor has more tiles of 64 columns than programs
# run at once: on the H200 from 16,896 columns on.
_MANY_COLUMNS = 128


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
        block_n = PACKED_COLUMNS[kind] // (2 if kind in FOUR_BIT else 1)
        enough = 1500 * processors // PROCESSORS
        blocks = -(-k // 128)
        split_k = even_splits(-(-n // block_n), blocks, enough)
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
    """A configuration of ``columns_linear``.

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
    if kind in FOUR_BIT:
        # A word of a thread is eight columns.
        block_n, block_k, stages = 256, 64, 1
    else:
        block_n, block_k, stages = 128, 128, 3
    each = 3 if tokens <= 16 else 2
    split_k = _splits(n, k, block_n, block_k, each * processors)
    return LaunchConfig(block_n, block_k, split_k, 4, stages, False, packed=True)


def rounded_config(n: int, k: int, tokens: int, processors: int) -> LaunchConfig:
    """A configuration of ``rounded_linear``, fp8 times x rounded to fp8.

    The four linears of Llama-3-8B on the H200 take 77.6 us with 16 tokens, 87.8 with 64
    and 109.6 with 128, rounding included where it does not overlap; vLLM's kernels take
    68, 74 and 85 without it. 28672 x 4096 takes 32.3, 36.1 and 44.6, vLLM's 33.9, 37.4
    and 37.2: what is missing is in the small layers, whose splits must be added.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        tokens: rows of the call, at most ``ROUNDED_TOKENS``.
        processors: multiprocessors of the device.
    """
    block_n, stages = 128, 3
    if 16 < tokens <= 128:
        many = n > _MANY_COLUMNS * processors
        block_n = 128 if many else 64
        stages = 4 if many or tokens > 64 else 6
    # Programs of 128 tokens.
    enough = 2 * processors // max(1, -(-tokens // 128))
    split_k = _splits(n, k, block_n, 128, enough)
    return LaunchConfig(block_n, 128, split_k, 4, stages, False, packed=True)


def takes_bytes(n: int, k: int, kind: str, tokens: int) -> bool:
    """Whether ``byte_linear`` is the fastest dense route of int4 or int8-planes.

    On the H200, 6144 x 4096 in planes takes 12.1 us with one token, and 14.3 with 4 by
    the packed kernel, which halves its work at one or two.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: of the weight.
        tokens: rows of the call.
    """
    fewest = _PACKED_TOKENS[kind] + 1
    if kind == "int8-planes":
        fewest = 1 if n * k >= SMALL_ELEMENTS else 3
    return fewest <= tokens <= BYTE_TOKENS[kind]


def byte_rounding(tokens: int) -> Rounding:
    """How ``byte_linear`` rounds x.

    Two bytes lose what bfloat16 does, 1e-4 nats (KL divergence). One byte loses 55e-4
    on SmolLM2-135M and 27e-4 on Qwen2.5-Coder-1.5B in blocks of 64, where float8_e4m3fn
    by token loses 162e-4 and 45e-4. In blocks of 128 it takes a tenth less time, but
    loses 62e-4 and 79e-4 (docs/notes/kernels-quantized.md).
    """
    exact = tokens <= EXACT_BYTE_TOKENS
    return Rounding(block=128, digits=2) if exact else Rounding(block=64, digits=1)


def byte_config(
    n: int, k: int, kind: str, tokens: int, processors: int
) -> LaunchConfig:
    """A configuration of ``byte_linear``, with x rounded by ``byte_rounding``.

    The four linears of Llama-3-8B on the H200, in the order above: planes take 34.9,
    24.6, 14.1 and 12.2 us with 16 tokens, sum 85.8; 95.7 with 32; x in one byte by
    blocks of 128, 114.2 with 64 and 178.5 with 128. int4 takes 24.7, 17.8, 11.0 and 9.8
    with 16, sum 63.3, and 90.5 with 32.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: of the weight.
        tokens: rows of the call, at most ``BYTE_TOKENS``.
        processors: multiprocessors of the device.
    """
    block_n, stages, each = 128, 4 if tokens <= EXACT_BYTE_TOKENS else 3, 2
    if kind == "int4":
        if tokens > 16:
            stages, each = 3, 3
        elif n * k >= SMALL_ELEMENTS:
            block_n, stages = 256, 3
    elif tokens <= 16:
        # An output layer has more tiles of 128 columns than programs run at once.
        waits = n > 2 * 128 * processors
        block_n, stages = (256, 3) if waits else (128, 5)
    # Programs of at most 64 tokens.
    enough = each * processors // max(1, -(-tokens // 64))
    split_k = _splits(n, k, block_n, 128, enough)
    return LaunchConfig(block_n, 128, split_k, 4, stages, False, packed=True)


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
    block_n = 64 if n * k < SMALL_ELEMENTS else 128
    enough = 850 * processors // PROCESSORS
    split_k = even_splits(-(-n // block_n), -(-k // 128), enough)
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
    block_n, block_k = (128, 128) if kind in FOUR_BIT else (64, 128)
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
    block_n, stages, enough = (128, 3, 380) if kind in FOUR_BIT else (64, 4, 256)
    enough = enough * processors // PROCESSORS
    split_k = 1
    while -(-n // block_n) * split_k < enough and k >= 128 * split_k:
        split_k *= 2
    return LaunchConfig(block_n, 64, split_k, 4, stages, True)


def _splits(n: int, k: int, block_n: int, block_k: int, most: int) -> int:
    """Splits with no more than ``most`` programs, unless there are more tiles."""
    return min(max(1, k // block_k), max(1, most // -(-n // block_n)))
