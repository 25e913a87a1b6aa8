# SPDX-License-Identifier: Apache-2.0
"""The closing table of ``prepare``: one row per kind of linear."""

from vllm_rsparse.artifact.schema import ArtifactInfo, LinearEntry, model_sparsity
from vllm_rsparse.model.names import LinearName, label_of
from vllm_rsparse.text_table import align


def summary(info: ArtifactInfo) -> str:
    """Target and achieved sparsity, mean rank and mean relative error per kind.

    Achieved sparsity counts kept columns and factors on the calibration tokens.
    """
    rows: list[tuple[str, ...]] = [
        ("linear", "target", "achieved", "mean rank", "rel. error")
    ]
    kinds: dict[str, dict[str, LinearEntry]] = {}
    for name, entry in info.linears.items():
        kinds.setdefault(LinearName.parse(name).kind, {})[name] = entry
    rows += [_row(label_of(kind), entries) for kind, entries in kinds.items()]
    rows.append(_row("all", info.linears))
    return align(rows)


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
