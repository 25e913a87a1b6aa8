# SPDX-License-Identifier: Apache-2.0
"""Plain text for the terminal: tables, counts and sizes."""

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table: the first column to the left, figures to the right.

    Args:
        rows: cells, the heading first; all rows have the same length.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [f"{row[0]:<{widths[0]}}"]
            + [f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 window", "2 windows"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size_of(size: float) -> str:
    """A number of bytes in the unit that suits it: "27.0 MiB", "1.5 GiB"."""
    if size < 2**30:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**30:.1f} GiB"
