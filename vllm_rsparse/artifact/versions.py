# SPDX-License-Identifier: Apache-2.0
"""All versions of ``rsparse.json``: one reader per version, one writer.

The schema of an older version never changes; its reader returns the objects that the
package works with today (``schema``). docs/format.md lists the differences.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr, model_validator
from pydantic.dataclasses import dataclass

from vllm_rsparse.artifact.schema import (
    DTYPES,
    FORMAT_VERSION,
    ArtifactInfo,
    BaseWeights,
    LinearEntry,
    Name,
    Shape,
    check_shape_and_rank,
    share,
)
from vllm_rsparse.errors import ArtifactError, RSparseError
from vllm_rsparse.formats.names import AS_STORED
from vllm_rsparse.validation import (
    CONFIG,
    must,
    one_of,
    parse_json,
    sha256,
    shown,
    validate,
)

# Suffix of the constant's tensor: NAME.bias, NAME.correction.
CORRECTION_SUFFIX = {1: "bias", 2: "correction"}


@dataclass(frozen=True, config=CONFIG)
class LinearEntryV1:
    """An entry of version 1: the constant correction is called ``bias``."""

    shape: Shape = must("be [N, K], two positive integers")
    sparsity: StrictFloat = share()
    rho: StrictFloat = share()
    rank: StrictInt = must("lie in [0, min(N, K)]")
    kept_fraction: StrictFloat = share()
    relative_error: StrictFloat | None = must("be a number or null", default=None)
    bias: StrictBool = must("be true or false", default=False)

    @model_validator(mode="after")
    def _sizes(self) -> "LinearEntryV1":
        check_shape_and_rank(self.shape, self.rank)
        return self


@dataclass(frozen=True, config=CONFIG)
class ArtifactInfoV1:
    """Version 1: no entry for the base's weights, which were always floats."""

    format_version: StrictInt = must("be 1")
    sparsity: StrictFloat = share()
    linears: dict[Name, LinearEntryV1] = must("be a non-empty object", min_length=1)
    dtype: StrictStr = one_of(*DTYPES)
    tensors_sha256: StrictStr = sha256()
    provenance: dict[str, Any] = must("be an object", default_factory=dict)


def _read_v1(raw: dict[str, Any], where: str) -> ArtifactInfo:
    old = validate(ArtifactInfoV1, raw, where, ArtifactError)
    linears = {}
    for name, entry in old.linears.items():
        values = asdict(entry)
        linears[name] = LinearEntry(correction=values.pop("bias"), **values)
    return ArtifactInfo(
        sparsity=old.sparsity,
        linears=linears,
        dtype=old.dtype,
        tensors_sha256=old.tensors_sha256,
        base=BaseWeights("float", old.dtype),
        provenance=old.provenance,
        format_version=1,
    )


def _read_v2(raw: dict[str, Any], where: str) -> ArtifactInfo:
    return validate(ArtifactInfo, raw, where, ArtifactError)


_READERS: dict[int, Callable[[dict[str, Any], str], ArtifactInfo]] = {
    1: _read_v1,
    2: _read_v2,
}


def read_info(text: str, where: str) -> ArtifactInfo:
    """Parse and validate ``rsparse.json`` of any version.

    Args:
        text: its content.
        where: path shown in errors.

    Raises:
        ArtifactError: not JSON, a version of a later release, unknown or missing keys,
            values out of range.
    """
    raw = parse_json(text, where, ArtifactError)
    if not isinstance(raw, dict):
        raise ArtifactError(f"{where}: expected a JSON object, got {_kind(raw)}")
    version = known_version(raw.get("format_version"), _READERS, where, ArtifactError)
    return _READERS[version](raw, where)


def write_info(info: ArtifactInfo) -> str:
    """Content of ``rsparse.json``, in the newest version; ``read_info`` reads it."""
    raw = asdict(info) | {"format_version": FORMAT_VERSION}
    # Most have no group, or no zero points.
    raw["base"] = {key: value for key, value in raw["base"].items() if value}
    for key in ("weights", "head"):
        if raw[key] == AS_STORED:
            del raw[key]
    entries = [*raw["linears"].values()]
    if raw["sparse_head"] is None:
        del raw["sparse_head"]
    else:
        entries.append(raw["sparse_head"])
    for entry in entries:
        if entry["full_fraction"] is None:
            del entry["full_fraction"]
    return json.dumps(raw, indent=1) + "\n"


def known_version(
    version: object, known: dict[int, Any], where: str, error: type[RSparseError]
) -> int:
    """Check that this release reads a ``format_version``.

    Args:
        version: the file's version.
        known: the versions with a reader.
        where: file or parameter, for messages.
        error: class of the error to raise.

    Raises:
        RSparseError: of the given class: the version is not known.
    """
    # JSON distinguishes booleans, but to Python a bool is an int: True == 1.
    if type(version) is not int or version not in known:
        raise error(
            f"{where}: format_version is {shown(version)}, this release of vllm-rsparse"
            f" reads {' and '.join(map(str, known))}; install the release that wrote"
            " it, or prepare the model again with this one"
        )
    return version


def _kind(value: object) -> str:
    return type(value).__name__
