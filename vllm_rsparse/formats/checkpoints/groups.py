# SPDX-License-Identifier: Apache-2.0
"""Groups of input channels that share a scale, as four-bit checkpoints have them."""

from vllm_rsparse.formats.base import WeightFormatError
from vllm_rsparse.formats.int4 import GROUPS


def group_count(suffix: str, k: int, group: int | None) -> int:
    """Number of groups of ``group`` among K input channels; None is one of K.

    Raises:
        WeightFormatError: K is not a multiple of the group.
    """
    if group is None:
        return 1
    if k % group:
        raise WeightFormatError(
            f"{suffix}: {k} input channels are no multiple of the group of {group};"
            " use fewer tensor-parallel ranks, or a checkpoint with groups of"
            f" {' or '.join(str(g) for g in GROUPS if k % g == 0) or 'one per channel'}"
        )
    return k // group
