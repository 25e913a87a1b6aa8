# SPDX-License-Identifier: Apache-2.0
"""The one table of rounding errors, for tests, ``doctor`` and ``bench``.

Errors and bounds are relative norms, ||actual - expected|| / ||expected||.
"""

import torch

# Sums of a few thousand float32 products in another order: 1e-7 per rounding, most of
# which cancel. Measured 2e-7 to 8e-7 over the shapes of tests/op.
SUMS = 2e-6
# The same for a real model's inputs: terms that are far larger than their sum lose up
# to two more digits.
MODEL_SUMS = 1e-4


def tolerance(dtype: torch.dtype, roundings: int = 1, sums: float = SUMS) -> float:
    """The largest relative error of a correct result.

    Args:
        dtype: of the output.
        roundings: how often values were rounded to it: once for an output compared
            with an exact one, twice if both were rounded; once more if z = V x is
            rounded (``cpu-torch``), or in Triton's interpreter, which truncates to
            bfloat16 and thereby errs by up to two roundings.
        sums: error of the float32 sums before that.
    """
    # Rounding to nearest errs by half a unit in the last place: 2^-8 for bfloat16,
    # 2^-11 for float16.
    return sums + roundings * torch.finfo(dtype).eps / 2
