# SPDX-License-Identifier: Apache-2.0
"""Which code a benchmark measured."""

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """The checkout's commit, "-dirty" where it was changed, "unknown" outside one.

    ``GIT_COMMIT`` goes first, for a copy without its repository.
    """
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # no git on the machine
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
