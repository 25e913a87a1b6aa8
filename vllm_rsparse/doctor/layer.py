# SPDX-License-Identifier: Apache-2.0
"""One fused layer through the backend of this machine, against the op's definition."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.formats.plain import store_float
from vllm_rsparse.op.backends import Backend, routes_of
from vllm_rsparse.op.operands import SparseOperands
from vllm_rsparse.op.reference import kept_mask, rsparse_linear
from vllm_rsparse.testing.tolerances import MODEL_SUMS, tolerance


@dataclass(frozen=True)
class FusedLayer:
    """Linears with the same input: weights [N_s, K], and the artifact's tensors.

    ``load_time`` is what the engine quantizes the weights to while they load, or None.
    """

    names: list[str]
    weights: list[Tensor]
    tensors: list[LinearTensors]
    load_time: LoadTimeFormat | None = None


@dataclass(frozen=True)
class Comparison:
    """Outcome of one layer.

    Attributes:
        error: ||y_backend - y_definition|| / ||y_definition||; NaN where either is.
        kept: fraction of the input channels that were kept, over all shards.
        tolerance: the error that rounding explains.
    """

    error: float
    kept: float
    tolerance: float

    @property
    def equal(self) -> bool:
        return self.error <= self.tolerance


def compare(layer: FusedLayer, backend: Backend, device: torch.device) -> Comparison:
    """One random token through the backend on the device, and the definition here."""
    dtype = layer.weights[0].dtype
    operands = _operands(layer, torch.device("cpu"))
    thresholds = operands.thresholds
    generator = torch.Generator().manual_seed(0)
    # Activations of the thresholds' own size, so that some channels are kept.
    finite = thresholds[thresholds.isfinite()]
    scale = finite.median().clamp(min=1e-6) if finite.numel() else torch.tensor(1.0)
    k = operands.weight.k
    x = (torch.randn(1, k, generator=generator) * scale * 1.5).to(dtype)
    expected = rsparse_linear(x, operands, None).float()
    sparse = routes_of(backend, operands.weight.format).sparse
    found = sparse(x.to(device), _operands(layer, device), None)
    difference = (found.cpu().float() - expected).norm()
    return Comparison(
        float(difference / expected.norm().clamp(min=1e-30)),
        float(kept_mask(x, thresholds).float().mean()),
        # Both outputs are rounded, and z = V x in cpu-torch.
        tolerance(dtype, roundings=3, sums=MODEL_SUMS),
    )


def _operands(layer: FusedLayer, device: torch.device) -> SparseOperands:
    weight = torch.cat(layer.weights).to(device)
    load_time = layer.load_time
    return SparseOperands.from_shards(
        store_float(weight) if load_time is None else load_time.encode(weight),
        layer.tensors,
        [weight.shape[0] for weight in layer.weights],
        layer.weights[0].dtype,
    )
