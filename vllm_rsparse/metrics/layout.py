# SPDX-License-Identifier: Apache-2.0
"""The file in which one rank counts: int64 slots, and a JSON header next to it.

``rank-R.json`` describes the slots of ``rank-R.counts``, and appears atomically once
they exist. Slots::

    STEP_SLOTS   for each route (sparse, dense): steps by number of tokens, one slot per
                 bucket, then the sum of their tokens
    1            tokens of the sparse steps that were sampled
    3 per kind   channels seen, channels kept, bytes read, in the sampled steps
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROUTES = ("sparse", "dense")
# Upper bounds of a step's tokens: the sizes at which routes switch or batches double.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_ROUTE_SLOTS = len(BUCKETS) + 2  # the buckets, above the last, sum of the tokens
SAMPLED_TOKENS = len(ROUTES) * _ROUTE_SLOTS
FIRST_KIND = SAMPLED_TOKENS + 1
KIND_SLOTS = 3


@dataclass(frozen=True)
class Header:
    """Contents of ``rank-R.json``.

    Attributes:
        rank: of the process that counts.
        kinds: kind of linear ("q_proj"), in the order of the slots, and the bytes of
            its weights on this rank, over all layers: what a dense step reads.
    """

    rank: int
    kinds: dict[str, int]

    @property
    def slots(self) -> int:
        return FIRST_KIND + KIND_SLOTS * len(self.kinds)


def step_slot(route: int, tokens: int) -> int:
    """Slot that counts a step of ``tokens`` tokens."""
    bucket = next((i for i, le in enumerate(BUCKETS) if tokens <= le), len(BUCKETS))
    return route * _ROUTE_SLOTS + bucket


def token_slot(route: int) -> int:
    """Slot that sums the tokens of a route's steps."""
    return (route + 1) * _ROUTE_SLOTS - 1


def counts_path(directory: Path, rank: int) -> Path:
    """The file with a rank's slots."""
    return directory / f"rank-{rank}.counts"


def write_header(directory: Path, header: Header) -> None:
    """Publish a rank's header; readers see it complete or not at all."""
    target = directory / f"rank-{header.rank}.json"
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(header)))
    os.replace(partial, target)


def read_ranks(directory: Path) -> list[tuple[Header, Any]]:
    """Header and slots (int64) of every rank that counts in this directory, by rank."""
    ranks = []
    for path in directory.glob("rank-*.json"):
        try:
            header = Header(**json.loads(path.read_text()))
            slots = np.fromfile(counts_path(directory, header.rank), np.int64)
        except OSError:
            continue  # swept away with old temporary files: vLLM's own metrics go on
        ranks.append((header, slots))
    return sorted(ranks, key=lambda pair: pair[0].rank)
