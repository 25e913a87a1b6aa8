# SPDX-License-Identifier: Apache-2.0
"""Per-channel thresholds from the scores of calibration tokens (paper section 3.2).

score(token, j) = |x_j| * ||W[:, j]||_2, and t is the score that leaves the wanted
fraction of all (token, channel) pairs strictly above it. At run time only |x_j| is
known, so the threshold of channel j is t / ||W[:, j]||.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vllm_rsparse.prepare.calibration.order import SAMPLE, around_ranks

# Elements of activations per chunk: bounds the size of temporaries. On CUDA 64 times as
# many, for every chunk starts a dozen kernels.
CHUNK_ELEMENTS = 1 << 20
_CUDA_SHIFT = 6
KEEP_ALL = -1.0


def column_norms(weight: Tensor) -> Tensor:
    """||W[:, j]||_2 as float32 [K] of a weight [N, K] in any floating dtype."""
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64).float()


def score_threshold(x: Tensor, norms: Tensor, keep: float) -> float:
    """``score_thresholds`` for one fraction."""
    return score_thresholds(x, norms, [keep])[0]


def score_thresholds(x: Tensor, norms: Tensor, keeps: Sequence[float]) -> list[float]:
    """The scores t such that the fractions ``keeps`` of all scores lie above them.

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
        keeps: fractions in [0, 1].

    Returns:
        t of each fraction; -1 where everything is kept.

    Raises:
        NotFiniteError: the activations contain NaN or infinity.
    """
    total = x.numel()
    dropped = [total - round(keep * total) for keep in keeps]
    ranks = sorted({count for count in dropped if count > 0})
    scores = {0: KEEP_ALL}
    if ranks:
        sample = _sample(x, norms)
        found = around_ranks(lambda: _scores(x, norms), sample, ranks, total)
        scores |= {k: midway(*pair) for k, pair in zip(ranks, found, strict=True)}
    return [scores[count] for count in dropped]


def midway(largest_dropped: float, smallest_kept: float) -> float:
    """The threshold between two float32 scores, as a float32 value.

    If the two are adjacent, it is the lower one, which is dropped because the
    comparison is strict.
    """
    middle = torch.tensor((largest_dropped + smallest_kept) / 2).item()
    return middle if middle < smallest_kept else largest_dropped


def channel_thresholds(score: float, norms: Tensor) -> Tensor:
    """t / ||W[:, j]|| as float32 [K]; +inf where the column is zero."""
    thresholds = score / norms
    return torch.where(norms > 0, thresholds, math.inf)


def row_chunks(x: Tensor) -> Iterator[Tensor]:
    """Consecutive blocks of rows of x [tokens, K] with bounded size."""
    yield from x.split(max(1, chunk_elements(x.device) // x.shape[1]))


def chunk_elements(device: torch.device) -> int:
    """Elements that are processed together on a device."""
    return CHUNK_ELEMENTS << _CUDA_SHIFT if device.type == "cuda" else CHUNK_ELEMENTS


def _scores(x: Tensor, norms: Tensor) -> Iterator[Tensor]:
    for rows in row_chunks(x):
        yield rows.abs().float().mul_(norms).flatten()


def _sample(x: Tensor, norms: Tensor) -> Tensor:
    """Scores of elements spread evenly over tokens and channels; all of a small x."""
    channels = x.shape[1]
    step = max(1, x.numel() // SAMPLE)
    # A step that shares no factor with the number of channels visits all of them.
    while math.gcd(step, channels) != 1:
        step += 1
    picked = torch.arange(0, x.numel(), step, device=x.device)
    return x.flatten()[picked].abs().float() * norms[picked % channels]
