# SPDX-License-Identifier: Apache-2.0
"""The content of ``rsparse.json``, which describes an artifact. No tensors here.

These are the objects that the package works with, and the schema of the newest format
version; ``versions`` reads the older ones. docs/format.md describes the format.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic.dataclasses import dataclass

from vllm_rsparse.formats.names import (
    AS_STORED,
    DENSE_HEAD_FORMATS,
    HEAD_FORMATS,
    LOAD_TIME_FORMATS,
    WEIGHT_FORMATS,
)
from vllm_rsparse.formats.plane_bits import group_of, plane_bits
from vllm_rsparse.model.names import HEAD
from vllm_rsparse.validation import CONFIG, must, one_of, sha256

FORMAT_VERSION = 2
# Beyond any model: features of a linear.
_MAX_SIZE = 1 << 24

DTYPES = ("bfloat16", "float16", "float32")


def linear_name(name: str) -> str:
    """A checked name of a linear: it is printed, so it must not control a terminal.

    Raises:
        ValueError: it is empty, or has blanks or control characters.
    """
    if not name.isprintable() or not name or " " in name:
        raise ValueError("not a name of a linear")
    return name


Shape = tuple[StrictInt, StrictInt]
Name = Annotated[StrictStr, AfterValidator(linear_name)]


def share(**default: Any) -> Any:
    """A field in [0, 1]."""
    return must("lie in [0, 1]", ge=0, le=1, **default)


def check_shape_and_rank(shape: tuple[int, int], rank: int) -> None:
    """Refuse sizes that no linear can have.

    Raises:
        ValueError: names the value and what is allowed.
    """
    if not all(0 < size <= _MAX_SIZE for size in shape):
        raise ValueError(
            f"shape must be two positive integers up to {_MAX_SIZE}, got {list(shape)}"
        )
    if not 0 <= rank <= min(shape):
        raise ValueError(f"rank must lie in [0, {min(shape)}], got {rank}")


@dataclass(frozen=True, config=CONFIG)
class LinearEntry:
    """The entry of one linear in ``rsparse.json``.

    Attributes:
        shape: (N, K), output and input features of the whole, unsharded linear.
        sparsity: target s of this linear (fraction of the dense bytes not read).
        rho: share of the kept budget that goes to exact channels (1: no factors).
        rank: rank r of the factors; 0 if there are none.
        kept_fraction: fraction of channels kept, counted on the calibration tokens.
        relative_error: ||y_sparse - y|| / ||y|| on the calibration tokens, or None.
        correction: whether the artifact has a constant correction [N] for it.
        full_fraction: where the weight is read in two planes, the fraction of channels
            that are read with both; ``kept_fraction`` is of those with at least one.
    """

    shape: Shape = must("be [N, K], two positive integers")
    sparsity: StrictFloat = share()
    rho: StrictFloat = share()
    rank: StrictInt = must("lie in [0, min(N, K)]")
    kept_fraction: StrictFloat = share()
    relative_error: StrictFloat | None = must("be a number or null", default=None)
    correction: StrictBool = must("be true or false", default=False)
    full_fraction: StrictFloat | None = must(
        "lie in [0, kept_fraction]", default=None, ge=0, le=1
    )

    @model_validator(mode="after")
    def _sizes(self) -> "LinearEntry":
        check_shape_and_rank(self.shape, self.rank)
        if self.full_fraction is None:
            return self
        if self.full_fraction > self.kept_fraction:
            raise ValueError(
                f"full_fraction is {self.full_fraction}, more than kept_fraction,"
                f" {self.kept_fraction}"
            )
        if group_of(self.shape[1]) is None:
            raise ValueError(
                f"full_fraction is for weights in two planes, and {self.shape[1]} input"
                " channels are no multiple of a group"
            )
        return self

    @property
    def read_elements(self) -> float:
        """Weight elements that a decoded token reads: kept columns and both factors."""
        n, k = self.shape
        return self.read_fraction * n * k + self.rank * (n + k)

    @property
    def read_fraction(self) -> float:
        """Share of the weight's bits that a decoded token reads."""
        if self.full_fraction is None:
            return self.kept_fraction
        first, second = plane_bits(self.shape[1])
        bits = first * self.kept_fraction + second * self.full_fraction
        return bits / (first + second)

    def counted(self, kept: Sequence[float]) -> "LinearEntry":
        """The entry with fractions that were counted elsewhere, by plane."""
        full = kept[1] if len(kept) > 1 else None
        return replace(self, kept_fraction=kept[0], full_fraction=full)

    @property
    def dense_elements(self) -> int:
        """Weight elements that the dense layer reads."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, config=CONFIG)
class BaseWeights:
    """How the base model stores the weights that the artifact was made for.

    Attributes:
        format: name of the weight format (``formats``), of most quantized linears where
            they differ.
        dtype: dtype of the weights; once dequantised, if they are quantized.
        group: input channels that share a scale in INT4; 0 if all do, and in the other
            formats.
        zeros: whether INT4 has zero points.
    """

    format: StrictStr = one_of(*WEIGHT_FORMATS)
    dtype: StrictStr = one_of(*DTYPES)
    group: StrictInt = must("be an integer >= 0", default=0, ge=0)
    zeros: StrictBool = must("be true or false", default=False)


@dataclass(frozen=True, config=CONFIG)
class ArtifactInfo:
    """The content of ``rsparse.json``.

    Attributes:
        sparsity: the model-level target the artifact was made for.
        linears: one entry per sparsified linear, in the checkpoint's order.
        dtype: dtype of the factors ("bfloat16", "float16" or "float32").
        tensors_sha256: digest of ``rsparse.safetensors``.
        base: how the base model's weights are stored.
        weights: format that they are quantized to while they load, for calibration and
            for serving; "as-stored" where they are not.
        head: the same for the output layer.
        sparse_head: entry of the output layer where it is sparse, None where it is
            dense. It has thresholds and no factors, and is read whole.
        provenance: how it was made (versions, base model, recipe, texts, seed); free
            form, shown by ``inspect``.
        format_version: of the file that this was read from.
    """

    sparsity: StrictFloat = share()
    linears: dict[Name, LinearEntry] = must("be a non-empty object", min_length=1)
    dtype: StrictStr = one_of(*DTYPES)
    tensors_sha256: StrictStr = sha256()
    base: BaseWeights = must("be an object")
    weights: StrictStr = one_of(AS_STORED, *LOAD_TIME_FORMATS, default=AS_STORED)
    head: StrictStr = one_of(AS_STORED, *HEAD_FORMATS, default=AS_STORED)
    sparse_head: LinearEntry | None = must("be the entry of a linear", default=None)
    provenance: dict[str, Any] = must("be an object", default_factory=dict)
    format_version: StrictInt = must("be an integer", default=FORMAT_VERSION)

    @model_validator(mode="after")
    def _head(self) -> "ArtifactInfo":
        entry = self.sparse_head
        if entry is None:
            return self
        if entry.rank or entry.correction or entry.full_fraction is not None:
            raise ValueError(
                "sparse_head must have rank 0, and neither correction nor full_fraction"
            )
        if self.head in DENSE_HEAD_FORMATS:
            raise ValueError(f"sparse_head needs another head than {self.head}")
        if HEAD in self.linears:
            raise ValueError(f"linears has {HEAD}, which sparse_head describes")
        return self

    @property
    def entries(self) -> dict[str, LinearEntry]:
        """All that is sparse: the linears of the layers, then the output layer."""
        if self.sparse_head is None:
            return self.linears
        return self.linears | {HEAD: self.sparse_head}

    @property
    def head_sparsity(self) -> float:
        """Target of the output layer; 0 where it is dense."""
        return 0.0 if self.sparse_head is None else self.sparse_head.sparsity

    @property
    def served_format(self) -> str:
        """Name of the weight format that the kernels read."""
        return self.base.format if self.weights == AS_STORED else self.weights

    @property
    def achieved_sparsity(self) -> float:
        """Model-level sparsity on the calibration tokens, factors counted."""
        return model_sparsity(self.linears)

    @property
    def bits_read(self) -> float | None:
        """Mean bits that a decoded token reads of a weight; None: not in planes."""
        return bits_read(self.linears)


def model_sparsity(linears: dict[str, LinearEntry]) -> float:
    """1 - (elements a decoded token reads) / (dense elements), over all linears."""
    read = sum(entry.read_elements for entry in linears.values())
    return 1.0 - read / sum(entry.dense_elements for entry in linears.values())


def bits_read(linears: Mapping[str, LinearEntry]) -> float | None:
    """Mean bits per weight that a decoded token reads, scales and zero points included.

    None where the weights are not read in planes.
    """
    bits = 0.0
    for entry in linears.values():
        if entry.full_fraction is None:
            return None
        stored = sum(plane_bits(entry.shape[1]))
        bits += entry.read_fraction * stored * entry.dense_elements
    return bits / sum(entry.dense_elements for entry in linears.values())


def factor_rank(n: int, k: int, sparsity: float, rho: float) -> int:
    """Rank that spends the share 1 - rho of the byte budget (paper section 3.3).

    r = int((1 - rho) (1 - s) N K / (N + K)), with the linear's true N and K: a k or v
    projection under grouped-query attention is narrower than q.
    """
    return int((1.0 - rho) * (1.0 - sparsity) * n * k / (n + k))
