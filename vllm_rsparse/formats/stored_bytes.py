# SPDX-License-Identifier: Apache-2.0
"""What reading a weight costs in each format, without torch.

The one model of bytes: for the formats themselves, and for artifacts, which name a
format and have no weights.
"""

from dataclasses import dataclass

FP8_BLOCK_SIZE = 128
_SCALE = 4  # float32, in both FP8 formats


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of a weight [N, K].

    Attributes:
        rows: of one input channel, by plane (one for most formats). Scales and zero
            points that a group of channels shares are counted in equal parts.
        fixed: read once per call, whatever is kept: scales per output channel.
    """

    rows: tuple[float, ...]
    fixed: float = 0.0

    def read(self, k: int, kept: tuple[float, ...]) -> float:
        """Bytes that a call reads.

        Args:
            k: input channels.
            kept: fraction of them that each plane keeps.
        """
        pairs = zip(self.rows, kept, strict=True)
        return self.fixed + k * sum(row * share for row, share in pairs)

    def whole(self, k: int) -> float:
        """Bytes that a dense call reads of ``k`` input channels."""
        return self.fixed + k * sum(self.rows)


def stored_bytes(
    name: str, n: int, k: int, width: int, group: int = 0, zeros: bool = False
) -> StoredBytes:
    """Bytes of a weight in a format.

    Args:
        name: of the format.
        n: output features.
        k: input features.
        width: bytes of an element in the format float, of a scale in INT4, INT8 and
            planes.
        group: input channels that share a scale in these; 0 or K: all.
        zeros: whether INT4 has zero points.
    """
    if name == "fp8":
        return StoredBytes((n,), _SCALE * n)
    if name == "fp8-block":
        blocks = -(-n // FP8_BLOCK_SIZE)
        return StoredBytes((n + blocks * _SCALE / FP8_BLOCK_SIZE,))
    if name in ("int4", "int8", "int8-planes"):
        shared = n * width + (n / 2 if zeros else 0)
        per_channel = group in (0, k)
        codes = n if name == "int8" else n / 2
        first = codes + (0 if per_channel else shared / group)
        planes = (first, codes) if name == "int8-planes" else (first,)
        return StoredBytes(planes, shared if per_channel else 0)
    if name == "float":
        return StoredBytes((n * width,))
    raise ValueError(f"the bytes of the format {name!r} are not known")
