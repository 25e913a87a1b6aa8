# SPDX-License-Identifier: Apache-2.0
"""The backend ``triton``: looks up a launch configuration and calls ``kernels/``."""

from torch import Tensor

from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.kernels.rsparse_linear import rsparse_linear as launch
from vllm_rsparse.op.operands import SparseOperands
from vllm_rsparse.op.tuning import device_of, launch_config


def rsparse_linear(
    x: Tensor,
    operands: SparseOperands,
    bias: Tensor | None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Sparse-plus-low-rank linear in Triton; see ``reference.rsparse_linear``.

    Args:
        x: [M, K] as the weight's format allows; rows may have any stride.
        operands: fast in the layout of ``SparseOperands.from_shards``.
        bias: [N] in x's dtype, or None.
        config: how to divide the work; None looks it up (``tuning``).

    Raises:
        OperandError: a tensor does not fit the others.
    """
    operands.check(x, bias)
    weight = operands.weight
    if config is None:
        config = launch_config(
            device_of(x.device), weight.n, weight.k, weight.kind, x.shape[0]
        )
    return launch(
        x,
        weight,
        operands.thresholds,
        operands.u,
        operands.v,
        operands.correction,
        bias,
        operands.shard_sizes,
        operands.ranks,
        config,
    )
