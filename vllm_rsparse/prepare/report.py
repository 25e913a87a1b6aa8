# SPDX-License-Identifier: Apache-2.0
"""The closing table of ``prepare``: one row per kind of linear."""

from collections.abc import Callable

from vllm_rsparse.artifact.reads import HEAD_FOUND
from vllm_rsparse.artifact.schema import (
    ArtifactInfo,
    LinearEntry,
    bits_read,
    model_sparsity,
)
from vllm_rsparse.formats.names import AS_STORED
from vllm_rsparse.model.names import HEAD, LinearName, label_of
from vllm_rsparse.text_table import align


def summary(info: ArtifactInfo) -> str:
    """Target and achieved sparsity, mean rank and mean relative error per kind.

    Achieved sparsity counts kept columns and factors on the calibration tokens.
    """
    header: tuple[str, ...] = (
        "linear",
        "target",
        "achieved",
        "mean rank",
        "rel. error",
    )
    if info.bits_read is not None:
        header = ("linear", "bits", "at 8 bits", "at 4", "at 0", "rel. error")
    rows: list[tuple[str, ...]] = [header]
    kinds: dict[str, dict[str, LinearEntry]] = {}
    for name, entry in info.linears.items():
        kinds.setdefault(LinearName.parse(name).kind, {})[name] = entry
    rows += [_row(label_of(kind), entries) for kind, entries in kinds.items()]
    rows.append(_row("all", info.linears))
    if info.sparse_head is not None and info.bits_read is None:
        rows.append(_row(HEAD, {HEAD: info.sparse_head}))
    return align(rows) + _head_loss(info)


def _head_loss(info: ArtifactInfo) -> str:
    """A line about an output layer that is not the base model's; else empty."""
    head = info.provenance.get(HEAD_FOUND)
    if head is None:
        return ""
    served = [info.head] if info.head != AS_STORED else []
    if info.sparse_head is not None:
        kept = info.sparse_head.kept_fraction
        served.append(f"{kept:.1%} of its channels kept")
    return (
        f"\n{HEAD} ({', '.join(served)}) alone: KL divergence"
        f" {head['kl_divergence']:.4f} nats on {head['tokens']} calibration tokens"
    )


def _row(label: str, entries: dict[str, LinearEntry]) -> tuple[str, ...]:
    bits = bits_read(entries)
    if bits is not None:
        return _bits_row(label, entries, bits)
    dense = sum(entry.dense_elements for entry in entries.values())
    target = sum(e.sparsity * e.dense_elements for e in entries.values()) / dense
    rank = sum(entry.rank for entry in entries.values()) / len(entries)
    return (
        label,
        f"{target:.3f}",
        f"{model_sparsity(entries):.3f}",
        f"{rank:.1f}",
        _mean_error(entries),
    )


def _bits_row(
    label: str, entries: dict[str, LinearEntry], bits: float
) -> tuple[str, ...]:
    """Of weights in planes: how many of the channels are read with 8, 4 and 0 bits."""
    dense = sum(entry.dense_elements for entry in entries.values())

    def mean(value: Callable[[LinearEntry], float]) -> float:
        return sum(value(e) * e.dense_elements for e in entries.values()) / dense

    kept = mean(lambda entry: entry.kept_fraction)
    full = mean(lambda entry: entry.full_fraction or 0.0)
    shares = (f"{share:.0%}" for share in (full, kept - full, 1 - kept))
    return label, f"{bits:.2f}", *shares, _mean_error(entries)


def _mean_error(entries: dict[str, LinearEntry]) -> str:
    errors = [
        entry.relative_error
        for entry in entries.values()
        if entry.relative_error is not None
    ]
    return f"{sum(errors) / len(errors):.3f}" if errors else "-"
