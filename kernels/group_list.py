# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
# Triton compiles no starred tuples.
# ruff: noqa: RUF005
"""Device code: a program's wanted channels, listed group by group in steps of 16."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .channels import wanted_channels
from .codes import PLANE_STEPS

# Channels of one step: what one instruction of the matrix units multiplies.
STEP = tl.constexpr(16)


@triton.jit
def list_groups(
    x_ptr,
    threshold_ptr,
    row_ptr,
    value_ptr,
    head_ptr,
    second_ptr,
    stride_xm,
    first_token,
    tokens,
    k,
    plane_thresholds,
    split,
    splits,
    PLANES: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """List the rows that any token wants of this split's blocks of SPAN channels.

    Row ``p * k + j`` is channel j of plane p, with thresholds of the plane's own. Block
    b of the split is block ``b * splits + split`` of the weight, in the first plane and
    then in the second. Each block's list is padded to whole steps with a channel of the
    block and zeros for its x, so that a step never reads two blocks and needs no mask.
    Returns the number of steps.

    Writes, in the program's own part of the workspace, L = BLOCKS * PLANES * SPAN:
        row_ptr: int32 [L], the rows.
        value_ptr: x's dtype [TOKENS, L], each token's x of these rows, in steps of the
            first plane; zero where the token does not want it.
        head_ptr: int32 [L / 16], for each step twice its block, plus one if it is the
            block's last.
        second_ptr: None, or float32 [L / 16, TOKENS], for the last step of each block
            the sums of the second plane's values.

    A value of the second plane is x / 16, which float16 rounds to a multiple of 2^-24
    where x is below 2^-10. Such an x is a multiple of 2^-24 itself, and its product
    with the second plane is off by no more than half of that times the group's largest
    weight.
    """
    length: tl.constexpr = BLOCKS * PLANES * SPAN
    block = tl.arange(0, BLOCKS)[:, None] * splits + split
    channel = block * SPAN + tl.arange(0, SPAN)[None, :]
    inside = channel < k
    # Before the wait: no kernel writes thresholds.
    thresholds = ()
    for plane in tl.static_range(PLANES):
        plane_ptr = threshold_ptr + plane * plane_thresholds
        threshold = tl.load(plane_ptr + channel, mask=inside, other=0.0)
        thresholds = thresholds + (threshold,)
    if PDL:
        gdc_wait()
    # Sixteen bits a plane: one scan counts both.
    read = tl.zeros([BLOCKS, SPAN], dtype=tl.int32)
    for index in tl.static_range(TOKENS):
        x, mask = _load_x(
            x_ptr, first_token + index, tokens, stride_xm, channel, inside
        )
        for plane in tl.static_range(PLANES):
            wanted = wanted_channels(x, thresholds[plane], False) & mask
            read = read | wanted.to(tl.int32) << 16 * plane
    ends = tl.cumsum(read, axis=1)
    counts = tl.sum(read, axis=1, keep_dims=True)
    count = _of_plane(counts, 0, PLANES)
    if PLANES > 1:
        count += _of_plane(counts, 1, PLANES)
    steps = (count + (STEP - 1)) // STEP
    each = tl.sum(steps, axis=1)
    before = tl.arange(0, BLOCKS)[None, :] < tl.arange(0, BLOCKS)[:, None]
    first = tl.sum(tl.where(before, each[None, :], 0), axis=1)[:, None]
    padding = count + tl.arange(0, STEP)[None, :]
    padded = padding < steps * STEP
    padding += first * STEP
    filler = tl.broadcast_to(block * SPAN, (BLOCKS, STEP))
    tl.store(row_ptr + padding, filler, mask=padded)
    for index in tl.static_range(TOKENS):
        zeros = tl.zeros([BLOCKS, STEP], dtype=x.dtype)
        tl.store(value_ptr + index * length + padding, zeros, mask=padded)
    for plane in tl.static_range(PLANES):
        some = _of_plane(read, plane, PLANES) > 0
        place = first * STEP + _of_plane(ends, plane, PLANES) - 1
        if plane > 0:
            place += _of_plane(counts, 0, PLANES)
        tl.store(row_ptr + place, channel + plane * k, mask=some)
        for index in tl.static_range(TOKENS):
            if TOKENS > 1:
                x, mask = _load_x(
                    x_ptr, first_token + index, tokens, stride_xm, channel, inside
                )
            wanted = wanted_channels(x, thresholds[plane], False) & mask
            # An unwanted x may be infinite, and infinity times a weight of zero is NaN.
            values = tl.where(wanted, x, 0.0)
            if plane > 0:
                values = (values.to(tl.float32) * (1.0 / PLANE_STEPS)).to(x.dtype)
                if second_ptr is not None:
                    # Of the values as stored: the codes' offset is taken out with it.
                    total = tl.sum(values.to(tl.float32), axis=1, keep_dims=True)
                    last = (first + steps - 1) * TOKENS + index
                    tl.store(second_ptr + last, total, mask=steps > 0)
            tl.store(value_ptr + index * length + place, values, mask=some)
    step = tl.arange(0, PLANES * SPAN // STEP)[None, :]
    head = block * 2 + (step == steps - 1).to(tl.int32)
    tl.store(head_ptr + first + step, head, mask=step < steps)
    # Other threads of the program read what this one wrote.
    tl.debug_barrier()
    return tl.sum(each, axis=0)


@triton.jit
def _load_x(x_ptr, token, tokens, stride_xm, channel, inside):
    """A token's x of these channels, and a mask of what there is."""
    # Of the channels' shape: Triton 3.9's interpreter takes no scalar in a mask.
    mask = inside & (channel * 0 + token < tokens)
    x = tl.load(x_ptr + token.to(tl.int64) * stride_xm + channel, mask=mask, other=0.0)
    return x, mask


@triton.jit
def _of_plane(packed, PLANE: tl.constexpr, PLANES: tl.constexpr):
    """A plane's counts of those packed into sixteen bits each."""
    return packed if PLANES == 1 else packed >> 16 * PLANE & 0xFFFF
