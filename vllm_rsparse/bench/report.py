# SPDX-License-Identifier: Apache-2.0
"""The table that ``vllm-rsparse bench`` prints."""

from typing import Any

from vllm_rsparse.text_table import align


def table(rows: list[dict[str, Any]]) -> str:
    """The printed table: for each budget every layer, then the sum over the model's.

    Args:
        rows: of one format, as ``measure_layer`` gives them for each layer.
    """
    dense = [row for row in rows if row["method"] != "rsparse"]
    names = {row["method"]: row["baseline"] for row in dense}
    columns = [f"{method} us" for method in names]
    head = ["tokens", "layer", "N x K", "read", *columns, "sparse us", "", "GB/s"]
    lines = [head]
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        layers: list[list[dict[str, Any]]] = []
        for row in rows:
            if row["tokens"] == tokens:
                if row["method"] == "dense":
                    layers.append([])
                layers[-1].append(row)
        for budget in range(len(names), len(layers[0])):
            lines.extend(
                _lines(
                    tokens, [[*group[: len(names)], group[budget]] for group in layers]
                )
            )
    group = f", groups of {rows[0]['group']}" if rows[0]["group"] else ""
    notes = [f"{method}: {name}" for method, name in names.items()]
    return "\n".join([f"weights {rows[0]['format']}{group}", align(lines), *notes])


def _lines(tokens: int, groups: list[list[dict[str, Any]]]) -> list[list[str]]:
    """A line per layer of one budget, and their sum.

    Args:
        tokens: rows of the calls.
        groups: for each layer its dense rows and its sparse one.
    """
    lines = [
        [
            str(tokens),
            f"{sparse['count']} x {sparse['layer']}",
            f"{sparse['n']} x {sparse['k']}",
            f"{sparse['kept']:.3f}",
            *(f"{row['us']:.1f}" for row in dense),
            f"{sparse['us']:.1f}",
            f"{dense[0]['us'] / sparse['us']:.2f}x",
            f"{sparse['gbps']} ({sparse['share']:.0%})",
        ]
        for *dense, sparse in groups
    ]
    sums = [
        sum(row["us"] * row["count"] for row in side)
        for side in zip(*groups, strict=True)
    ]
    totals = [*(f"{one:.1f}" for one in sums), f"{sums[0] / sums[-1]:.2f}x", ""]
    return [*lines, [str(tokens), "all", "", "", *totals]]
