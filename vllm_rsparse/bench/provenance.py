# SPDX-License-Identifier: Apache-2.0
"""What a measurement ran on: device, versions, commit, command."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_rsparse import __version__
from vllm_rsparse.text_table import counted


def provenance() -> dict[str, Any]:
    """Facts to store with a measurement, in the order in which people read them."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": device_name(),
        "vllm_rsparse": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def device_name() -> str:
    """Name of the device that measurements run on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    for line in facts.read_text().splitlines() if facts.exists() else ():
        if line.startswith("model name"):
            processor = line.split(":")[1].strip()
            break
    return f"{processor}, {counted(torch.get_num_threads(), 'thread')}"


def commit() -> str:
    """The commit of this package's checkout, "-dirty" if it has local changes.

    "unknown" for an installed wheel, even inside the checkout of something else.
    ``GIT_COMMIT`` has priority, for a copy without its repository.
    """
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    here = Path(__file__)
    commands = (
        ["git", "ls-files", "--error-unmatch", here.name],
        ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
    )
    found = ""
    for command in commands:
        try:
            done = subprocess.run(
                command, cwd=here.parent, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        found = done.stdout.strip()
    return found
