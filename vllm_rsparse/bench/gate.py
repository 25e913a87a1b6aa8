# SPDX-License-Identifier: Apache-2.0
"""The correctness gate: nothing is timed that differs from the float32 definition."""

from torch import Tensor

from vllm_rsparse.bench.inputs import Inputs
from vllm_rsparse.kernels.launch_config import Rounding
from vllm_rsparse.op import reference
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.testing.tolerances import tolerance


def check(
    actual: Tensor, expected: Tensor, what: str, limit: float | None = None
) -> None:
    """The gate: a wrong result is not timed.

    Args:
        actual: what was computed.
        expected: its definition, in the same dtype.
        what: computed it, for the message.
        limit: largest relative error; None: what one rounding explains.

    Raises:
        RuntimeError: the relative error is larger.
    """
    error = (actual.float() - expected.float()).norm()
    ratio = (error / expected.float().norm()).item()
    # Both are rounded: together their errors stay below the worst of one rounding.
    limit = tolerance(expected.dtype) if limit is None else limit
    if not ratio < limit:
        raise RuntimeError(
            f"{what}: relative error {ratio:.2e} is over {limit:.0e}, not timed"
        )


def allowed(backend: Backend, x: Tensor) -> float:
    """The largest relative error of a backend's result on this input.

    Triton's interpreter truncates to bfloat16, which errs by up to two roundings.
    """
    interpreted = backend is Backend.TRITON and not x.is_cuda
    return tolerance(x.dtype, roundings=2 if interpreted else 1)


def exact_dense(inputs: Inputs, rounding: Rounding | None = None) -> Tensor:
    """The dense product by its definition, rounded once: float32, dequantised.

    Args:
        inputs: of the product.
        rounding: how the route rounds x to bytes, or None.
    """
    x = inputs.x.float()
    if rounding is not None:
        x = reference.round_to_bytes(x, rounding)
    weight = inputs.operands.weight.dequantise()
    return (x @ weight.t()).to(inputs.x.dtype)
