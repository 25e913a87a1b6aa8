# SPDX-License-Identifier: Apache-2.0
"""Loss of a streamed model on its text, and its divergence from the dense model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_rsparse.prepare.calibration.head import served_head
from vllm_rsparse.prepare.run import Run


@torch.no_grad()
def text_losses(run: Run, states: Sequence[Tensor]) -> list[float]:
    """Mean negative log likelihood of the text (nats); NaN becomes infinity.

    Args:
        run: the model and the text; positions behind its dense prefix count. The
            output layer is the served model's, and is loaded once for all states.
        states: [samples, tokens, hidden] each, outputs of the last layer.
    """
    first = run.dense_prefix
    labels = run.windows[:, first + 1 :].to(run.model.device)
    result = []
    with served_head(run) as head:
        for state in states:
            head.calibrate(state[:, first:].flatten(0, 1))
            total = 0.0
            for row, wanted in zip(state, labels, strict=True):
                logs = head(row[first:-1]).float().log_softmax(-1)
                picked = logs.gather(-1, wanted.unsqueeze(-1))
                total -= picked.sum(dtype=torch.float64).item()
            loss = total / labels.numel()
            result.append(loss if math.isfinite(loss) else math.inf)
    return result


def divergence(run: Run, state: Tensor, dense: Tensor) -> float:
    """Mean KL(dense || sparse) of the next token's distribution (nats).

    NaN becomes infinity. On few tokens it distinguishes candidates better than the loss
    does, which depends on what the text's author happened to write. The sparse model's
    output layer is the one that will be served.

    Args:
        run: the model and the text; positions behind its dense prefix count.
        state: [samples, tokens, hidden], the output of the last layer.
        dense: the same of the dense model.
    """
    sparse, exact = (x[:, run.dense_prefix :].flatten(0, 1) for x in (state, dense))
    with served_head(run) as head:
        head.calibrate(sparse)
        return head.divergence(sparse, exact)
