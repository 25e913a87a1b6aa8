# SPDX-License-Identifier: Apache-2.0
"""Draw docs/speed.png from the rows in benchmarks/results/.

    python benchmarks/plot.py

Left: vLLM decode, speed-up over dense bf16 against the batch. Right: the layers of four
models, speed-up over cuBLAS against the weight's size, at one token and at two.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
ENGINES = {"fp8": "FP8 (vLLM's own)", "rsparse-s0.5-rho1": "rsparse, 50%, no factors"}


def read(name: str) -> Any:
    """Rows of one file of results."""
    return json.loads((HERE / "results" / name).read_text())


def draw_batches(axes: plt.Axes) -> None:
    """Each engine over the dense one of the same run."""
    rows = {row["engine"]: row for row in read("bench_serve_NVIDIA_H200.json")}
    dense = rows["dense"]
    for engine, label in ENGINES.items():
        row = rows[engine]
        batches = list(row["decode_ms"])
        ratios = [
            dense["decode_ms"][b]["median"] / row["decode_ms"][b]["median"]
            for b in batches
        ]
        axes.plot(batches, ratios, marker="o", label=label)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("batch")
    axes.set_ylabel("decode, x dense bf16")
    axes.set_title("Llama-3-8B shapes in vLLM 0.26, one H200", fontsize=10)
    axes.legend(fontsize=8)


def draw_layers(axes: plt.Axes) -> None:
    """Speed-up of every layer shape over cuBLAS."""
    document = read("bench_shapes_NVIDIA_H200.json")
    for tokens, marker in ((1, "o"), (2, "s")):
        rows = [r for r in document["rows"] if r["tokens"] == tokens]
        sparse = [r for r in rows if r["method"] == "rsparse"]
        kept = sum(r["kept"] for r in sparse) / len(sparse)
        axes.scatter(
            [r["n"] * r["k"] * 2 / 1e6 for r in sparse],
            [r["speedup"] for r in sparse],
            marker=marker,
            label=f"{tokens} token{'s'[: tokens - 1]}, {kept:.0%} of channels read",
        )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("weight, MB")
    axes.set_ylabel("kernel, x cuBLAS")
    axes.set_title("layers of Llama-3-8B, 70B TP=4, Qwen3-8B, 32B", fontsize=10)
    axes.legend(fontsize=8)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    draw_batches(left)
    draw_layers(right)
    path = HERE.parent / "docs" / "speed.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
