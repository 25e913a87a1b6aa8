# SPDX-License-Identifier: Apache-2.0
"""Per-channel thresholds from the scores of calibration tokens (paper section 3.2).

score(token, j) = |x_j| * ||W[:, j]||_2, and t is the score that leaves the wanted
fraction of all (token, channel) pairs strictly above it. At run time only |x_j| is
known, so the threshold of channel j is t / ||W[:, j]||.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vllm_rsparse.errors import NotFiniteError

# Elements of activations per chunk: bounds the size of temporaries.
CHUNK_ELEMENTS = 1 << 20
_LOW_BITS = 16
_INFINITY_BUCKET = 0x7F80  # upper 16 bits of +inf; NaNs lie in and above it
KEEP_ALL = -1.0


def column_norms(weight: Tensor) -> Tensor:
    """||W[:, j]||_2 as float32 [K] of a weight [N, K] in any floating dtype."""
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64).float()


def score_threshold(x: Tensor, norms: Tensor, keep: float) -> float:
    """The score t such that the fraction ``keep`` of all scores lies above it.

    t lies midway between the largest score that is dropped and the smallest that is
    kept, both found exactly, so the result depends neither on chunking nor on the
    device's reduction order. Midway, because the first layer's input for a token is
    always the same: a threshold that equals a score meets it again whenever that token
    occurs, and then the last bit of a sum decides. (In 50 prompts of 20 tokens the
    first q_proj met its own threshold 101 times, and in 4 of them tensor-parallel ranks
    gave other tokens than one rank did.)

    Args:
        x: calibration inputs [tokens, K], any floating dtype.
        norms: float32 [K] factors of the score; ones give the score |x|.
        keep: fraction in [0, 1].

    Returns:
        t; -1 where everything is kept.

    Raises:
        NotFiniteError: the activations contain NaN or infinity.
    """
    total = x.numel()
    dropped = total - round(keep * total)
    if dropped == 0:
        return KEEP_ALL
    largest_dropped = kth_smallest(lambda: _scores(x, norms), dropped)
    smallest_kept = min(
        (
            scores[scores > largest_dropped].min().item()
            for scores in _scores(x, norms)
            if (scores > largest_dropped).any()
        ),
        default=largest_dropped,
    )
    return midway(largest_dropped, smallest_kept)


def midway(largest_dropped: float, smallest_kept: float) -> float:
    """The threshold between two float32 scores, as a float32 value.

    If the two are adjacent, it is the lower one, which is dropped because the
    comparison is strict.
    """
    middle = torch.tensor((largest_dropped + smallest_kept) / 2).item()
    return middle if middle < smallest_kept else largest_dropped


def kth_smallest(chunks: Callable[[], Iterator[Tensor]], k: int) -> float:
    """The k-th smallest (k >= 1) of non-negative float32 values given in chunks.

    Non-negative floats have the order of their bit patterns. One pass counts the upper
    16 bits, a second one the lower 16 bits within the bucket that contains rank k.

    Args:
        chunks: called twice; yields flat float32 tensors, the same both times.
        k: rank, from 1 to the number of values.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    high = _histogram(_bits(chunk) >> _LOW_BITS for chunk in chunks())
    if int(high[_INFINITY_BUCKET:].sum()) > 0:
        raise NotFiniteError(
            "calibration activations contain NaN or infinity; use --dtype bfloat16 or"
            " float32, and check that the base model works"
        )
    bucket, k = _locate(high, k)

    def lower() -> Iterator[Tensor]:
        for chunk in chunks():
            bits = _bits(chunk)
            bits = bits[(bits >> _LOW_BITS) == bucket]
            yield bits & ((1 << _LOW_BITS) - 1)

    low, _ = _locate(_histogram(lower()), k)
    pattern = torch.tensor((bucket << _LOW_BITS) | low, dtype=torch.int32)
    return pattern.view(torch.float32).item()


def channel_thresholds(score: float, norms: Tensor) -> Tensor:
    """t / ||W[:, j]|| as float32 [K]; +inf where the column is zero."""
    thresholds = score / norms
    return torch.where(norms > 0, thresholds, math.inf)


def row_chunks(x: Tensor) -> Iterator[Tensor]:
    """Consecutive blocks of rows of x [tokens, K] with bounded size."""
    yield from x.split(max(1, CHUNK_ELEMENTS // x.shape[1]))


def _scores(x: Tensor, norms: Tensor) -> Iterator[Tensor]:
    for rows in row_chunks(x):
        yield rows.abs().float().mul_(norms).flatten()


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
