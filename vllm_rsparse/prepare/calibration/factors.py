# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors of a weight: its truncated SVD (paper section 3.3).

``regress`` computes the other kind.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Above this a full SVD is too slow for a whole model: 1024x2816 takes 7 s on two cores,
# 2048x2048 12 s, growing with the cube, the randomised one 1 to 2 s.
EXACT_MAX_DIM = 512
# On the weights of the bundled model, ||W - U V|| is then at most 1.3e-4 above the
# best possible (1.3e-3 with 4 iterations, 4.7e-3 with 2).
OVERSAMPLING = 16
POWER_ITERATIONS = 8


@dataclass(frozen=True)
class Factors:
    """W is approximated by ``u @ v``.

    Attributes:
        u: float32 [N, r], left singular vectors times singular values.
        v: float32 [r, K], right singular vectors.
        method: "exact" or "randomised" SVD, or "regressed".
        residual: max over i of ||W v_i - sigma_i u_i|| / sigma_i: how far the worst
            pair is from a singular pair of W (rounding only, when exact); of regressed
            factors the same for the eigenvectors that they come from.
    """

    u: Tensor
    v: Tensor
    method: str
    residual: float


def truncated_svd(weight: Tensor, rank: int, seed: int) -> Factors:
    """The best (or, if randomised, nearly best) rank-r approximation of a weight.

    Args:
        weight: [N, K], any floating dtype.
        rank: r, from 1 to min(N, K).
        seed: start of the randomised method; the same seed gives the same factors.
    """
    w = weight.float()
    smaller = min(w.shape)
    sketch = min(2 * rank + OVERSAMPLING, smaller)
    if smaller <= EXACT_MAX_DIM or sketch == smaller:
        method = "exact"
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    else:
        method = "randomised"
        with torch.random.fork_rng(devices=[w.device] if w.is_cuda else []):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(w, q=sketch, niter=POWER_ITERATIONS)
        vh = v.mT
    u = u[:, :rank] * s[:rank]
    v = vh[:rank].contiguous()
    norms = s[:rank].clamp_min(torch.finfo(w.dtype).tiny)
    residual = torch.linalg.vector_norm(w @ v.mT - u, dim=0) / norms
    return Factors(u, v, method, residual.max().item())
