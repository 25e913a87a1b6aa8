# SPDX-License-Identifier: Apache-2.0
"""What a weight of the format ``int8-planes`` takes, without torch."""

GROUPS = (128, 64, 32)
# Of a scale (bfloat16) and a zero point, which a group of input channels shares.
_SHARED_BITS = 16 + 4


def group_of(k: int) -> int | None:
    """The group of a linear with K input channels: the largest that divides K."""
    return next((group for group in GROUPS if k % group == 0), None)


def plane_bits(k: int) -> tuple[float, float]:
    """Bits that a weight takes in each plane.

    The first plane's include an equal part of what its group shares.

    Args:
        k: input channels of the linear; ``GROUPS`` must have a divisor of it.
    """
    group = group_of(k)
    if group is None:
        raise ValueError(f"no group of {', '.join(map(str, GROUPS))} divides {k}")
    return 4 + _SHARED_BITS / group, 4.0
