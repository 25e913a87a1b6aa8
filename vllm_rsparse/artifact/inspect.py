# SPDX-License-Identifier: Apache-2.0
"""An artifact for people: tables of its figures, and a heat map of its sparsity."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_rsparse.arguments import writing
from vllm_rsparse.artifact.card import card_line
from vllm_rsparse.artifact.reads import LinearReads, linear_reads, token_reads_of
from vllm_rsparse.artifact.schema import ArtifactInfo, LinearEntry
from vllm_rsparse.formats.names import AS_STORED
from vllm_rsparse.model.names import HEAD, LinearName, label_of
from vllm_rsparse.text_table import align

_MIB = 1 << 20
# Columns that a key of the provenance may be indented by; below, values are JSON.
_DEEPEST = 6


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
    with writing(f"--plot {path}"):
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
    reads = linear_reads(info)
    rows = [["bytes read per token", "MiB", "of dense"]]
    for label, size in (
        ("kept columns", reads.columns),
        ("scales of output channels", reads.scales),
        ("factors", reads.factors),
        ("thresholds and corrections", reads.vectors),
        ("sparse, in all", reads.sparse),
        ("dense", reads.dense),
    ):
        if size or reads.scales or label != "scales of output channels":
            rows.append([label, f"{size / _MIB:.3f}", f"{size / reads.dense:.3f}"])
    return "\n\n".join([align(rows), *_whole_model(info)])


def _whole_model(info: ArtifactInfo) -> list[str]:
    """A table of what a token reads of the whole model; none if not known."""
    parts = token_reads_of(info)
    if not parts:
        return []
    head = [info.head] if info.head != AS_STORED else []
    head += ["sparse"] if info.sparse_head is not None else []
    names = {
        "linears": f"these linears ({info.served_format})",
        "experts": "routed experts (dense)",
        "others": "other weights of the layers",
        "head": f"{HEAD} ({', '.join(head)})" if head else HEAD,
    }
    total = LinearReads()
    for part in parts.values():
        total += part
    title = "bytes of the whole model"
    rows = [[title, "sparse MiB", "dense MiB", "sparse/dense", "share of dense"]]
    for label, part in [
        *((names[key], part) for key, part in parts.items() if part.dense),
        ("in all", total),
    ]:
        sizes = [f"{size / _MIB:.3f}" for size in (part.sparse, part.dense)]
        shares = (part.sparse / part.dense, part.dense / total.dense)
        rows.append([label, *sizes, *(f"{share:.3f}" for share in shares)])
    return [align(rows)]


def _provenance(info: ArtifactInfo) -> str:
    header = {
        "target sparsity": round(info.sparsity, 4),
        "achieved sparsity": round(info.achieved_sparsity, 4),
        "weights": info.served_format,
        "linears": len(info.linears),
        "dtype": info.dtype,
        "tensors_sha256": info.tensors_sha256,
    }
    if info.bits_read is not None:
        header["bits read of a weight"] = round(info.bits_read, 3)
    lines = [f"model card: {card_line(info)}"]
    for key, value in (header | info.provenance).items():
        lines += _lines(key, value, "")
    return "\n".join(lines)


def _lines(key: str, value: Any, indent: str) -> list[str]:
    """A key and its value; those of an object, and items of a list, on own lines."""
    label = f"{indent}{_compact(key)}:"
    if len(indent) > _DEEPEST:  # provenance is free form
        return [f"{label} {_compact(value)}"]
    if isinstance(value, dict) and value:
        inner = [_lines(name, item, f"{indent}  ") for name, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        inner = [[f"{indent}  - {_compact(item)}"] for item in value]
    else:
        return [f"{label} {_compact(value)}"]
    return [label, *(line for lines in inner for line in lines)]


def _compact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    plain = isinstance(value, str) and value.isprintable()
    return str(value) if plain else json.dumps(value)


def _sparsity(entry: LinearEntry) -> float:
    return 1.0 - entry.read_elements / entry.dense_elements
