# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the Triton kernels: tuned table first, heuristic otherwise.

``configs/<device>.json`` contains the results of ``vllm-rsparse bench --tune``::

    {"device": "NVIDIA H200", ...,
     "entries": [{"n": 4096, "k": 4096, "dtype": "bfloat16", "tokens": 1,
                  "config": {"block_n": 32, ...}, "sparse_us": 7.1, "dense_us": 13.5}]}

Nothing is tuned while serving: a lookup is a dictionary access.
"""

import dataclasses
import json
import logging
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, StrictBool, StrictFloat, StrictInt, StrictStr
from pydantic.dataclasses import dataclass

from vllm_rsparse.errors import RSparseError
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.validation import CONFIG, must, parse_json, validate

logger = logging.getLogger(__name__)

CONFIG_DIR = Path(__file__).parent / "configs"

# Up to this many tokens the vector units keep up with memory; beyond it the matrix
# units win (H200, kernels/README.md).
VECTOR_TOKENS = 2
# Columns of a program of the packed kernel: 16 bytes a thread, 8 threads a row.
_PACKED_COLUMNS = {
    "int4": 256,
    "int8-planes": 256,
    "float8_e4m3fn": 128,
    "fp8-block": 128,
}
_FOUR_BIT = ("int4", "int8-planes")
# Up to this many elements the packed kernel takes blocks of 64 channels, not 128.
_SMALL_ELEMENTS = 40 * 10**6
# Tokens up to which the packed kernel reads a whole weight fastest, and up to which a
# kernel that widens tiles does; beyond, the weight is widened once for the library.
_PACKED_DENSE_TOKENS = 16
DENSE_TOKENS = 64
# Layers of this many elements are listed by default, as most of them were on the H200.
_LISTED_ELEMENTS = 80 * 2**20
# Multiprocessors of an H100 and an H200. Defaults fit this number and are scaled.
_PROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class TunedEntry:
    """One entry of a device's table: the fastest configuration and its measurement.

    ``sparse_us`` is for 50% kept channels per token and independent masks; ``dense_us``
    is the device's own dense kernel in the same run.
    """

    n: int
    k: int
    dtype: str
    tokens: int
    config: LaunchConfig
    sparse_us: float
    dense_us: float


@dataclasses.dataclass(frozen=True)
class Device:
    """What a launch configuration depends on.

    Attributes:
        name: as ``torch.cuda.get_device_name`` reports it.
        processors: multiprocessors.
    """

    name: str
    processors: int


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


# Besides the entries a table has what it was measured on, for people.
@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class _TableFile:
    entries: list[_EntryFile] = must("be a list")


def config_path(device_name: str) -> Path:
    """Path of a device's table: ``NVIDIA H200`` -> ``NVIDIA_H200.json``."""
    return CONFIG_DIR / (re.sub(r"[^A-Za-z0-9.-]+", "_", device_name) + ".json")


def read_table(path: Path) -> list[TunedEntry]:
    """Read a device's table.

    Raises:
        TableError: the file is not such a table; names the file and the fault.
    """
    remedy = "; write the table again with `vllm-rsparse bench --tune`"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: cannot be read ({error}){remedy}") from error
    raw = parse_json(text, str(path), TableError)
    table = validate(_TableFile, raw, str(path), TableError, remedy)
    entries = []
    for index, entry in enumerate(table.entries):
        values = asdict(entry)
        try:
            config = LaunchConfig(**values.pop("config"))
        except ValueError as error:
            where = f"{path}: entries[{index}].config"
            raise TableError(f"{where}: {error}{remedy}") from error
        entries.append(TunedEntry(config=config, **values))
    return entries


def write_table(
    path: Path, entries: list[TunedEntry], provenance: dict[str, Any]
) -> None:
    """Write a device's table, sorted, one entry per line, for readable diffs."""
    ordered = sorted(entries, key=lambda e: (e.dtype, e.n, e.k, e.tokens))
    facts = "".join(
        f"  {json.dumps(key)}: {json.dumps(value)},\n"
        for key, value in provenance.items()
    )
    lines = ",\n".join("    " + json.dumps(asdict(entry)) for entry in ordered)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{\n{facts}  "entries": [\n{lines}\n  ]\n}}\n')


@cache
def device_table(device_name: str) -> tuple[TunedEntry, ...]:
    """The table shipped for a device; empty if there is none."""
    path = config_path(device_name)
    return tuple(read_table(path)) if path.exists() else ()


@cache
def device_of(device: torch.device) -> Device:
    """The device that kernels run on; an H200 stands for Triton's interpreter."""
    if device.type != "cuda":
        return Device("interpreter", _PROCESSORS)
    properties = torch.cuda.get_device_properties(device)
    return Device(torch.cuda.get_device_name(device), properties.multi_processor_count)


