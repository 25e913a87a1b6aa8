# SPDX-License-Identifier: Apache-2.0
"""Loss of a streamed model on its text, and its divergence from the dense model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.thresholds import chunk_elements


@torch.no_grad()
def text_losses(
    model: StreamedModel, states: Sequence[Tensor], windows: Tensor, dense_prefix: int
) -> list[float]:
    """Mean negative log likelihood of the text (nats); NaN becomes infinity.

    Args:
        model: the streamed base model; its head is loaded once for all states.
        states: [samples, tokens, hidden] each, outputs of the last layer.
        windows: int64 [samples, tokens].
        dense_prefix: leading positions of each window that are not counted.
    """
    labels = windows[:, dense_prefix + 1 :].to(model.device)
    result = []
    with model.head() as head:
        for state in states:
            total = 0.0
            for row, wanted in zip(state, labels, strict=True):
                logs = head(row[dense_prefix:-1]).float().log_softmax(-1)
                picked = logs.gather(-1, wanted.unsqueeze(-1))
                total -= picked.sum(dtype=torch.float64).item()
            loss = total / labels.numel()
            result.append(loss if math.isfinite(loss) else math.inf)
    return result


@torch.no_grad()
def divergence(
    model: StreamedModel, state: Tensor, dense: Tensor, dense_prefix: int
) -> float:
    """Mean KL(dense || sparse) of the next token's distribution (nats).

    NaN becomes infinity. On few tokens it distinguishes candidates better than the loss
    does, which depends on what the text's author happened to write.

    Args:
        model: the streamed base model.
        state: [samples, tokens, hidden], the output of the last layer.
        dense: the same of the dense model.
        dense_prefix: leading positions of each window that are not counted.
    """
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    counted = [x[:, dense_prefix:].flatten(0, 1) for x in (state, dense)]
    with model.head() as head:
        chunk = max(1, chunk_elements(model.device) // model.vocab_size)
        for rows, wanted in zip(*(part.split(chunk) for part in counted), strict=True):
            logs, other = (head(x).float().log_softmax(-1) for x in (rows, wanted))
            total += (other.exp() * (other - logs)).sum(dtype=torch.float64)
    result = total.item() / len(counted[0])
    return result if math.isfinite(result) else math.inf
