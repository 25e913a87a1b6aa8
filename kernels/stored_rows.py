# SPDX-License-Identifier: Apache-2.0
"""What the launchers read of a stored int4 or fp8 weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight

from .codes import FP8, INT4, INT8_PLANES
from .launch_config import LaunchConfig


def codes_per_word(weight: StoredWeight) -> int:
    """Columns in a 32-bit word of the stored weight."""
    return 8 if is_four_bit(weight) else 4


def words_of_thread(config: LaunchConfig, weight: StoredWeight) -> int:
    """Words of a row that one thread takes, where eight of a warp share it.

    Raises:
        ValueError: the configuration has too few or too many columns for its warps.
    """
    words = config.block_n // (8 * config.num_warps * codes_per_word(weight))
    if words not in (1, 2, 4):
        raise ValueError(
            f"block_n is {config.block_n} and num_warps {config.num_warps}, but a"
            f" thread of this kernel takes 1, 2 or 4 words of a row, not {words}"
        )
    return words


def is_packable(weight: StoredWeight, shard_sizes: Sequence[int]) -> bool:
    """Whether ``packed.py`` reads the weight: whole words in every shard's rows."""
    whole = all(size % codes_per_word(weight) == 0 for size in shard_sizes)
    if is_four_bit(weight):
        return whole
    data = weight.data
    return whole and data.stride(1) % 4 == 0 and data.data_ptr() % 4 == 0


def has_boxes(weight: StoredWeight) -> bool:
    """Whether a device can copy boxes of the rows: they begin at multiples of 16 B."""
    data = weight.data if is_four_bit(weight) else weight.data.t()
    pitch = data.stride(-2) * data.element_size()
    return pitch % 16 == 0 and data.data_ptr() % 16 == 0


def is_four_bit(weight: StoredWeight) -> bool:
    """Whether words hold codes of four bits."""
    return weight.format.code in (INT4.value, INT8_PLANES.value)


def rows_of(weight: StoredWeight, words: bool = False) -> tuple[Tensor, int]:
    """The stored rows and the distance between them, in elements or in words."""
    if is_four_bit(weight):
        return weight.data, weight.data.stride(-2)
    rows = weight.data.t()
    if words:
        return rows.view(torch.int32), rows.stride(0) // 4
    return rows, rows.stride(0)


def widens_by_bits(x: Tensor, weight: StoredWeight) -> bool:
    """Whether ``widen.py`` makes codes elements of x's type, rounded once.

    Scales of int4 and int8-planes must be numbers of that type; those of fp8 and
    fp8-block leave the sum.
    """
    if not is_four_bit(weight):
        return True
    assert weight.scales is not None
    return x.dtype in (weight.scales.dtype, torch.float32)


def column_scales(weight: StoredWeight) -> Tensor | None:
    """Scales that belong to an output channel and leave the sum."""
    return weight.scales if weight.format.code == FP8.value else None
