# SPDX-License-Identifier: Apache-2.0
"""The part of calibration inputs that thresholds drop, compared as at run time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rsparse.op.reference import kept_mask
from vllm_rsparse.prepare.calibration.thresholds import row_chunks


@dataclass(frozen=True, eq=False)
class Dropped:
    """Sums over the dropped part d of inputs x [tokens, K].

    Attributes:
        x: the inputs.
        kept: (token, channel) pairs that are kept, int64 on the device of ``x``.
        total: float64 [K], sum of d, or None.
        outer: float64 [K, K], sum of d d^T, or None.
        masks: kept channels of the leading tokens, bool, in the chunks of
            ``row_chunks``.
    """

    x: Tensor
    kept: Tensor
    total: Tensor | None
    outer: Tensor | None
    masks: list[Tensor]

    @property
    def kept_fraction(self) -> float:
        """Fraction of (token, channel) pairs that are kept; waits for the device."""
        return int(self.kept) / self.x.numel()

    @property
    def mean(self) -> Tensor:
        """E[d], float64 [K]."""
        if self.total is None:
            raise ValueError("d was not summed")
        return self.total / len(self.x)

    def covariance(self, centred: bool) -> Tensor:
        """E[d d^T], float64 [K, K]; with d minus its mean if ``centred``."""
        if self.outer is None:
            raise ValueError("d d^T was not summed")
        covariance = self.outer / len(self.x)
        return covariance - torch.outer(self.mean, self.mean) if centred else covariance

    def leading(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of the leading tokens: x, and d."""
        for rows, mask in zip(row_chunks(self.x), self.masks, strict=False):
            rows = rows[: len(mask)]
            yield rows, rows.masked_fill(mask, 0)


def count_dropped(
    x: Tensor,
    thresholds: Tensor,
    *,
    total: bool = False,
    outer: bool = False,
    leading: int = 0,
) -> Dropped:
    """Compare every input with its threshold, once.

    Args:
        x: [tokens, K], any floating dtype.
        thresholds: float32 [K].
        total: sum d.
        outer: sum d d^T, and d.
        leading: tokens whose masks are kept; one byte per token and channel.
    """
    k = x.shape[1]
    # On the device, so that counting does not wait for it.
    kept = torch.zeros((), dtype=torch.int64, device=x.device)
    sums = torch.zeros(k, dtype=torch.float64, device=x.device)
    products = torch.zeros(k if outer else 0, k, dtype=torch.float64, device=x.device)
    masks = []
    for rows in row_chunks(x):
        mask = kept_mask(rows, thresholds)
        kept += mask.sum()
        if total or outer:
            dropped = rows.masked_fill(mask, 0)
            sums += dropped.sum(0, dtype=torch.float64)
        if outer:
            dropped = dropped.float()
            products += dropped.mT @ dropped
        if leading > 0:
            masks.append(mask[:leading])
            leading -= len(rows)
    return Dropped(
        x,
        kept,
        sums if total or outer else None,
        products if outer else None,
        masks,
    )
