# SPDX-License-Identifier: Apache-2.0
"""The output layer as it will be served: quantized, sparse, or both.

Its thresholds are those of a linear by the norms of its columns, on the states that it
receives. Scores by the Fisher information of its logits lose 4% less, and so does a
constant correction at 50% (SmolLM2-135M-Instruct), which neither is worth.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rsparse.artifact.schema import LinearEntry
from vllm_rsparse.model.finite import check_activations
from vllm_rsparse.model.names import HEAD
from vllm_rsparse.model.output_head import OutputHead
from vllm_rsparse.op.reference import kept_mask
from vllm_rsparse.prepare.calibration.linear import (
    ERROR_TOKENS,
    CalibratedLinear,
    calibrate_linear,
)
from vllm_rsparse.prepare.calibration.thresholds import chunk_elements
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.run import Run


class ServedHead:
    """From hidden states to the logits of the served model.

    Args:
        head: of the streamed model.
        sparsity: target; 0: it is dense.

    Attributes:
        thresholds: float32 [hidden], None before ``calibrate`` and where it is dense.
    """

    def __init__(self, head: OutputHead, sparsity: float) -> None:
        self._head = head
        self._sparsity = sparsity
        self.thresholds: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[vocabulary, hidden]."""
        return tuple(self._head.weight.shape)

    def calibrate(
        self, hidden: Tensor, error_tokens: int = 0
    ) -> CalibratedLinear | None:
        """Take the thresholds for hidden states [tokens, hidden].

        Args:
            hidden: outputs of the last layer.
            error_tokens: leading tokens that the relative error is measured on.

        Returns:
            What the artifact holds of it; None where it is dense.

        Raises:
            NotFiniteError: a state contains NaN or infinity.
        """
        if self._sparsity == 0:
            return None
        with torch.no_grad():
            states = self._head.states(hidden)
        check_activations(states, f"the input of {HEAD}")
        result = calibrate_linear(
            [self._head.weight],
            states,
            LinearPlan(self._sparsity, rho=1.0),
            seed=0,  # no factors
            error_tokens=error_tokens,
        )
        # A tensor of inference mode could not take part in a gradient.
        self.thresholds = result.tensors.thresholds.clone()
        return result

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] of hidden states [tokens, hidden]."""
        states = self._head.states(hidden)
        if self.thresholds is not None:
            states = states.masked_fill(~kept_mask(states, self.thresholds), 0)
        return self._head.logits(states)

    def base(self, hidden: Tensor) -> Tensor:
        """The same of the base model's output layer."""
        return self._head.base_logits(self._head.states(hidden))

    @torch.no_grad()
    def divergence(self, hidden: Tensor, dense: Tensor) -> float:
        """Mean KL(base model || served model) of the next token (nats).

        NaN becomes infinity.

        Args:
            hidden: [tokens, hidden] of the served model, outputs of the last layer.
            dense: the same of the dense model.
        """
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        chunk = max(1, chunk_elements(hidden.device) // len(self._head.weight))
        for rows, wanted in zip(hidden.split(chunk), dense.split(chunk), strict=True):
            logs = self(rows).float().log_softmax(-1)
            exact = self.base(wanted).float().log_softmax(-1)
            total += (exact.exp() * (exact - logs)).sum(dtype=torch.float64)
        result = total.item() / len(hidden)
        return result if math.isfinite(result) else math.inf


@contextmanager
def served_head(run: Run) -> Iterator[ServedHead]:
    """The output layer of a run's model, with its weights until the end of the block.

    Raises:
        CheckpointError: the architecture has no norm or output layer where expected.
    """
    with run.model.head() as head:
        yield ServedHead(head, run.head_sparsity)


@dataclass(frozen=True)
class CalibratedHead:
    """What the artifact holds of an output layer that is not the base model's.

    Attributes:
        shape: [vocabulary, hidden].
        entry: its entry in ``rsparse.json``; None where it is dense.
        thresholds: float32 [hidden] on the CPU; None where it is dense.
        divergence: mean KL(base model || served output layer) on the same states, nats.
        tokens: that the divergence was measured on.
    """

    shape: tuple[int, ...]
    entry: LinearEntry | None
    thresholds: Tensor | None
    divergence: float
    tokens: int


def calibrate_head(run: Run, hidden: Tensor) -> CalibratedHead | None:
    """Calibrate the output layer, and measure what it alone loses.

    Args:
        run: the model; positions behind its dense prefix count.
        hidden: [samples, tokens, hidden], outputs of the last layer.

    Returns:
        None where the output layer is the base model's.

    Raises:
        NotFiniteError: a state contains NaN or infinity.
    """
    if run.head_sparsity == 0 and run.model.head_load_time is None:
        return None
    hidden = hidden[:, run.dense_prefix :].flatten(0, 1)
    with served_head(run) as head:
        result = head.calibrate(hidden, ERROR_TOKENS)
        # Windows are in random order.
        leading = hidden[:ERROR_TOKENS]
        divergence = head.divergence(leading, leading)
        shape = head.shape
    entry = None if result is None else result.entry
    thresholds = None if result is None else result.tensors.thresholds.cpu()
    return CalibratedHead(shape, entry, thresholds, divergence, len(leading))