@cache
def launch_config(
    device: Device, n: int, k: int, kind: str, tokens: int
) -> LaunchConfig:
    """The configuration for a shape: the tuned one of the nearest number of tokens.

    Args:
        device: where the kernels run.
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: ``StoredWeight.kind``, which tables have as ``dtype``.
        tokens: rows of the call.
    """
    candidates = [
        entry
        for entry in device_table(device.name)
        if (entry.n, entry.k, entry.dtype) == (n, k, kind)
        and (entry.config.use_dot or entry.config.packed or tokens <= VECTOR_TOKENS)
    ]
    if candidates:
        return min(candidates, key=lambda entry: abs(entry.tokens - tokens)).config
    _log_untuned(device.name)
    vector = kind == "float8_e4m3fn" and tokens <= VECTOR_TOKENS
    if kind in _PACKED_COLUMNS and not vector:
        return packed_config(n, k, kind, device.processors)
    return default_config(n, k, tokens, device.processors)


def packed_config(n: int, k: int, kind: str, processors: int) -> LaunchConfig:
    """A configuration of the sparse route for int4 and fp8, from what won on the H100.

    A program is one warp. Registers allow 12 of them per multiprocessor and 6 are
    enough; a layer that would have fewer is divided into shorter blocks of channels.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: of the weight.
        processors: multiprocessors of the device.
    """
    block_n = _PACKED_COLUMNS[kind]
    block_k = 64 if n * k < _SMALL_ELEMENTS else 128
    enough = 800 * processors // _PROCESSORS
    split_k = _even_splits(-(-n // block_n), -(-k // block_k), enough)
    return LaunchConfig(block_n, block_k, split_k, 1, 1, False, packed=True)


def dense_config(
    n: int, k: int, kind: str, tokens: int, processors: int
) -> LaunchConfig:
    """A configuration of the dense route for int4 and fp8, from what won on the H100.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        kind: of the weight.
        tokens: rows of the call, at most ``DENSE_TOKENS``.
        processors: multiprocessors of the device.
    """
    if tokens <= _PACKED_DENSE_TOKENS:
        # Fewer columns with more tokens: registers hold the sums of both.
        block_n = _PACKED_COLUMNS[kind] // (2 if kind in _FOUR_BIT else 1)
        block_n //= 2 if tokens > 8 else 1
        enough = 1500 * processors // _PROCESSORS
        split_k = _even_splits(-(-n // block_n), -(-k // 128), enough)
        stages = 4 if kind in _FOUR_BIT else 2
        return LaunchConfig(block_n, 128, split_k, 1, stages, False, packed=True)
    split_k = 1
    enough = 380 * processors // _PROCESSORS
    while -(-n // 128) * split_k < enough and k >= 128 * split_k:
        split_k *= 2
    return LaunchConfig(128, 64, split_k, 4, 3, True)


def _even_splits(tiles: int, blocks: int, enough: int) -> int:
    """Fewest splits with enough programs that all take as many blocks of channels."""
    for split_k in range(1, blocks):
        if blocks % split_k == 0 and tiles * split_k >= enough:
            return split_k
    return max(1, blocks)


def default_config(n: int, k: int, tokens: int, processors: int) -> LaunchConfig:
    """A configuration for any shape on any device, from the best ones on the H200.

    Channels are split until there are enough programs to hide the latency of memory:
    about ten warps per multiprocessor. On the vector units, listing pays if there is
    much to read; smaller layers are masked.

    Args:
        n: output features of the (fused) layer on this rank.
        k: input features.
        tokens: rows of the call.
        processors: multiprocessors of the device.
    """
    use_dot = tokens > VECTOR_TOKENS
    listed = not use_dot and n * k >= _LISTED_ELEMENTS
    # Enough programs for 132 multiprocessors.
    block_n, block_k, warps, enough = 128, 32, 1, 1500
    if use_dot:
        block_n, warps, enough = 256, 4, 256
    elif listed:
        block_n, block_k, warps, enough = 1024, 16, 4, 400
    split_k = 1
    enough = enough * processors // _PROCESSORS
    while -(-n // block_n) * split_k < enough and k >= 2 * split_k * block_k:
        split_k *= 2
    stages = 3 if use_dot else 1
    return LaunchConfig(block_n, block_k, split_k, warps, stages, use_dot, listed)


def forget_tables() -> None:
    """Read the tables again at the next lookup, after one was written."""
    device_table.cache_clear()
    launch_config.cache_clear()


@cache
def _log_untuned(device_name: str) -> None:
    logger.info(
        "Not every shape has a tuned launch configuration for %s, using defaults where"
        " one is missing. Tune with: vllm-rsparse bench MODEL --tune",
        device_name,
    )
