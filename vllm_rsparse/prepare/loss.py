# SPDX-License-Identifier: Apache-2.0
"""The loss that a streamed model makes on its calibration text."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .streaming import StreamedModel


@torch.no_grad()
def text_losses(
    model: StreamedModel, states: Sequence[Tensor], windows: Tensor, first: int
) -> list[float]:
    """Mean negative log likelihood of the text (nats); infinite where it is not finite.

    Args:
        model: the streamed base model; its head is loaded once for all states.
        states: [samples, tokens, hidden] each, what leaves the last layer.
        windows: int64 [samples, tokens].
        first: leading positions of each window that are not counted.
    """
    labels = windows[:, first + 1 :].to(model.device)
    result = []
    with model.head() as head:
        for state in states:
            total = 0.0
            for row, wanted in zip(state, labels, strict=True):
                logs = head(row[first:-1]).float().log_softmax(-1)
                picked = logs.gather(-1, wanted.unsqueeze(-1))
                total -= picked.sum(dtype=torch.float64).item()
            loss = total / labels.numel()
            result.append(loss if math.isfinite(loss) else math.inf)
    return result
