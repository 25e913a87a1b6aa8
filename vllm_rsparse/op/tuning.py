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
from vllm_rsparse.op.launch_defaults import (
    PROCESSORS,
    VECTOR_TOKENS,
    sparse_default,
)
from vllm_rsparse.validation import CONFIG, must, parse_json, validate

logger = logging.getLogger(__name__)

CONFIG_DIR = Path(__file__).parent / "configs"


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
        return Device("interpreter", PROCESSORS)
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
    return sparse_default(n, k, kind, tokens, device.processors)


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
