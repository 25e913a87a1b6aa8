# SPDX-License-Identifier: Apache-2.0
"""One fused layer through the backend of this machine, against the op's definition."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.op.ops import Backend, sparse_linear
from vllm_rsparse.op.packing import pack_factors
from vllm_rsparse.op.reference import kept_mask, rsparse_linear

# Relative error of a sum of rounded products: a few units in the last place of the
# output's dtype (2^-8, 2^-11), and for float32 the order of the sums.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class FusedLayer:
    """Linears with the same input: weights [N_s, K], and the artifact's tensors."""

    names: list[str]
    weights: list[Tensor]
    tensors: list[LinearTensors]


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
    sizes = [w.shape[0] for w in layer.weights]
    k = layer.weights[0].shape[1]
    # [K, N] storage: an input channel is one contiguous row (linear.py).
    weight = torch.cat(layer.weights).t().contiguous().t()
    thresholds = torch.stack([t.thresholds for t in layer.tensors])
    u, v, ranks = pack_factors(
        [None if t.u is None or t.v is None else (t.u, t.v) for t in layer.tensors],
        sizes,
        k,
        dtype,
        "cpu",
    )
    correction = torch.cat(
        [
            torch.zeros(n) if t.correction is None else t.correction
            for n, t in zip(sizes, layer.tensors, strict=True)
        ]
    )
    generator = torch.Generator().manual_seed(0)
    # Activations of the thresholds' own size, so that some channels are kept.
    finite = thresholds[thresholds.isfinite()]
    scale = finite.median().clamp(min=1e-6) if finite.numel() else torch.tensor(1.0)
    x = (torch.randn(1, k, generator=generator) * scale * 1.5).to(dtype)
    expected = rsparse_linear(
        x, weight, thresholds, u, v, correction, None, sizes, ranks
    ).float()
    found = sparse_linear(
        x.to(device),
        weight.to(device),
        thresholds.to(device),
        u.to(device),
        v.to(device),
        correction.to(device),
        None,
        sizes,
        ranks,
        int(backend),
    )
    difference = (found.cpu().float() - expected).norm()
    return Comparison(
        float(difference / expected.norm().clamp(min=1e-30)),
        float(kept_mask(x, thresholds).float().mean()),
        TOLERANCE[dtype],
    )
