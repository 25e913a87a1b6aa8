# SPDX-License-Identifier: Apache-2.0
"""Plain-text tables for the terminal."""

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
