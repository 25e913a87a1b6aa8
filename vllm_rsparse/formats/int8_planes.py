# SPDX-License-Identifier: Apache-2.0
"""The format ``int8-planes``: eight-bit codes in two planes of four bits.

    W[n, k] = ((q1[k, n] - z[g, n]) + (q2[k, n] - 8) / 16) * s[g, n],    g = k // G

A channel is read with both planes, with the first alone, or not at all. The first is a
weight of the format ``int4``, rounded to nearest; the second is what it leaves, in
sixteenths of its step. ``data`` is contiguous int32 [2, K, N/8], the planes one after
the other, each packed as in ``int4``. ``scales`` are contiguous [K/G, N] in bfloat16,
float16 or float32, ``zeros`` contiguous int32 [K/G, N/8], packed like a plane, or None
for a zero point of 8 everywhere. The group G is 32, 64 or 128.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormat, WeightFormatError
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.formats.fp8_block import FP8_BLOCK
from vllm_rsparse.formats.int4 import INT4, SYMMETRIC_ZERO, store_int4
from vllm_rsparse.formats.int8 import INT8
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.formats.nibbles import PER_WORD, pack_nibbles
from vllm_rsparse.formats.plain import FLOAT
from vllm_rsparse.formats.plane_bits import GROUPS, group_of
from vllm_rsparse.formats.require import require_nibbles, require_whole_words

# Steps of the second plane in a step of the first.
STEPS = 16
# Scales that are tried, as shares of the one that covers a group's whole range, and the
# weight of an eight-bit value's squared error next to a four-bit one's. On the weights
# of SmolLM2-135M the search takes 4% off the first plane's error (0.0936 of the
# weight's norm instead of 0.0976), for an eight-bit error of 0.0087 instead of 0.0067
# (docs/notes/planes.md).
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
_EIGHT_BIT_WEIGHT = 8.0


class Int8PlanesFormat(WeightFormat):
    """The thresholds of a linear have two rows, one for each plane."""

    name = "int8-planes"
    code = 4
    planes = 2

    def check(self, weight: StoredWeight) -> None:
        """See the base class."""
        require_nibbles(weight, GROUPS, planes=(self.planes,))

    def check_shards(self, sizes: Sequence[int]) -> None:
        """See the base class. No word holds channels of two linears."""
        require_whole_words(self.name, sizes)

    def dequantise(self, weight: StoredWeight) -> Tensor:
        """See the base class."""
        first, second = self.dequantise_planes(weight)
        return first + second

    def dequantise_planes(self, weight: StoredWeight) -> tuple[Tensor, ...]:
        """See the base class."""
        first = _plane(weight, 0, weight.zeros).dequantise()
        return first, _plane(weight, 1, None).dequantise() / STEPS


INT8_PLANES = Int8PlanesFormat()


def _plane(weight: StoredWeight, plane: int, zeros: Tensor | None) -> StoredWeight:
    """A plane as a weight of the format ``int4``; nothing is copied."""
    data, n, k = weight.data[plane], weight.n, weight.k
    return StoredWeight(INT4, data, n, k, weight.scales, zeros, weight.group)


def encode_planes(
    weight: Tensor, group: int, dtype: torch.dtype, *, symmetric: bool = False
) -> StoredWeight:
    """Round a weight to two planes.

    Every group of input channels gets the scale, of a few that cover most or all of
    its range, with the least squared error. Groups are independent of one another and
    output channels too, so slices of a weight at multiples of G are encoded as in the
    whole.

    Args:
        weight: [N, K], any floating dtype, finite.
        group: G, input channels that share a scale.
        dtype: of the scales.
        symmetric: a zero point of 8 everywhere.

    Raises:
        WeightFormatError: shapes that the format does not have.
    """
    n, k = weight.shape
    if group not in GROUPS or k % group or n % PER_WORD:
        raise WeightFormatError(
            f"weight [N, K] = [{n}, {k}] in groups of {group}: the format int8-planes"
            f" takes {', '.join(map(str, GROUPS))} if that divides K, and N must be a"
            f" multiple of {PER_WORD}"
        )
    first = torch.empty(k, n, dtype=torch.uint8, device=weight.device)
    second = torch.empty_like(first)
    scales = torch.empty(k // group, n, dtype=dtype, device=weight.device)
    zeros = torch.empty(k // group, n, dtype=torch.uint8, device=weight.device)
    # A few output channels at a time bound the temporaries.
    width = max(1, _chunk_elements(weight.device) // max(1, k))
    for begin in range(0, n, width):
        columns = slice(begin, begin + width)
        # [groups, G, columns]: neighbours in memory stay neighbours in the result.
        part = weight[columns].t().float().unflatten(0, (-1, group))
        q1, q2, s, z = _encode_groups(part, dtype, symmetric)
        first[:, columns], second[:, columns] = q1.flatten(0, 1), q2.flatten(0, 1)
        scales[:, columns], zeros[:, columns] = s, z
    plane = store_int4(first, scales, None if symmetric else zeros)
    return StoredWeight(
        INT8_PLANES,
        torch.stack([plane.data, pack_nibbles(second)]),
        n,
        k,
        plane.scales,
        plane.zeros,
        group,
    )


# Elements that are encoded at a time, by type of device. On a CPU temporaries that stay
# in its cache take less than half the time (13.8 million weights on one core: 0.45 s,
# and 1.1 s with 1 << 22).
_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 22}


def _chunk_elements(device: torch.device) -> int:
    return _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])


def _encode_groups(
    groups: Tensor, dtype: torch.dtype, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of both planes uint8 [g, G, N], scales [g, N] and zeros uint8 [g, N]."""
    low = groups.amin(1).clamp_max(0)
    high = groups.amax(1).clamp_min(0)
    if symmetric:
        # The second plane reaches half a step beyond the first's codes 0 to 15.
        span = torch.maximum(-low, high) / 7.5
        zero = torch.full_like(span, SYMMETRIC_ZERO)
    else:
        span = (high - low) / 15
        zero = (-low / span).nan_to_num(SYMMETRIC_ZERO).round().clamp(0, 15)
    smallest = torch.finfo(dtype).tiny
    best = None
    for share in _SHRINK:
        scale = (span * share).clamp_min(smallest).to(dtype)
        coded = _encode(groups, scale.float()[:, None], zero[:, None])
        first, second, error = coded
        if best is None:
            best = [first, second, scale, error]
            continue
        better = error < best[3]
        best[2] = torch.where(better, scale, best[2])
        best[3] = torch.where(better, error, best[3])
        best[0] = torch.where(better[:, None], first, best[0])
        best[1] = torch.where(better[:, None], second, best[1])
    assert best is not None
    return best[0], best[1], best[2], zero.to(torch.uint8)


