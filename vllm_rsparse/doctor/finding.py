# SPDX-License-Identifier: Apache-2.0
"""What a check found."""

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How bad it is: only FAIL sets the exit status.

    A check is skipped where it failed for the same reason as one before it.
    """

    OK = "ok"
    SKIP = "skip"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    name: str
    detail: str

    def line(self) -> str:
        """Level, name and detail in columns; a detail of several lines becomes one."""
        return f"{self.level.value:<5}{self.name:<14}{' '.join(self.detail.split())}"
