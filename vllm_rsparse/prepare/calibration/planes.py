# SPDX-License-Identifier: Apache-2.0
"""Thresholds of a weight that is read in two planes of bits.

A channel costs b1 bits a weight with the first plane and b2 more with the second. Let
q be the squared error that the second plane takes away, as a share of the squared
weight. With c the squared score of a channel, its first plane takes c (1 - q) off the
output's squared error, and the second c q, if errors of channels are independent. Least
error for the bits means that both buy the same at their thresholds:

    t1^2 (1 - q) / b1 = t2^2 q / b2

so that t2 is a multiple of t1, about ten of it. Dropped channels are not independent,
as inputs are correlated, while rounding errors are. Hence a few multiples around this
one are tried, and the one with the least error of the linear's own output is taken.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_rsparse.formats.plane_bits import plane_bits
from vllm_rsparse.op.reference import kept_mask
from vllm_rsparse.prepare.calibration.thresholds import (
    channel_thresholds,
    score_threshold,
)

# Multiples that are tried, as shares of the one above.
TRIED = (0.5, 0.7, 1.0, 1.4, 2.0)
# Inputs that they are tried on, spread over the calibration text.
TRIED_TOKENS = 1024
# Scores that the shares of channels are estimated from, spread likewise.
SAMPLED_SCORES = 1 << 18
# Halvings of the interval that holds the first threshold: float32 has no more digits.
_HALVINGS = 60


def plane_thresholds(
    planes: Sequence[Tensor], x: Tensor, scale: Tensor, read: float
) -> Tensor:
    """Thresholds float32 [2, K], by which tokens read a share of the stored bits.

    Args:
        planes: what each plane stands for, [N, K] each.
        x: calibration inputs [tokens, K].
        scale: float32 [K], the score is |x| times it.
        read: share of the bits that the mean token reads, in [0, 1].
    """
    sample = x[:: max(1, len(x) // TRIED_TOKENS)][:TRIED_TOKENS]
    scores = _sorted_scores(x, scale)
    usual = threshold_ratio(planes)
    chosen, least = (1.0, 1.0), float("inf")
    for share in TRIED if read < 1 else ():
        kept = kept_shares(scores, usual * share, read, x.shape[1])
        score = [_at_share(scores, part) for part in kept]
        error = _lost_energy(
            planes, sample, [channel_thresholds(s, scale) for s in score]
        )
        if error < least:
            chosen, least = kept, error
    first, second = (score_threshold(x, scale, share) for share in chosen)
    rows = (channel_thresholds(s, scale) for s in (first, max(first, second)))
    return torch.stack(list(rows))


def threshold_ratio(planes: Sequence[Tensor]) -> float:
    """t2 / t1 for independent errors (see the module)."""
    first, second = (
        float(torch.linalg.vector_norm(p, dtype=torch.float64)) ** 2 for p in planes
    )
    b1, b2 = plane_bits(planes[0].shape[1])
    return (first * b2 / (max(second, 1e-30) * b1)) ** 0.5


def kept_shares(
    scores: Tensor, ratio: float, read: float, channels: int
) -> tuple[float, float]:
    """Shares of channels that are read at all, and with both planes.

    Args:
        scores: in ascending order.
        ratio: of the second plane's threshold to the first's.
        read: share of the bits that they read together.
        channels: input channels of the linear.
    """
    b1, b2 = plane_bits(channels)
    wanted = read * (b1 + b2)

    def above(score: float) -> float:
        limit = torch.tensor(score, dtype=scores.dtype)
        return 1 - int(torch.searchsorted(scores, limit, right=True)) / len(scores)

    low, high = 0.0, float(scores[-1])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if b1 * above(middle) + b2 * above(ratio * middle) > wanted:
            low = middle
        else:
            high = middle
    full = above(ratio * high)
    # The rest of the bits, exactly; it is what a single score is worth, or more where
    # many scores are equal.
    kept = min(1.0, max(0.0, (wanted - b2 * full) / b1))
    full = min(1.0, kept, max(full, (wanted - b1 * kept) / b2))
    return kept, full


def _sorted_scores(x: Tensor, scale: Tensor) -> Tensor:
    """Scores of inputs spread over all tokens, ascending, on the CPU."""
    step = max(1, x.numel() // SAMPLED_SCORES)
    scores = x[::step].abs().float() * scale
    return scores.flatten().sort().values.cpu()


def _at_share(scores: Tensor, share: float) -> float:
    """The score that the share of the scores exceeds; -1 where all do."""
    dropped = len(scores) - round(share * len(scores))
    return -1.0 if dropped == 0 else float(scores[dropped - 1])


def _lost_energy(
    planes: Sequence[Tensor], x: Tensor, thresholds: Sequence[Tensor]
) -> float:
    """Squared norm of what the output of x [tokens, K] loses."""
    lost: Tensor | float = 0.0
    for plane, row in zip(planes, thresholds, strict=True):
        dropped = x.masked_fill(kept_mask(x, row), 0)
        lost = lost + dropped @ plane.to(x.dtype).mT
    assert isinstance(lost, Tensor)
    return float(torch.linalg.vector_norm(lost, dtype=torch.float64)) ** 2
