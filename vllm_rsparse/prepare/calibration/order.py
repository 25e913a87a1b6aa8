# SPDX-License-Identifier: Apache-2.0
"""Exact order statistics of more values than are worth sorting."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vllm_rsparse.errors import NotFiniteError

# Values, non-negative float32, in flat chunks; the same at every call.
Chunks = Callable[[], Iterator[Tensor]]

# Values that are looked at to bracket a rank, and how far the bracket reaches to either
# side: six standard deviations of the sample's own rank.
SAMPLE = 1 << 17
_REACH = 6.0
_LOW_BITS = 16
_INFINITY_BUCKET = 0x7F80  # upper 16 bits of +inf; NaNs lie in and above it


def around_rank(
    chunks: Chunks, sample: Tensor, k: int, total: int
) -> tuple[float, float]:
    """The k-th smallest value, and the smallest one that is larger.

    A sample brackets the rank; one pass counts what lies below the bracket and collects
    what lies within, which is sorted. Should the bracket miss the rank, all values are
    counted (``kth_smallest``). The result is exact either way.

    Args:
        chunks: all values.
        sample: some of them, flat float32; any sample is correct, a representative one
            is fast.
        k: rank, from 1 to ``total``.
        total: number of values.

    Returns:
        Both values; the first one twice where none is larger.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    low, high = _bracket(sample, k / total)
    # On the device, so that counting does not wait for it.
    below = torch.zeros((), dtype=torch.int64, device=sample.device)
    largest = torch.zeros((), device=sample.device)
    inside = []
    for chunk in chunks():
        below += (chunk < low).sum()
        largest = torch.maximum(chunk.max(), largest)  # a NaN stays
        inside.append(chunk[(chunk >= low) & (chunk <= high)])
    if not math.isfinite(float(largest)):
        refuse_not_finite()
    values = torch.cat(inside).sort().values
    rank = k - int(below)
    if 1 <= rank <= len(values):
        kth = values[rank - 1]
        above = int(torch.searchsorted(values, kth, right=True))
        if above < len(values):
            return kth.item(), values[above].item()
        value = kth.item()
    else:
        value = kth_smallest(chunks, k)
    return value, _next_above(chunks, value)


def _bracket(sample: Tensor, fraction: float) -> tuple[float, float]:
    """Two values that a rank almost certainly lies between."""
    size = len(sample)
    deviation = math.sqrt(fraction * (1 - fraction) / size) if size else 0.0
    reach = _REACH * deviation + 2 / max(size, 1)
    first, last = int((fraction - reach) * size), math.ceil((fraction + reach) * size)
    ordered = sample.sort().values
    low = ordered[first].item() if first > 0 else 0.0
    return low, ordered[last].item() if last < size else math.inf


def _next_above(chunks: Chunks, value: float) -> float:
    """The smallest value above; the value itself where there is none."""
    least = math.inf
    for chunk in chunks():
        least = min(least, chunk.masked_fill(chunk <= value, math.inf).min().item())
    return least if math.isfinite(least) else value


def kth_smallest(chunks: Chunks, k: int) -> float:
    """The k-th smallest (k >= 1) of non-negative float32 values given in chunks.

    Non-negative floats have the order of their bit patterns. One pass counts the upper
    16 bits, a second one the lower 16 bits within the bucket that contains rank k.

    Args:
        chunks: called twice.
        k: rank, from 1 to the number of values.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    high = _histogram(_bits(chunk) >> _LOW_BITS for chunk in chunks())
    if int(high[_INFINITY_BUCKET:].sum()) > 0:
        refuse_not_finite()
    bucket, k = _locate(high, k)

    def lower() -> Iterator[Tensor]:
        for chunk in chunks():
            bits = _bits(chunk)
            bits = bits[(bits >> _LOW_BITS) == bucket]
            yield bits & ((1 << _LOW_BITS) - 1)

    low, _ = _locate(_histogram(lower()), k)
    pattern = torch.tensor((bucket << _LOW_BITS) | low, dtype=torch.int32)
    return pattern.view(torch.float32).item()


def refuse_not_finite() -> None:
    """Raise the error of activations that are not finite."""
    raise NotFiniteError(
        "calibration activations contain NaN or infinity; use --dtype bfloat16 or"
        " float32, and check that the base model works"
    )


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def _histogram(chunks: Iterator[Tensor]) -> Tensor:
    counts = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)
    for chunk in chunks:
        counts = counts.to(chunk.device)
        counts += torch.bincount(chunk, minlength=1 << _LOW_BITS)
    return counts.cpu()


def _locate(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket that contains rank k, and the rank within it."""
    cumulative = counts.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, k))
    return bucket, k - int(cumulative[bucket] - counts[bucket])
