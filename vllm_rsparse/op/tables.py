# SPDX-License-Identifier: Apache-2.0
"""Files of launch configurations, one per device: format, reading, writing, places.

``vllm-rsparse bench --tune`` writes them::

    {"device": "NVIDIA H200", ...,
     "entries": [{"n": 4096, "k": 4096, "dtype": "int4", "group": 128, "tokens": 1,
                  "config": {"block_n": 256, ...}, "sparse_us": 7.1, "dense_us": 8.5}]}

A device's table in the user's folder, ``VLLM_RSPARSE_TUNING_DIR`` or
``~/.cache/vllm_rsparse/tuning``, precedes the one shipped in ``configs/``.
"""

import dataclasses
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, StrictBool, StrictFloat, StrictInt, StrictStr
from pydantic.dataclasses import dataclass

from vllm_rsparse import envs
from vllm_rsparse.errors import RSparseError
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.formats.fp8_block import FP8_BLOCK
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.formats.int8_planes import INT8_PLANES
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.validation import CONFIG, must, one_of, read_json, validate

SHIPPED = Path(__file__).parent / "configs"
_REMEDY = "; write the table again with `vllm-rsparse bench --tune`"
# Routes that entries are for.
SPARSE, DENSE = "sparse", "dense"
# Kinds that only the packed kernel reads, and those that it can read.
PACKED_ONLY = (INT4.name, INT8_PLANES.name, FP8_BLOCK.name)
PACKABLE = (*PACKED_ONLY, FP8.kind(torch.float8_e4m3fn))


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a launch configuration is chosen for, besides the number of tokens.

    Attributes:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: ``StoredWeight.kind``, which tables have as ``dtype``.
        group: input channels that share a scale, as in ``StoredWeight``.
    """

    n: int
    k: int
    kind: str
    group: int = 0

    @classmethod
    def of(cls, weight: StoredWeight) -> "Problem":
        """What a weight asks for."""
        return cls(weight.n, weight.k, weight.kind, weight.group)


@dataclasses.dataclass(frozen=True)
class TunedEntry:
    """One entry of a device's table: the fastest configuration and its measurement.

    ``sparse_us`` is for 50% kept channels per token and independent masks, or for the
    whole weight on the dense route; ``dense_us`` is the dense product of the format in
    the same run (``bench.baselines``).
    """

    n: int
    k: int
    dtype: str
    tokens: int
    config: LaunchConfig
    sparse_us: float
    dense_us: float
    group: int = 0
    route: str = SPARSE

    @property
    def problem(self) -> Problem:
        """What it was tuned for."""
        return Problem(self.n, self.k, self.dtype, self.group)


@dataclasses.dataclass(frozen=True)
class Table:
    """The entries of a file."""

    path: Path
    entries: tuple[TunedEntry, ...]


class TableError(RSparseError):
    """A table of launch configurations that cannot be used."""


@dataclass(frozen=True, config=CONFIG)
class _ConfigFile:
    block_n: StrictInt = must("be an integer")
    block_k: StrictInt = must("be an integer")
    split_k: StrictInt = must("be an integer")
    num_warps: StrictInt = must("be an integer")
    num_stages: StrictInt = must("be an integer")
    use_dot: StrictBool = must("be true or false")
    listed: StrictBool = must("be true or false")
    # Tables from before there was a packed kernel do not have it.
    packed: StrictBool = False


@dataclass(frozen=True, config=CONFIG)
class _EntryFile:
    n: StrictInt = must("be an integer >= 1", ge=1)
    k: StrictInt = must("be an integer >= 1", ge=1)
    dtype: StrictStr = must("be a string")
    tokens: StrictInt = must("be an integer >= 1", ge=1)
    config: _ConfigFile = must("be an object")
    sparse_us: StrictFloat = must("be a number")
    dense_us: StrictFloat = must("be a number")
    group: StrictInt = must("be an integer >= 0", ge=0, default=0)
    route: StrictStr = one_of(SPARSE, DENSE, default=SPARSE)


# Besides the entries a table has what it was measured on, for people.
@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class _TableFile:
    entries: list[_EntryFile] = must("be a list")


def user_directory() -> Path:
    """The folder whose tables precede the shipped ones; it need not exist."""
    named = envs.tuning_directory()
    return envs.cache_directory() / "tuning" if named is None else named


def table_path(directory: Path, device_name: str) -> Path:
    """Path of a device's table: ``NVIDIA H200`` -> ``NVIDIA_H200.json``."""
    return directory / (re.sub(r"[^A-Za-z0-9.-]+", "_", device_name) + ".json")


def find_tables(device_name: str) -> list[Path]:
    """The tables that there are for a device; the first one that has a shape wins.

    Raises:
        TableError: ``VLLM_RSPARSE_TUNING_DIR`` names no folder.
    """
    named = envs.tuning_directory()
    if named is not None and not named.is_dir():
        raise TableError(
            f"{envs.TUNING_DIR} is {str(named)!r}, which is not a folder; name the"
            " folder that `vllm-rsparse bench --tune --output` wrote, or unset it"
        )
    places = (user_directory(), SHIPPED)
    paths = [table_path(place, device_name) for place in places]
    return [path for path in paths if path.exists()]


def read_table(path: Path) -> list[TunedEntry]:
    """Read a device's table.

    Raises:
        TableError: the file is not such a table; names the file and the fault.
    """
    raw = read_json(path, TableError, _REMEDY)
    table = validate(_TableFile, raw, str(path), TableError, _REMEDY)
    entries = []
    for index, entry in enumerate(table.entries):
        values = asdict(entry)
        try:
            config = LaunchConfig(**values.pop("config"))
            _check_kernel(config, entry.dtype, entry.route)
        except ValueError as error:
            where = f"{path}: entries[{index}].config"
            raise TableError(f"{where}: {error}{_REMEDY}") from error
        entries.append(TunedEntry(config=config, **values))
    return entries


def _check_kernel(config: LaunchConfig, kind: str, route: str) -> None:
    """Refuse a kernel that does not read weights of this kind.

    Raises:
        ValueError: names the kind.
    """
    if route == DENSE:
        if kind not in PACKABLE or config.packed == config.use_dot:
            raise ValueError(
                f"the dense route has kernels for {', '.join(PACKABLE)}, with either"
                f" packed or use_dot; got {kind}"
            )
        return
    if kind in PACKED_ONLY and not config.packed:
        raise ValueError(f"packed must be true for {kind}")
    if config.packed and kind not in PACKABLE:
        raise ValueError(f"packed must be false for {kind}")


def write_table(
    path: Path, entries: list[TunedEntry], provenance: dict[str, Any]
) -> None:
    """Write a device's table, sorted, one entry per line, for readable diffs."""
    ordered = sorted(
        entries, key=lambda e: (e.dtype, e.group, e.n, e.k, e.route, e.tokens)
    )
    facts = "".join(
        f"  {json.dumps(key)}: {json.dumps(value)},\n"
        for key, value in provenance.items()
    )
    lines = ",\n".join("    " + json.dumps(asdict(entry)) for entry in ordered)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n{facts}  "entries": [\n{lines}\n  ]\n}}\n')
