# SPDX-License-Identifier: Apache-2.0
"""Sizes of grids and tiles, on the host.

Triton's functions of these names are for kernels too and look at every argument, which
takes 2 us a call.
"""


def cdiv(value: int, divisor: int) -> int:
    """The quotient of two numbers, rounded up."""
    return -(-value // divisor)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (value - 1).bit_length()
