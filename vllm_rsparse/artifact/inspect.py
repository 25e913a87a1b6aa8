# SPDX-License-Identifier: Apache-2.0
"""An artifact for people: tables of its figures, and a heat map of its sparsity."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_rsparse.artifact.reads import token_shares
from vllm_rsparse.artifact.schema import ArtifactInfo, LinearEntry
from vllm_rsparse.formats.plane_bits import plane_bits
from vllm_rsparse.model.names import LinearName, label_of
from vllm_rsparse.text_table import align

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_MIB = 1 << 20


@dataclass(frozen=True)
class _Figure:
    title: str
    value: Callable[[LinearEntry], float | None]
    layout: str


_FIGURES = (
    _Figure("sparsity (factors counted)", lambda e: _sparsity(e), "{:.3f}"),
    _Figure("kept fraction", lambda e: e.kept_fraction, "{:.3f}"),
    _Figure("kept fraction, second plane", lambda e: e.full_fraction, "{:.3f}"),
    _Figure("rank", lambda e: e.rank, "{:.0f}"),
    _Figure("relative error", lambda e: e.relative_error, "{:.3f}"),
)


def describe(info: ArtifactInfo) -> str:
    """Figures by layer and kind, bytes per token, provenance.

    All figures are those that ``prepare`` counted on its calibration text.
    """
    grid = _grid(info)
    parts = [
        _table(figure, grid)
        for figure in _FIGURES
        if any(
            figure.value(entry)
            for row in grid.layers.values()
            for entry in row.values()
        )
    ]
    return "\n\n".join([*parts, _bytes_per_token(info), _provenance(info)])


def draw(info: ArtifactInfo, path: Path) -> None:
    """Write a heat map of the sparsity, one row per layer, one column per kind."""
    from matplotlib.figure import Figure

    grid = _grid(info)
    values = [
        [_sparsity(row[kind]) if kind in row else math.nan for kind in grid.kinds]
        for row in grid.layers.values()
    ]
    figure = Figure(figsize=(6, 1.5 + 0.25 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    labels = [label_of(kind) for kind in grid.kinds]
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(values)), list(grid.layers))
    axes.set_title(f"share of bytes skipped, {info.achieved_sparsity:.3f} in all")
    figure.colorbar(image)
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class _Grid:
    kinds: list[str]
    layers: dict[str, dict[str, LinearEntry]]


def _grid(info: ArtifactInfo) -> _Grid:
    """Entries by layer and kind, from names such as model.layers.3.mlp.up_proj."""
    kinds: dict[str, None] = {}
    layers: dict[str, dict[str, LinearEntry]] = {}
    for name, entry in info.entries.items():
        parsed = LinearName.parse(name)
        layer = "-" if parsed.layer is None else str(parsed.layer)
        kinds[parsed.kind] = None
        layers.setdefault(layer, {})[parsed.kind] = entry
    return _Grid(list(kinds), layers)


def _table(figure: _Figure, grid: _Grid) -> str:
    rows = [["layer", *map(label_of, grid.kinds)]]
    for layer, entries in grid.layers.items():
        cells = [figure.value(entries[k]) if k in entries else None for k in grid.kinds]
        rows.append(
            [layer, *("-" if c is None else figure.layout.format(c) for c in cells)]
        )
    return f"{figure.title}\n{align(rows)}"


def _bytes_per_token(info: ArtifactInfo) -> str:
    """What one decoded token reads: weights, and the float32 vectors of the method."""
    entries = info.linears.values()
    dense = sum(_stored_bytes(info, entry) for entry in entries)
    width = _DTYPE_BYTES[info.dtype]
    factors = width * sum(entry.rank * sum(entry.shape) for entry in entries)
    columns = sum(entry.read_fraction * _stored_bytes(info, entry) for entry in entries)
    vectors = 4 * sum(
        entry.shape[1] * (1 if entry.full_fraction is None else 2)
        + entry.shape[0] * entry.correction
        for entry in entries
    )
    rows = [
        ["bytes read per token", "MiB", "of dense"],
        *(
            [label, f"{size / _MIB:.3f}", f"{size / dense:.3f}"]
            for label, size in (
                ("kept columns", columns),
                ("factors", factors),
                ("thresholds and corrections", vectors),
                ("sparse, in all", columns + factors + vectors),
                ("dense", dense),
            )
        ),
    ]
    return align(rows) + _token_shares(info)


def _token_shares(info: ArtifactInfo) -> str:
    """A line about the whole model; empty if not known."""
    shares = token_shares(info)
    if not shares:
        return ""
    names = {
        "linears": "these linears",
        "experts": "routed experts (dense)",
        "others": "other weights of the layers",
        "head": "lm_head",
    }
    parts = [f"{names.get(k, k)} {v:.1%}" for k, v in shares.items() if v]
    return f"\nof all weights that a token reads: {', '.join(parts)}"


def _stored_bytes(info: ArtifactInfo, entry: LinearEntry) -> float:
    """Bytes of a linear's weight in the engine, with the scales of groups."""
    if info.served_format == "int8-planes":
        bits = sum(plane_bits(entry.shape[1]))
    elif info.served_format == "int4":
        bits = 4 + (16 / info.base.group if info.base.group else 0)
    elif info.served_format in ("fp8", "fp8-block"):
        bits = 8
    else:
        bits = 8 * _DTYPE_BYTES[info.dtype]
    return bits / 8 * entry.dense_elements


def _provenance(info: ArtifactInfo) -> str:
    header = {
        "target sparsity": info.sparsity,
        "achieved sparsity": round(info.achieved_sparsity, 4),
        "weights": info.served_format,
        "linears": len(info.linears),
        "dtype": info.dtype,
        "tensors_sha256": info.tensors_sha256,
    }
    if info.bits_read is not None:
        header["bits read of a weight"] = round(info.bits_read, 3)
    lines = [f"{key}: {_compact(value)}" for key, value in header.items()]
    lines += [
        f"{_compact(key)}: {_compact(value)}" for key, value in info.provenance.items()
    ]
    return "\n".join(lines)


def _compact(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable()
    return str(value) if plain else json.dumps(value)


def _sparsity(entry: LinearEntry) -> float:
    return 1.0 - entry.read_elements / entry.dense_elements
