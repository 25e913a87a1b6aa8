# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: a program's wanted channels, listed group by group in steps of 16."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .channels import wanted_channels

# Channels of one step: what one instruction of the matrix units multiplies.
STEP = tl.constexpr(16)


@triton.jit
def list_groups(
    x_ptr,
    threshold_ptr,
    row_ptr,
    value_ptr,
    head_ptr,
    stride_xm,
    first_token,
    tokens,
    k,
    split,
    splits,
    SPAN: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """List the channels that any token wants of this split's blocks of SPAN channels.

    Block b of the split is block ``b * splits + split`` of the weight. Each block's
    list is padded to whole steps with a channel of the block and zeros for its x, so
    that a step never reads two blocks and needs no mask. Returns the number of steps.

    Writes, in the program's own part of the workspace:
        row_ptr: int32 [BLOCKS * SPAN], the channels.
        value_ptr: x's dtype [TOKENS, BLOCKS * SPAN], each token's x of these channels,
            zero where the token does not want it.
        head_ptr: int32 [BLOCKS * SPAN / 16], for each step twice its block, plus one
            if it is the block's last.
    """
    length: tl.constexpr = BLOCKS * SPAN
    block = tl.arange(0, BLOCKS)[:, None] * splits + split
    row = block * SPAN + tl.arange(0, SPAN)[None, :]
    inside = row < k
    # Before the wait: no kernel writes thresholds.
    threshold = tl.load(threshold_ptr + row, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    read = tl.zeros([BLOCKS, SPAN], dtype=tl.int32)
    for index in tl.static_range(TOKENS):
        x, wanted = _wanted(
            x_ptr, first_token + index, tokens, stride_xm, row, inside, threshold
        )
        read = read | wanted.to(tl.int32)
    slot = tl.cumsum(read, axis=1) - 1
    count = tl.sum(read, axis=1, keep_dims=True)
    steps = (count + (STEP - 1)) // STEP
    each = tl.sum(steps, axis=1)
    before = tl.arange(0, BLOCKS)[None, :] < tl.arange(0, BLOCKS)[:, None]
    first = tl.sum(tl.where(before, each[None, :], 0), axis=1)[:, None]
    place = first * STEP + slot
    padding = count + tl.arange(0, STEP)[None, :]
    padded = padding < steps * STEP
    padding += first * STEP
    tl.store(row_ptr + place, row, mask=read > 0)
    filler = tl.broadcast_to(block * SPAN, (BLOCKS, STEP))
    tl.store(row_ptr + padding, filler, mask=padded)
    for index in tl.static_range(TOKENS):
        if TOKENS > 1:
            x, wanted = _wanted(
                x_ptr, first_token + index, tokens, stride_xm, row, inside, threshold
            )
        # An unwanted x may be infinite, and infinity times a weight of zero is NaN.
        values = tl.where(wanted, x, 0.0)
        tl.store(value_ptr + index * length + place, values, mask=read > 0)
        zeros = tl.zeros([BLOCKS, STEP], dtype=x.dtype)
        tl.store(value_ptr + index * length + padding, zeros, mask=padded)
    step = tl.arange(0, SPAN // STEP)[None, :]
    head = block * 2 + (step == steps - 1).to(tl.int32)
    tl.store(head_ptr + first + step, head, mask=step < steps)
    # Other threads of the program read what this one wrote.
    tl.debug_barrier()
    return tl.sum(each, axis=0)


@triton.jit
def _wanted(x_ptr, token, tokens, stride_xm, row, inside, threshold):
    """A token's x of these channels, and which of them it keeps."""
    # Of the channels' shape: Triton 3.9's interpreter takes no scalar in a mask.
    mask = inside & (row * 0 + token < tokens)
    x = tl.load(x_ptr + token.to(tl.int64) * stride_xm + row, mask=mask, other=0.0)
    return x, wanted_channels(x, threshold, False) & mask
