# SPDX-License-Identifier: Apache-2.0
"""The prepared artifact on disk: read, validate, slice for a shard. No vLLM here.

Format version 1 (docs/format.md). DIR/rsparse.json holds provenance and one entry per
linear (LinearEntry); DIR/rsparse.safetensors holds, for each linear::

    NAME.thresholds   float32 [K]
    NAME.u            weight's dtype [N, r]   (absent when r = 0)
    NAME.v            weight's dtype [r, K]   (absent when r = 0)
    NAME.bias         float32 [N]             (only when used)

NAME is the linear's name in the Hugging Face checkpoint. Both files are data only;
everything is checked against the file's header before any tensor is read.
"""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT_VERSION = 1
ARTIFACT_DIR = "rsparse"
JSON_NAME = "rsparse.json"
TENSORS_NAME = "rsparse.safetensors"
_FLOAT_DTYPES = ("F32", "F16", "BF16")
# Beyond any model: features of a linear, and bytes of the JSON (400 bytes a linear).
_MAX_SIZE = 1 << 24
_MAX_JSON_BYTES = 1 << 26


class ArtifactError(ValueError):
    """An artifact that cannot be used; the message names the file and what to do."""


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


@dataclass(frozen=True)
class LinearTensors:
    """Tensors of one linear, or of one tensor-parallel slice of it, on the CPU.

    Attributes:
        thresholds: float32 [K].
        u: [N, r], or None when r = 0.
        v: [r, K], or None when r = 0.
        bias: float32 [N] constant correction, or None.
    """

    thresholds: Tensor
    u: Tensor | None
    v: Tensor | None
    bias: Tensor | None


class Artifact:
    """An opened artifact directory. Headers are validated here, tensors read on demand.

    Args:
        directory: the directory that holds the two files.

    Raises:
        ArtifactError: a file is missing or damaged, or the two do not fit together.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.json_path = self.directory / JSON_NAME
        self.tensors_path = self.directory / TENSORS_NAME
        try:
            text = _read_text(self.json_path)
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"{self.json_path}: cannot be read ({error}); an artifact is a"
                f" directory with {JSON_NAME} and {TENSORS_NAME}, written by"
                " `vllm-rsparse prepare`"
            ) from error
        self.info = ArtifactInfo.from_json(text, str(self.json_path))
        self._validate_tensors()

    @cached_property
    def sha256(self) -> str:
        """Digest of the tensor file as it is on disk now (read once, then cached)."""
        return file_sha256(self.tensors_path)

    def verify_digest(self, expected: str | None = None) -> None:
        """Compare the tensor file with the digest that config and JSON promise.

        Args:
            expected: digest from the model's config; None checks the JSON's own.

        Raises:
            ArtifactError: the file differs from what was prepared.
        """
        for source, digest in (
            (str(self.json_path), self.info.tensors_sha256),
            ("config.json: quantization_config.artifact_sha256", expected),
        ):
            if digest is not None and digest != self.sha256:
                raise ArtifactError(
                    f"{self.tensors_path}: sha256 is {self.sha256}, but {source} says"
                    f" {digest}; the file was changed or copied incompletely: copy it"
                    " again or prepare the model again"
                )

    def read(
        self,
        name: str,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> LinearTensors:
        """Read one linear, or a tensor-parallel slice; only those bytes are read.

        Args:
            name: the linear's name.
            rows: output features of this rank (column-parallel layers).
            columns: input channels of this rank (row-parallel layers).

        Raises:
            ArtifactError: the name is unknown, or thresholds hold NaN.
        """
        entry = self.entry(name)
        with safe_open(self.tensors_path, framework="pt") as tensors:
            thresholds = tensors.get_slice(f"{name}.thresholds")[columns]
            u = v = bias = None
            if entry.rank > 0:
                u = tensors.get_slice(f"{name}.u")[rows]
                v = tensors.get_slice(f"{name}.v")[:, columns]
            if entry.bias:
                bias = tensors.get_slice(f"{name}.bias")[rows]
        if torch.isnan(thresholds).any():
            raise ArtifactError(
                f"{self.tensors_path}: {name}.thresholds holds NaN; prepare again"
            )
        for label, tensor in (("u", u), ("v", v), ("bias", bias)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ArtifactError(
                    f"{self.tensors_path}: {name}.{label} holds NaN or infinity;"
                    " prepare again"
                )
        return LinearTensors(thresholds, u, v, bias)

    def entry(self, name: str) -> LinearEntry:
        """The JSON entry of a linear; ArtifactError where there is none."""
        try:
            return self.info.linears[name]
        except KeyError:
            raise ArtifactError(
                f"{self.json_path}: no linear named {name!r}; it has"
                f" {len(self.info.linears)}, the first is"
                f" {next(iter(self.info.linears))!r}"
            ) from None

    def _validate_tensors(self) -> None:
        try:
            with safe_open(self.tensors_path, framework="pt") as tensors:
                found = {
                    key: (
                        tensors.get_slice(key).get_shape(),
                        tensors.get_slice(key).get_dtype(),
                    )
                    for key in tensors.keys()  # noqa: SIM118 (not a mapping)
                }
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{self.tensors_path}: cannot be read as safetensors"
                f" ({_printable(error)}); copy it"
                " again or prepare the model again"
            ) from error
        expected: dict[str, tuple[list[int], tuple[str, ...]]] = {}
        for name, entry in self.info.linears.items():
            n, k = entry.shape
            expected[f"{name}.thresholds"] = ([k], ("F32",))
            if entry.rank > 0:
                expected[f"{name}.u"] = ([n, entry.rank], _FLOAT_DTYPES)
                expected[f"{name}.v"] = ([entry.rank, k], _FLOAT_DTYPES)
            if entry.bias:
                expected[f"{name}.bias"] = ([n], ("F32",))
        for key, (shape, dtypes) in expected.items():
            if key not in found:
                raise ArtifactError(
                    f"{self.tensors_path}: tensor {key!r} is missing, although"
                    f" {JSON_NAME} lists its linear"
                )
            if found[key][0] != shape or found[key][1] not in dtypes:
                raise ArtifactError(
                    f"{self.tensors_path}: {key} is {found[key][1]} {found[key][0]},"
                    f" expected {' or '.join(dtypes)} {shape}"
                )
        for key in found.keys() - expected.keys():
            raise ArtifactError(
                f"{self.tensors_path}: tensor {key!r} belongs to no linear listed in"
                f" {JSON_NAME}"
            )


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


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ArtifactError(
            f"{path}: {size} bytes, no artifact's has more than {_MAX_JSON_BYTES};"
            " prepare the model again"
        )
    return path.read_text(encoding="utf-8")


def _printable(error: Exception) -> str:
    """A library's message; what it quotes of the file must not steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(error))


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
