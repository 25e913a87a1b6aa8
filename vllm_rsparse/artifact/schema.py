# SPDX-License-Identifier: Apache-2.0
"""``rsparse.json``: what an artifact says of itself, read and checked. No tensors here.

docs/format.md describes the format, version 1.
"""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from vllm_rsparse.errors import ArtifactError

FORMAT_VERSION = 1
# Beyond any model: features of a linear.
_MAX_SIZE = 1 << 24


@dataclass(frozen=True)
class LinearEntry:
    """What ``rsparse.json`` says of one linear.

    Attributes:
        shape: (N, K), output and input features of the whole, unsharded linear.
        sparsity: target s of this linear (fraction of the dense bytes not read).
        rho: share of the kept budget that goes to exact channels (1: no factors).
        rank: rank r of the factors; 0 when there are none.
        kept_fraction: fraction of channels kept, counted on the calibration tokens.
        relative_error: ||y_sparse - y|| / ||y|| on the calibration tokens, or None.
        bias: whether the artifact holds a constant correction [N] for this linear.
    """

    shape: tuple[int, int]
    sparsity: float
    rho: float
    rank: int
    kept_fraction: float
    relative_error: float | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        n, k = self.shape
        if not (
            _is_int(n) and _is_int(k) and 0 < n <= _MAX_SIZE and 0 < k <= _MAX_SIZE
        ):
            raise ValueError(
                f"shape must be two positive integers up to {_MAX_SIZE},"
                f" got {self.shape}"
            )
        for name in ("sparsity", "rho", "kept_fraction"):
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
        if not _is_int(self.rank) or not 0 <= self.rank <= min(n, k):
            raise ValueError(f"rank must lie in [0, {min(n, k)}], got {self.rank!r}")
        if self.relative_error is not None and not _is_number(self.relative_error):
            raise ValueError(
                f"relative_error must be a number or null, got {self.relative_error!r}"
            )
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias must be true or false, got {self.bias!r}")

    @property
    def read_elements(self) -> float:
        """Weight elements one decoded token reads: kept columns and both factors."""
        n, k = self.shape
        return self.kept_fraction * n * k + self.rank * (n + k)

    @property
    def dense_elements(self) -> int:
        """Weight elements the dense layer reads."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class ArtifactInfo:
    """The content of ``rsparse.json``.

    Attributes:
        sparsity: the model-level target the artifact was made for.
        linears: one entry per sparsified linear, in the checkpoint's order.
        dtype: dtype of the factors ("bfloat16", "float16" or "float32").
        tensors_sha256: digest of ``rsparse.safetensors``.
        provenance: how it was made (versions, base model, recipe, texts, seed); free
            form, for people and for ``inspect``.
    """

    sparsity: float
    linears: dict[str, LinearEntry]
    dtype: str
    tensors_sha256: str
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def achieved_sparsity(self) -> float:
        """Model-level sparsity on the calibration tokens, factors counted."""
        return model_sparsity(self.linears)

    def to_json(self) -> str:
        """Serialise; ``from_json`` reads it back to an equal object."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "ArtifactInfo":
        """Parse and validate.

        Args:
            text: content of ``rsparse.json``.
            where: path shown in errors.

        Raises:
            ArtifactError: not JSON, unknown or missing keys, values out of range.
        """
        try:
            raw = json.loads(text)
        # ValueError: also an integer of thousands of digits.
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(raw, dict):
            raise ArtifactError(f"{where}: expected a JSON object, got {_kind(raw)}")
        version = raw.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ArtifactError(
                f"{where}: format_version is {version!r}, this release of vllm-rsparse"
                f" reads {FORMAT_VERSION}; prepare the model again with it or install"
                " the release that wrote it"
            )
        _check_keys(raw, cls, where)
        linears = raw["linears"]
        if not isinstance(linears, dict) or not linears:
            raise ArtifactError(f"{where}: `linears` must be a non-empty object")
        if not isinstance(raw.get("provenance", {}), dict):
            raise ArtifactError(f"{where}: `provenance` must be an object")
        if raw["dtype"] not in ("bfloat16", "float16", "float32"):
            raise ArtifactError(
                f"{where}: dtype {raw['dtype']!r} is none of bfloat16, float16, float32"
            )
        sparsity = raw["sparsity"]
        if not _is_number(sparsity) or not 0 <= sparsity <= 1:
            raise ArtifactError(
                f"{where}: sparsity must lie in [0, 1], got {sparsity!r}"
            )
        if not isinstance(raw["tensors_sha256"], str):
            raise ArtifactError(f"{where}: `tensors_sha256` must be a string")
        entries: dict[str, LinearEntry] = {}
        for name, values in linears.items():
            here = f"{where}: linears[{name!r}]"
            # Names are printed: no control characters for somebody's terminal.
            if not name.isprintable() or not name or " " in name:
                raise ArtifactError(f"{here}: not a name of a linear")
            if not isinstance(values, dict):
                raise ArtifactError(f"{here}: expected an object, got {_kind(values)}")
            _check_keys(values, LinearEntry, here)
            shape = values["shape"]
            if not isinstance(shape, list) or len(shape) != 2:
                raise ArtifactError(f"{here}: shape must be [N, K], got {shape!r}")
            try:
                entries[name] = LinearEntry(**{**values, "shape": tuple(shape)})
            except (TypeError, ValueError) as error:
                raise ArtifactError(f"{here}: {error}") from error
        return cls(**{**raw, "linears": entries})


def model_sparsity(linears: dict[str, LinearEntry]) -> float:
    """1 - (elements a decoded token reads) / (dense elements), over all linears."""
    read = sum(entry.read_elements for entry in linears.values())
    return 1.0 - read / sum(entry.dense_elements for entry in linears.values())


def factor_rank(n: int, k: int, sparsity: float, rho: float) -> int:
    """Rank that spends the share 1 - rho of the byte budget (paper section 3.3).

    r = int((1 - rho) (1 - s) N K / (N + K)), with the linear's true N and K: a k or v
    projection under grouped-query attention is narrower than q.
    """
    return int((1.0 - rho) * (1.0 - sparsity) * n * k / (n + k))


def _is_int(value: object) -> bool:
    """A bool, which JSON tells apart and Python counts as an int, is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_int(value)


def _kind(value: object) -> str:
    return type(value).__name__


def _check_keys(raw: dict[str, Any], cls: type, where: str) -> None:
    known = {f.name: f for f in fields(cls)}
    for key in raw:
        if key not in known:
            raise ArtifactError(
                f"{where}: unknown key {key!r}; known are {', '.join(known)}"
            )
    for name, f in known.items():
        required = f.default is MISSING and f.default_factory is MISSING
        if required and name not in raw:
            raise ArtifactError(f"{where}: key {name!r} is missing")
