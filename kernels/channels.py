# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code of the kernels: which channels a program reads."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

# Adjacent channels of a listing program: 16 bytes of x. The splits of a column tile
# interleave such groups, so that together they sweep memory from front to back.
GROUP = tl.constexpr(8)


@triton.jit
def wanted_channels(x, threshold, DROPPED: tl.constexpr):
    """Kept is strictly above the threshold, or NaN; DROPPED selects the rest."""
    dropped = tl.abs(x.to(tl.float32)) <= threshold
    return dropped if DROPPED else ~dropped


@triton.jit
def list_channels(
    x,
    threshold_ptr,
    lists,
    tokens,
    split,
    DROPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDING: tl.constexpr,
    PDL: tl.constexpr,
):
    """List the channels of this split that any token wants; returns how many.

    Writes, in the program's own part of the workspace:
        lists.channel_ptr: int32 [CHANNELS + PADDING], the wanted channels in ascending
            order.
        lists.value_ptr: x's dtype [BLOCK_M, CHANNELS + PADDING], each token's x of
            these channels, zero where the token does not want it.
    Entries beyond the count are not written.
    """
    place = tl.arange(0, CHANNELS)
    offs_k = (place // GROUP * split.count + split.index) * GROUP + place % GROUP
    mask_k = offs_k < x.k
    # Before the wait: no kernel writes thresholds.
    threshold = tl.load(threshold_ptr + offs_k, mask=mask_k, other=0.0)
    if PDL:
        gdc_wait()
    mask = (tokens.offsets < tokens.end)[:, None] & mask_k[None, :]
    row = tokens.offsets.to(tl.int64)[:, None] * x.stride_m
    values = tl.load(x.ptr + row + offs_k[None, :], mask=mask, other=0.0)
    wanted = wanted_channels(values, threshold[None, :], DROPPED) & mask
    read = tl.max(wanted.to(tl.int32), axis=0)
    slot = tl.cumsum(read, axis=0) - 1
    tl.store(lists.channel_ptr + slot, offs_k, mask=read > 0)
    row = tl.arange(0, BLOCK_M)[:, None] * (CHANNELS + PADDING)
    # An unwanted x may be infinite, and infinity times a weight of zero is NaN.
    values = tl.where(wanted, values, 0.0)
    tl.store(lists.value_ptr + row + slot[None, :], values, mask=(read > 0)[None, :])
    # Other threads of the program read what this one wrote.
    tl.debug_barrier()
    return tl.sum(read, axis=0)
