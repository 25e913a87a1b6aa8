# SPDX-License-Identifier: Apache-2.0
"""Exact order statistics of more values than are worth sorting."""

import math
from collections.abc import Callable, Iterator, Sequence

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


def around_ranks(
    chunks: Chunks, sample: Tensor, ranks: Sequence[int], total: int
) -> list[tuple[float, float]]:
    """The k-th smallest value, and the smallest one that is larger, for several k.

    A sample brackets each rank; one pass counts what lies below the bracket and
    collects what lies within, which is sorted. Should the bracket miss the rank, all
    values are counted (``kth_smallest``). The result is exact either way.

    Args:
        chunks: all values.
        sample: some of them, flat float32; any sample is correct, a representative one
            is fast.
        ranks: each from 1 to ``total``.
        total: number of values.

    Returns:
        Both values of each rank; the first one twice where none is larger.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    ordered = sample.sort().values
    collectors = [_Collector(*_bracket(ordered, k / total)) for k in ranks]
    largest = torch.zeros((), device=sample.device)
    for chunk in chunks():
        largest = torch.maximum(chunk.max(), largest)  # a NaN stays
        for collector in collectors:
            collector.add(chunk)
    # In one transfer: each waits for the device.
    found = [c.around(k) for k, c in zip(ranks, collectors, strict=True)]
    rows = torch.stack([largest.double().expand(3), *found]).tolist()
    if not math.isfinite(rows[0][0]):
        refuse_not_finite()
    result = []
    for k, collector, (index, value, above) in zip(
        ranks, collectors, rows[1:], strict=True
    ):
        if not 0 <= index < collector.inside:
            value = kth_smallest(chunks, k)
            above = _next_above(chunks, value)
        elif above <= value:  # the next larger one is not in the bracket
            above = _next_above(chunks, value)
        result.append((value, above))
    return result


class _Collector:
    """The values of a bracket, and how many lie below it; all on the device.

    Args:
        low: 0-dimensional, the least value of the bracket.
        high: the same, the largest.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self._low = low
        self._high = high
        self._below = torch.zeros((), dtype=torch.int64, device=low.device)
        self._inside: list[Tensor] = []

    def add(self, chunk: Tensor) -> None:
        """Look at some values."""
        self._below += (chunk < self._low).sum()
        self._inside.append(chunk[(chunk >= self._low) & (chunk <= self._high)])

    @property
    def inside(self) -> int:
        """How many values lie in the bracket."""
        return sum(map(len, self._inside))

    def around(self, k: int) -> Tensor:
        """Where rank k is: float64 [3], which need not be waited for.

        Its index in the bracket, the value there, and the next larger one. The values
        are meaningful if the index is, and the next one if it is larger.
        """
        # The upper end keeps the indices valid: it sorts behind all that is inside.
        values = torch.cat([*self._inside, self._high[None]]).sort().values
        index = k - self._below - 1
        last = self.inside - 1
        value = values[index.clamp(0, max(last, 0))]
        after = torch.searchsorted(values, value[None], right=True)[0]
        above = values[after.clamp(0, max(last, 0))]
        return torch.stack([index.double(), value.double(), above.double()])


def _bracket(ordered: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Two values that a rank almost certainly lies between.

    Args:
        ordered: the sample in ascending order.
        fraction: the rank as a share of all values.
    """
    size = len(ordered)
    deviation = math.sqrt(fraction * (1 - fraction) / size) if size else 0.0
    reach = _REACH * deviation + 2 / max(size, 1)
    first, last = int((fraction - reach) * size), math.ceil((fraction + reach) * size)
    low = ordered[first] if first > 0 else ordered.new_zeros(())
    return low, ordered[last] if last < size else ordered.new_full((), math.inf)


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
