# SPDX-License-Identifier: Apache-2.0
"""Artifacts for ``write_prepared``, and the figures of a run of ``evaluate``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse.cli import main


def constant(value: float) -> Callable[[str, int, int], dict[str, Tensor]]:
    """The same threshold everywhere; a negative one keeps all channels."""
    return lambda name, n, k: {"thresholds": torch.full((k,), value)}


def mixed(name: str, n: int, k: int) -> dict[str, Tensor]:
    """Thresholds near the median input, factors on q, corrections on o."""
    tensors = {"thresholds": 0.6 * torch.rand(k)}
    if name.endswith("q_proj"):
        tensors["u"] = 0.05 * torch.randn(n, 3)
        tensors["v"] = 0.05 * torch.randn(3, k)
    if name.endswith("o_proj"):
        tensors["correction"] = 0.02 * torch.randn(n)
    return tensors


def figures(directory: Path, option: str, file: Path, *options: str) -> dict[str, Any]:
    """What ``evaluate`` writes as JSON for the text or prompts of a file."""
    out = file.with_suffix(".json")
    arguments = [option, str(file), "--device", "cpu", "--json", str(out), *options]
    assert main(["evaluate", str(directory), *arguments]) == 0
    return json.loads(out.read_text())
