# SPDX-License-Identifier: Apache-2.0
"""Groups of input channels that share a scale, as checkpoints with words have them."""

from collections.abc import Mapping, Sequence

from vllm_rsparse.formats.base import WeightFormatError
from vllm_rsparse.formats.checkpoints.layout import matrix, require_shape
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


def pack_quantized_shape(
    shapes: Mapping[str, Sequence[int]], per_word: int, group: int | None
) -> tuple[int, int]:
    """(N, K) of ``weight_packed`` [N, words] and ``weight_scale`` [N, groups].

    Args:
        shapes: by suffix.
        per_word: input channels of a word.
        group: input channels that share a scale; None for all of them.

    Raises:
        WeightFormatError: the shapes do not fit one another.
    """
    n, words = matrix(shapes, "weight_packed")
    k = words * per_word
    count = group_count("weight_packed", k, group)
    require_shape(shapes, "weight_scale", (n, count))
    return n, k
