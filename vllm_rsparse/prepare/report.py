# SPDX-License-Identifier: Apache-2.0
"""The closing table of ``prepare``: one row per kind of linear."""

from vllm_rsparse.artifact.schema import ArtifactInfo, LinearEntry, model_sparsity
from vllm_rsparse.model.families import KINDS


def summary(info: ArtifactInfo) -> str:
    """Target and achieved sparsity, mean rank and mean relative error by kind.

    Achieved sparsity counts kept columns and factors on the calibration tokens.
    """
    rows: list[tuple[str, ...]] = [
        ("linear", "target", "achieved", "mean rank", "rel. error")
    ]
    for kind in KINDS:
        entries = {
            name: entry
            for name, entry in info.linears.items()
            if name.endswith(f".{kind}")
        }
        if entries:
            rows.append(_row(kind.split(".")[1], entries))
    rows.append(_row("all", info.linears))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Labels to the left, figures to the right.
    layout = "  ".join(["{:<{}}"] + ["{:>{}}"] * (len(widths) - 1))
    return "\n".join(
        layout.format(
            *(item for pair in zip(row, widths, strict=True) for item in pair)
        )
        for row in rows
    )


def _row(label: str, entries: dict[str, LinearEntry]) -> tuple[str, ...]:
    dense = sum(entry.dense_elements for entry in entries.values())
    target = sum(e.sparsity * e.dense_elements for e in entries.values()) / dense
    rank = sum(entry.rank for entry in entries.values()) / len(entries)
    errors = [
        entry.relative_error
        for entry in entries.values()
        if entry.relative_error is not None
    ]
    error = f"{sum(errors) / len(errors):.3f}" if errors else "-"
    return (
        label,
        f"{target:.3f}",
        f"{model_sparsity(entries):.3f}",
        f"{rank:.1f}",
        error,
    )
