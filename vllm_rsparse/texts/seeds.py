# SPDX-License-Identifier: Apache-2.0
"""The seed prompts that ship with the package, ``seeds.jsonl``."""

import hashlib
import json
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal

SEEDS = Path(__file__).with_name("seeds.jsonl")


@cache
def seed_prompts(key: Literal["prompt", "start"]) -> tuple[str, ...]:
    """The seeds with this key; domains take turns, so any part covers them all."""
    domains: dict[str, list[str]] = {}
    for line in SEEDS.read_text(encoding="utf-8").splitlines():
        seed = json.loads(line)
        if key in seed:
            domains.setdefault(seed["domain"], []).append(seed[key])
    turns = chain.from_iterable(zip_longest(*domains.values()))
    return tuple(seed for seed in turns if seed is not None)


def seeds_digest() -> str:
    """SHA-256 of the file, for the identity of what a model wrote."""
    return hashlib.sha256(SEEDS.read_bytes()).hexdigest()
