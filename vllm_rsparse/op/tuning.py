# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the Triton kernels: tuned table first, heuristic otherwise.

``tables`` has the files. Nothing is tuned while serving: a lookup is a dictionary
access.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.op.launch_rules import PROCESSORS, SLOTTED_TOKENS
from vllm_rsparse.op.sparse_defaults import VECTOR_TOKENS, sparse_default
from vllm_rsparse.op.tables import (
    DENSE,
    SPARSE,
    Problem,
    Table,
    TunedEntry,
    find_tables,
    read_table,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """What a launch configuration depends on.

    Attributes:
        name: as ``torch.cuda.get_device_name`` reports it.
        processors: multiprocessors.
    """

    name: str
    processors: int


@cache
def device_tables(device_name: str) -> tuple[Table, ...]:
    """The tables of a device, the first one that has a shape wins; logs which.

    Raises:
        TableError: a table cannot be used.
    """
    paths = find_tables(device_name)
    tables = tuple(Table(path, tuple(read_table(path))) for path in paths)
    if tables:
        logger.info(
            "rsparse: launch configurations for %s: %s",
            device_name,
            ", then ".join(f"{one.path} ({len(one.entries)})" for one in tables),
        )
    return tables


@cache
def device_of(device: torch.device) -> Device:
    """The device that kernels run on; an H200 stands for Triton's interpreter."""
    if device.type != "cuda":
        return Device("interpreter", PROCESSORS)
    properties = torch.cuda.get_device_properties(device)
    return Device(torch.cuda.get_device_name(device), properties.multi_processor_count)


@cache
def launch_config(device: Device, problem: Problem, tokens: int) -> LaunchConfig:
    """The configuration for a shape: the tuned one of the nearest number of tokens.

    One token of weights with scales per group, and two in four bits, have a loop of
    their own in the packed kernel (``SLOTTED_TOKENS``), so entries for other numbers of
    tokens do not apply to them, nor theirs to others.

    Args:
        device: where the kernels run.
        problem: the layer's shape and format.
        tokens: rows of the call.
    """
    slotted = SLOTTED_TOKENS.get(problem.kind, 0)
    candidates = _tuned(
        device,
        lambda entry: (
            (entry.problem, entry.route) == (problem, SPARSE)
            and (entry.config.use_dot or entry.config.packed or tokens <= VECTOR_TOKENS)
            and (entry.tokens == tokens or min(entry.tokens, tokens) > slotted)
        ),
    )
    if candidates:
        return min(candidates, key=lambda entry: abs(entry.tokens - tokens)).config
    _log_untuned(device.name)
    return sparse_default(problem.n, problem.k, problem.kind, tokens, device.processors)


@cache
def dense_launch_config(
    device: Device, problem: Problem, tokens: int
) -> LaunchConfig | None:
    """A tuned configuration of the dense route; None: use the default.

    The one for the fewest tokens that are enough, unless it is for twice as many.

    Args:
        device: where the kernels run.
        problem: the layer's shape and format.
        tokens: rows of the call.
    """
    candidates = _tuned(
        device,
        lambda entry: (
            (entry.problem, entry.route) == (problem, DENSE)
            and tokens <= entry.tokens < 2 * tokens
        ),
    )
    if candidates:
        return min(candidates, key=lambda entry: entry.tokens).config
    return None


def _tuned(device: Device, fits: Callable[[TunedEntry], bool]) -> list[TunedEntry]:
    """The entries that fit, of the first of the device's tables that has any."""
    for table in device_tables(device.name):
        if found := [entry for entry in table.entries if fits(entry)]:
            return found
    return []


def forget_tables() -> None:
    """Read the tables again at the next lookup, after one was written."""
    device_tables.cache_clear()
    launch_config.cache_clear()
    dense_launch_config.cache_clear()


@cache
def _log_untuned(device_name: str) -> None:
    logger.info(
        "Not every shape has a tuned launch configuration for %s, using defaults where"
        " one is missing. Tune with: vllm-rsparse bench MODEL --tune",
        device_name,
    )