def _encode(
    groups: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of both planes, uint8 [g, G, N], and the weighed squared error [g, N]."""
    steps = groups / scale
    first = (steps + zero).round().clamp_(0, 15)
    rest = (steps - (first - zero)) * STEPS
    second = (rest + SYMMETRIC_ZERO).round().clamp_(0, 15)
    error = rest.square().sum(1)
    left = rest - (second - SYMMETRIC_ZERO)
    error += _EIGHT_BIT_WEIGHT * left.square().sum(1)
    error *= scale[:, 0].square()
    return first.to(torch.uint8), second.to(torch.uint8), error


def split_int8(weight: StoredWeight, group: int) -> StoredWeight:
    """Two planes of an INT8 weight, the same numbers where that is possible.

    A code c is 16 (q1 - z) + (q2 - 8) with a scale 16 times the checkpoint's. Per group
    and output channel this is exact where 16 times the scale is a number in bfloat16,
    and the codes lie in -136 to 119 (z = 8) or in -120 to 135 (z = 7): all but groups
    that hold both a code below -120 and one above 119. Those are rounded like floats.

    Args:
        weight: of the format ``int8``.
        group: G, which divides the weight's own groups.
    """
    assert weight.scales is not None
    n, k = weight.shape
    codes = weight.data.t().view(-1, group, n)
    scales = weight.scales.repeat_interleave(weight.group // group, 0)
    first = torch.empty(k // group, group, n, dtype=torch.uint8, device=weight.device)
    second = torch.empty_like(first)
    coarse = (scales * STEPS).to(torch.bfloat16)
    zeros = torch.empty(k // group, n, dtype=torch.uint8, device=weight.device)
    groups_at_once = max(1, _chunk_elements(codes.device) // (n * group))
    for part in torch.arange(k // group).split(groups_at_once):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        mine = codes[rows].to(torch.int16)
        low, high = mine.amin(1), mine.amax(1)
        zero = torch.where(high > _HIGHEST, SYMMETRIC_ZERO - 1, SYMMETRIC_ZERO)
        upper = (mine + SYMMETRIC_ZERO) >> 4
        q1, q2 = upper + zero[:, None], mine - STEPS * upper + SYMMETRIC_ZERO
        exact = coarse[rows].float() == scales[rows] * STEPS
        exact &= (high <= _HIGHEST) | (low >= -_HIGHEST - 1)
        if not bool(exact.all()):
            values = mine.float() * scales[rows][:, None]
            rounded = _encode_groups(values, torch.bfloat16, symmetric=False)
            every = exact[:, None]
            q1 = torch.where(every, q1, rounded[0])
            q2 = torch.where(every, q2, rounded[1])
            coarse[rows] = torch.where(exact, coarse[rows], rounded[2])
            zero = torch.where(exact, zero, rounded[3])
        first[rows], second[rows], zeros[rows] = q1, q2, zero
    plane = store_int4(first.flatten(0, 1), coarse, zeros)
    data = torch.stack([plane.data, pack_nibbles(second.flatten(0, 1))])
    return StoredWeight(INT8_PLANES, data, n, k, plane.scales, plane.zeros, group)


# The largest code with a zero point of 8: 7 steps of the first plane, 7 of the second.
_HIGHEST = 119


class PlanesWhileLoading(LoadTimeFormat):
    """Float, FP8 or INT8 weights as two planes with scales in bfloat16.

    One dtype of scales, whatever the weight's, makes the planes the same wherever they
    are made: ``prepare`` reads a checkpoint in its own dtype, and the engine in the
    activations'.
    """

    name = "int8-planes"
    format = INT8_PLANES
    bases = (FLOAT.name, FP8.name, FP8_BLOCK.name, INT8.name)
    multiples = (PER_WORD, min(GROUPS))

    def encode(
        self,
        weight: Tensor,
        scales: Tensor | None = None,
        channels: int | None = None,
    ) -> StoredWeight:
        """See the base class."""
        group = _served_group(weight.shape[1], channels)
        return encode_planes(weight, group, torch.bfloat16)

    def requantise(
        self,
        weight: StoredWeight,
        dtype: torch.dtype,
        scales: Tensor | None = None,
        channels: int | None = None,
    ) -> StoredWeight:
        """See the base class. INT8 is split and not rounded (``split_int8``)."""
        if weight.format is not INT8:
            return super().requantise(weight, dtype, scales, channels)
        return split_int8(weight, _served_group(weight.k, channels))


def _served_group(k: int, channels: int | None) -> int:
    """The group of a linear, of which a rank holds ``k`` of the input channels.

    Raises:
        WeightFormatError: none divides them.
    """
    group = group_of(channels or k)
    if group is None:
        raise WeightFormatError(
            f"a linear with {channels or k} input channels: the format int8-planes"
            f" has groups of {', '.join(map(str, GROUPS))} of them, and none"
            " divides this number; use fp8"
        )
    if k % group:
        raise WeightFormatError(
            f"a rank would hold {k} of {channels} input channels, which splits a"
            f" group of {group}: use fewer tensor-parallel ranks"
        )
    return group


PLANES_WHILE_LOADING = PlanesWhileLoading()
