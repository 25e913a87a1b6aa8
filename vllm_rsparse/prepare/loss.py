# SPDX-License-Identifier: Apache-2.0
"""The loss that a streamed model makes on its calibration text."""

import math

import torch
from torch import Tensor

from .streaming import StreamedModel


@torch.no_grad()
def text_loss(
    model: StreamedModel, hidden: Tensor, windows: Tensor, first: int
) -> float:
    """Mean negative log likelihood of the text (nats); infinite where it is not finite.

    Args:
        model: the streamed base model.
        hidden: [samples, tokens, hidden], what leaves the last layer.
        windows: int64 [samples, tokens].
        first: leading positions of each window that are not counted.
    """
    labels = windows[:, first + 1 :].to(hidden.device)
    total = 0.0
    with model.head() as head:
        for row, wanted in zip(hidden, labels, strict=True):
            logs = head(row[first:-1]).float().log_softmax(-1)
            picked = logs.gather(-1, wanted.unsqueeze(-1))
            total -= picked.sum(dtype=torch.float64).item()
    loss = total / labels.numel()
    return loss if math.isfinite(loss) else math.inf
