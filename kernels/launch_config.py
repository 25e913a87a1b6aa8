# SPDX-License-Identifier: Apache-2.0
"""``LaunchConfig``: how one call of the Triton kernels is cut up. Needs no Triton."""

from dataclasses import dataclass
from typing import NamedTuple

# Most channels, or rows of packed words, that a program lists, for its registers: the
# launchers make more splits where needed.
MOST_LISTED = 1024


@dataclass(frozen=True)
class LaunchConfig:
    """How one call of the kernel is cut up.

    Attributes:
        block_n: output columns of a program.
        block_k: input channels of one loop iteration.
        split_k: programs that take turns on the channels of a column tile. Above 1 the
            partial sums go through a workspace and a second launch adds them.
        num_warps: warps of a program. Those of a packed one divide its columns.
        num_stages: with ``use_dot``, loop iterations whose loads are in flight.
        use_dot: multiply on the matrix units, 16 tokens at a time; otherwise on the
            vector units, up to 4 at a time.
        listed: on the vector units, list the wanted channels first instead of masking
            the others in place.
        packed: multiply int4 or fp8 words as they are loaded, on the matrix units, up
            to 8 tokens of the sparse and 64 of the dense route at a time. ``block_k``
            is then the most channels of a block, 32, 64 or 128.
    """

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    use_dot: bool
    listed: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        for name in ("block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        for name in ("split_k", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.use_dot and self.listed:
            raise ValueError("use_dot masks channels in place, listed must be false")
        if self.packed and (self.use_dot or self.listed):
            raise ValueError(
                "packed has its own way to list and multiply: use_dot and listed must"
                " be false"
            )
        if self.packed and self.block_k not in (32, 64, 128):
            raise ValueError(f"packed needs block_k 32, 64 or 128, got {self.block_k}")
        if self.use_dot and min(self.block_n, self.block_k) < 16:
            raise ValueError(
                "use_dot needs block_n and block_k >= 16, got"
                f" {self.block_n} and {self.block_k}"
            )


class Rounding(NamedTuple):
    """How x becomes bytes (``rounded_blocks.py``).

    Attributes:
        block: channels that share a unit, 32, 64 or 128.
        digits: bytes of an element, 1 or 2.
    """

    block: int
    digits: int
