# SPDX-License-Identifier: Apache-2.0
"""What the launch rules of the sparse and of the dense routes share.

The rules follow what won on an H100 and an H200, scaled by the number of
multiprocessors; the measurements are in docs/notes/kernels.md and
docs/notes/kernels-quantized.md.
"""

# Columns of a program of the packed kernel: 16 bytes a thread, 8 threads a row.
PACKED_COLUMNS = {
    "int4": 256,
    "int8-planes": 256,
    "float8_e4m3fn": 128,
    "fp8-block": 128,
}
FOUR_BIT = ("int4", "int8-planes")
# Tokens up to which the packed kernel has a loop of its own, with a slot of the matrix
# units for each block of channels (``kernels/packed_groups.py``, in four bits
# ``kernels/packed_integers.py``), by kind; none where scales belong to columns.
SLOTTED_TOKENS = {"int4": 2, "int8-planes": 2, "fp8-block": 1}
# Up to this many elements the packed kernel takes blocks of 64 channels, not 128.
SMALL_ELEMENTS = 40 * 10**6
# Multiprocessors of an H100 and an H200. Defaults fit this number and are scaled.
PROCESSORS = 132


def even_splits(tiles: int, blocks: int, enough: int, fewest: int = 1) -> int:
    """Fewest splits with enough programs that all take as many blocks of channels."""
    for split_k in range(fewest, blocks):
        if blocks % split_k == 0 and tiles * split_k >= enough:
            return split_k
    return max(1, blocks)
