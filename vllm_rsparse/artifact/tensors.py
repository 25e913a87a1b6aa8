# SPDX-License-Identifier: Apache-2.0
"""The prepared artifact on disk: read, validate, slice for a shard. No vLLM here.

docs/format.md describes the format. DIR/rsparse.json has provenance and one entry per
linear (LinearEntry); DIR/rsparse.safetensors has, for each linear::

    NAME.thresholds   float32 [K]             ([2, K] for weights in two planes)
    NAME.u            weight's dtype [N, r]   (absent when r = 0)
    NAME.v            weight's dtype [r, K]   (absent when r = 0)
    NAME.correction   float32 [N]             (only when used; version 1: NAME.bias)
    NAME.scales       float32 [N]             (only if weights are made while loading)

NAME is the linear's name in the Hugging Face checkpoint; a sparse output layer is
``lm_head`` and has thresholds only. Both files are data only;
everything is checked against the file's header before any tensor is read.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_rsparse.artifact.schema import FORMAT_VERSION, LinearEntry
from vllm_rsparse.artifact.versions import CORRECTION_SUFFIX, read_info
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.formats.registry import format_of_name, load_time_format
from vllm_rsparse.model.names import HEAD
from vllm_rsparse.validation import reason

ARTIFACT_DIR = "rsparse"
JSON_NAME = "rsparse.json"
TENSORS_NAME = "rsparse.safetensors"
_FLOAT_DTYPES = ("F32", "F16", "BF16")
# Beyond any model's JSON, which takes 400 bytes per linear.
_MAX_JSON_BYTES = 1 << 26


@dataclass(frozen=True)
class LinearTensors:
    """Tensors of one linear, or of one tensor-parallel slice of it.

    Attributes:
        thresholds: float32 [K]; [P, K] for a weight that is read in P planes.
        u: [N, r], or None when r = 0.
        v: [r, K], or None when r = 0.
        correction: float32 [N], a constant for the sparse route, or None.
    """

    thresholds: Tensor
    u: Tensor | None = None
    v: Tensor | None = None
    correction: Tensor | None = None

    def named(self, name: str) -> dict[str, Tensor]:
        """Those that there are, by their names in an artifact.

        Args:
            name: of the linear.
        """
        tensors = {
            "thresholds": self.thresholds,
            "u": self.u,
            "v": self.v,
            CORRECTION_SUFFIX[FORMAT_VERSION]: self.correction,
        }
        return {f"{name}.{key}": t for key, t in tensors.items() if t is not None}


class Artifact:
    """An opened artifact directory. Headers are validated here, tensors read on demand.

    Args:
        directory: the directory of the two files.

    Raises:
        ArtifactError: a file is missing or damaged, or the two do not match.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.json_path = self.directory / JSON_NAME
        self.tensors_path = self.directory / TENSORS_NAME
        try:
            text = _read_text(self.json_path)
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"{self.json_path}: cannot be read ({reason(error)}); an artifact is a"
                f" directory with {JSON_NAME} and {TENSORS_NAME}, written by"
                " `vllm-rsparse prepare`"
            ) from error
        self.info = read_info(text, str(self.json_path))
        self._validate_tensors()

    @cached_property
    def sha256(self) -> str:
        """Digest of the tensor file as it is on disk now (read once, then cached)."""
        return file_sha256(self.tensors_path)

    def verify_digest(self, expected: str | None = None) -> None:
        """Compare the tensor file with the digest in the config and the JSON.

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
            ArtifactError: the name is unknown, or the tensors contain NaN.
        """
        entry = self.entry(name)
        with safe_open(self.tensors_path, framework="pt") as tensors:
            wanted = columns if entry.full_fraction is None else (slice(None), columns)
            thresholds = tensors.get_slice(f"{name}.thresholds")[wanted]
            u = v = correction = None
            if entry.rank > 0:
                u = tensors.get_slice(f"{name}.u")[rows]
                v = tensors.get_slice(f"{name}.v")[:, columns]
            if entry.correction:
                correction = tensors.get_slice(self._correction(name))[rows]
        if torch.isnan(thresholds).any():
            raise ArtifactError(
                f"{self.tensors_path}: {name}.thresholds contains NaN; prepare again"
            )
        if thresholds.dim() > 1 and (thresholds[0] > thresholds[1]).any():
            raise ArtifactError(
                f"{self.tensors_path}: {name}.thresholds has a channel whose second"
                " plane is read where the first is not; prepare again"
            )
        others = {f"{name}.u": u, f"{name}.v": v, self._correction(name): correction}
        for key, tensor in others.items():
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ArtifactError(
                    f"{self.tensors_path}: {key} contains NaN or infinity; prepare"
                    " again"
                )
        return LinearTensors(thresholds, u, v, correction)

    def read_scales(self, name: str, rows: slice = slice(None)) -> Tensor | None:
        """The scales that a linear's weight is quantized with while it loads.

        Args:
            name: the linear's name.
            rows: output features of this rank.

        Returns:
            float32 [N]; None where the artifact has none, because the weights are
            served as they are stored or need none.

        Raises:
            ArtifactError: the name is unknown, or a scale is not a positive number.
        """
        self.entry(name)
        if not self.has_scales or name == HEAD:
            return None
        key = scales_name(name)
        with safe_open(self.tensors_path, framework="pt") as tensors:
            scales = tensors.get_slice(key)[rows]
        if not (scales.isfinite() & (scales > 0)).all():
            raise ArtifactError(
                f"{self.tensors_path}: {key} has values that are not positive numbers;"
                " prepare again"
            )
        return scales

    @property
    def planes(self) -> int:
        """Planes in which the weights are read; each has a row of thresholds."""
        return format_of_name(self.info.served_format).planes

    @property
    def has_scales(self) -> bool:
        """Whether it has scales of weights that are quantized while they load."""
        load_time = load_time_format(self.info.weights)
        return load_time is not None and load_time.artifact_scales

    def entry(self, name: str) -> LinearEntry:
        """The JSON entry of a linear; ArtifactError if there is none."""
        try:
            return self.info.entries[name]
        except KeyError:
            raise ArtifactError(
                f"{self.json_path}: no linear named {name!r}; it has"
                f" {len(self.info.linears)}, the first is"
                f" {next(iter(self.info.linears))!r}"
            ) from None

    def _correction(self, name: str) -> str:
        return f"{name}.{CORRECTION_SUFFIX[self.info.format_version]}"

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
            if (entry.full_fraction is None) != (self.planes == 1):
                state = "lacks" if entry.full_fraction is None else "has"
                raise ArtifactError(
                    f"{self.json_path}: {name} {state} full_fraction, but the weights"
                    f" are {self.info.served_format}; prepare the model again"
                )
            rows = [] if self.planes == 1 else [self.planes]
            expected[f"{name}.thresholds"] = ([*rows, k], ("F32",))
            if entry.rank > 0:
                expected[f"{name}.u"] = ([n, entry.rank], _FLOAT_DTYPES)
                expected[f"{name}.v"] = ([entry.rank, k], _FLOAT_DTYPES)
            if entry.correction:
                expected[self._correction(name)] = ([n], ("F32",))
            if self.has_scales:
                expected[scales_name(name)] = ([n], ("F32",))
        if self.info.sparse_head is not None:
            k = self.info.sparse_head.shape[1]
            expected[f"{HEAD}.thresholds"] = ([k], ("F32",))
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


def scales_name(linear: str) -> str:
    """The tensor with the scales of a linear's weight."""
    return f"{linear}.scales"


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
    """A library's message; text that it quotes must not control a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(error))
