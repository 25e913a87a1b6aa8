# SPDX-License-Identifier: Apache-2.0
"""Bytes that a decoded token reads, of an artifact's linears and of the whole model."""

from dataclasses import dataclass

from vllm_rsparse.artifact.schema import ArtifactInfo, LinearEntry
from vllm_rsparse.formats.names import AS_STORED
from vllm_rsparse.formats.plane_bits import group_of
from vllm_rsparse.formats.stored_bytes import StoredBytes, stored_bytes

# Keys of the provenance: elements of weight matrices by part of the model, and the
# output layer where it is not the base model's.
TOKEN_READS = "token_reads"
HEAD_FOUND = "head"
_PLANES = "int8-planes"
_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class LinearReads:
    """Bytes that a token reads of one or several linears.

    Attributes:
        columns: of kept channels, with the scales and zero points of their groups.
        scales: of output channels, which are read whatever is kept.
        factors: of both.
        vectors: thresholds and corrections.
        dense: what a dense step reads.
    """

    columns: float = 0.0
    scales: float = 0.0
    factors: float = 0.0
    vectors: float = 0.0
    dense: float = 0.0

    @property
    def sparse(self) -> float:
        """All that a sparse step reads."""
        return self.columns + self.scales + self.factors + self.vectors

    def __add__(self, other: "LinearReads") -> "LinearReads":
        return LinearReads(
            self.columns + other.columns,
            self.scales + other.scales,
            self.factors + other.factors,
            self.vectors + other.vectors,
            self.dense + other.dense,
        )


def linear_reads(info: ArtifactInfo) -> LinearReads:
    """Bytes that a token reads of the linears in the layers."""
    total = LinearReads()
    for entry in info.linears.values():
        total += _reads(entry, _stored(info, entry), _DTYPE_BYTES[info.dtype])
    return total


def head_reads(info: ArtifactInfo) -> LinearReads | None:
    """The same of the output layer; None if its size is not known."""
    width = _DTYPE_BYTES[info.base.dtype]
    entry, shape = info.sparse_head, _head_shape(info)
    if shape is None:
        elements = _elements(info).get("head")
        if elements is None:
            return None
        # Of an older release: the scales of FP8 cannot be told from the elements.
        size = float(elements * (width if info.head == AS_STORED else 1))
        return LinearReads(columns=size, dense=size)
    stored = _made_while_loading(info.head, *shape, width)
    if entry is not None:
        return _reads(entry, stored, width)
    dense = stored.whole(shape[1])
    return LinearReads(dense - stored.fixed, stored.fixed, dense=dense)


def token_reads_of(info: ArtifactInfo) -> dict[str, LinearReads]:
    """Bytes that a token reads, by part of the model.

    Parts are "linears" (that the artifact lists), "experts" (the routed ones that a
    token chooses), "others" (in the decoder layers) and "head". Empty if ``prepare`` of
    an older version made the artifact.
    """
    elements = _elements(info)
    if not elements:
        return {}
    parts = {"linears": linear_reads(info)}
    # Both as the checkpoint stores them: routed experts like most quantized linears,
    # and what is left in the layers (routers, norms) in floats.
    width = _DTYPE_BYTES[info.base.dtype]
    for part, each in (("experts", _element_bytes(info)), ("others", width)):
        size = float(elements.get(part, 0) * each)
        parts[part] = LinearReads(columns=size, dense=size)
    parts["head"] = head_reads(info) or LinearReads()
    return parts


def covered(info: ArtifactInfo) -> str:
    """The listed linears' share, to be appended to a message; empty if not known."""
    parts = token_reads_of(info)
    total = sum(part.dense for part in parts.values())
    if not total:
        return ""
    share = parts["linears"].dense / total
    return f", which cover {share:.0%} of the weights' bytes that a dense token reads"


def _reads(entry: LinearEntry, stored: StoredBytes, width: int) -> LinearReads:
    n, k = entry.shape
    kept: tuple[float, ...] = (entry.kept_fraction,)
    if entry.full_fraction is not None:
        kept = (entry.kept_fraction, entry.full_fraction)
    return LinearReads(
        columns=stored.read(k, kept) - stored.fixed,
        scales=stored.fixed,
        factors=width * entry.rank * (n + k),
        vectors=4.0 * (k * len(kept) + n * entry.correction),
        dense=stored.whole(k),
    )


def _stored(info: ArtifactInfo, entry: LinearEntry) -> StoredBytes:
    n, k = entry.shape
    if info.served_format == _PLANES:
        return _made_while_loading(_PLANES, n, k)
    base = info.base
    width = _DTYPE_BYTES[base.dtype]
    return stored_bytes(info.served_format, n, k, width, base.group, base.zeros)


def _made_while_loading(name: str, n: int, k: int, width: int = 2) -> StoredBytes:
    """Bytes of a weight [N, K] in a format of ``--weights`` or ``--head``.

    Args:
        name: of the format; as stored, it is one of floats of ``width`` bytes.
    """
    if name == _PLANES:
        # Scales are bfloat16, and each group has a zero point.
        return stored_bytes(_PLANES, n, k, 2, group_of(k) or k, zeros=True)
    return stored_bytes("float" if name == AS_STORED else name, n, k, width)


def _element_bytes(info: ArtifactInfo) -> float:
    """Bytes of a weight's element in the checkpoint's format, with its scales."""
    (n, k), base = next(iter(info.linears.values())).shape, info.base
    width = _DTYPE_BYTES[base.dtype]
    stored = stored_bytes(base.format, n, k, width, base.group, base.zeros)
    return stored.whole(k) / (n * k)


def _elements(info: ArtifactInfo) -> dict[str, int]:
    """Elements of weight matrices by part; empty if they are not known."""
    reads = info.provenance.get(TOKEN_READS)
    if not isinstance(reads, dict):
        return {}
    return {k: v for k, v in reads.items() if isinstance(v, int) and v >= 0}


def _head_shape(info: ArtifactInfo) -> tuple[int, int] | None:
    if info.sparse_head is not None:
        return info.sparse_head.shape
    found = info.provenance.get(HEAD_FOUND)
    shape = found.get("shape") if isinstance(found, dict) else None
    match shape:
        case [int(n), int(k)] if n > 0 and k > 0:
            return n, k
    return None
