# SPDX-License-Identifier: Apache-2.0
"""Draw docs/frontier.png: what a format and a sparsity lose, read and take.

    python benchmarks/plot_frontier.py

Left: KL divergence against bits read per weight, all measured on one real model. Right:
the same rows against milliseconds a token in vLLM on the shapes of Llama-3-8B. Engines
were timed at two kept fractions per format; milliseconds of other sparsities lie on the
line through both (hollow where that extrapolates), or at the mean of both where more
kept channels were not slower. The planes' fractions are of bits.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
COLOURS = {
    "bf16": "tab:grey",
    "fp8": "tab:blue",
    "int4": "tab:orange",
    "planes": "tab:green",
}
NAMES = {"bf16": "bf16", "fp8": "FP8", "int4": "INT4", "planes": "two planes"}
SHAPE = "llama-3-8b"
# The engines of a format, by what they keep.
TIMED = {
    "fp8": ("fp8-s0.35-shared", "fp8-s0.5-shared"),
    "int4": ("int4-s0.35-shared", "int4-s0.5-shared"),
    "planes": ("int8-planes-0.85:0.15-shared", "int8-planes-0.7:0.05-shared"),
}
RECIPE = "best"

Row = dict[str, Any]


def read(name: str) -> Any:
    """One file of results."""
    return json.loads((HERE / "results" / name).read_text())


def curve(rows: list[Row], base: str) -> list[Row]:
    """The base's dense row, where it loses anything, and those of the recipe."""
    mine = [r for r in rows if r["base"] == base and "calibration" not in r]
    return [r for r in mine if r["recipe"] in ("dense", RECIPE)]


def milliseconds() -> dict[str, tuple[float, list[tuple[float, float]]]]:
    """By format: dense milliseconds a token, and (kept fraction, milliseconds).

    Planes have no dense engine.
    """
    found = {}
    # Later rows are of later versions.
    rows = {
        row["engine"]: row
        for row in read("bench_serve_quantized_NVIDIA_H200.json")
        if row["shape"] == SHAPE
    }
    for base, engines in TIMED.items():
        timed = [rows[engine] for engine in engines]
        points = [(r["kept_fraction"], r["decode_ms"]["1"]["median"]) for r in timed]
        dense = rows[base]["decode_ms"]["1"]["median"] if base in rows else 0.0
        found[base] = (dense, points)
    return found


def annotate(axes: plt.Axes, row: Row, x: float) -> None:
    """Write a row's sparsity, or the bits that planes read, next to its point."""
    text = f"{row['target']:.0%}" if row["target"] else "dense"
    if row["base"] == "planes":
        text = f"{row['target']:g} bits"
    axes.annotate(
        text,
        (x, row["kl_mean"]),
        xytext=(5, 3),
        textcoords="offset points",
        fontsize=7,
    )


def draw_bits(axes: plt.Axes, rows: list[Row]) -> None:
    """Loss against the bytes of a token."""
    for base, colour in COLOURS.items():
        mine = curve(rows, base)
        axes.plot(
            [r["bits"] for r in mine],
            [r["kl_mean"] for r in mine],
            marker="o",
            color=colour,
            label=NAMES[base],
        )
        for row in mine:
            annotate(axes, row, row["bits"])
    three = next(r for r in rows if r["base"] == "int3")
    axes.plot(three["bits"], three["kl_mean"], "x", color="tab:red", label="INT3")
    axes.set_xlabel("bits read per weight and token")
    axes.set_ylabel("KL divergence, nats")
    axes.set_title("Qwen2.5-Coder-1.5B-Instruct, own answers", fontsize=10)


def draw_times(axes: plt.Axes, rows: list[Row]) -> None:
    """Loss against the time of a token."""
    for base, (dense_ms, ((kept_a, ms_a), (kept_b, ms_b))) in milliseconds().items():
        slope = (ms_a - ms_b) / (kept_a - kept_b)
        if slope < 0:
            slope, ms_b = 0.0, (ms_a + ms_b) / 2
        times, losses = [], []
        for row in curve(rows, base):
            kept = 1 - row["achieved"]
            time = dense_ms if kept == 1 else ms_b + slope * (kept - kept_b)
            times.append(time)
            losses.append(row["kl_mean"])
            between = kept == 1 or kept_b <= kept <= kept_a
            axes.plot(
                time,
                row["kl_mean"],
                marker="o",
                color=COLOURS[base],
                markerfacecolor=COLOURS[base] if between else "white",
            )
            annotate(axes, row, time)
        axes.plot(times, losses, color=COLOURS[base], label=NAMES[base], zorder=0)
    axes.set_xlabel("milliseconds a token, batch 1 (bf16: 4.8)")
    axes.set_title("time: Llama-3-8B shapes, vLLM 0.26, one H200", fontsize=10)


def main() -> None:
    rows = read("real_model_frontier_NVIDIA_H200.json")["rows"]
    figure, both = plt.subplots(
        1, 2, figsize=(9, 3.8), layout="constrained", sharey=True
    )
    draw_bits(both[0], rows)
    draw_times(both[1], rows)
    for axes in both:
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path = HERE.parent / "docs" / "frontier.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
