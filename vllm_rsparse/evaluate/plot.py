# SPDX-License-Identifier: Apache-2.0
"""Loss against bytes read: one point per artifact, one line per recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_rsparse.arguments import writing

if TYPE_CHECKING:
    from vllm_rsparse.evaluate.measure import Loss

MARKERS = "osD^vPX*"


def draw(losses: Sequence["Loss"], recipes: Sequence[str], path: Path) -> None:
    """Write the picture.

    Args:
        losses: measurements, all on the same text.
        recipes: name of the recipe of each.
        path: image file; its suffix selects the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for index, recipe in enumerate(dict.fromkeys(recipes)):
        points = sorted(
            (1 - loss.achieved_sparsity, loss.ratio)
            for loss, name in zip(losses, recipes, strict=True)
            if name == recipe
        )
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(*zip(*points, strict=True), marker=marker, label=recipe)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--", label="dense")
    axes.set_yscale("log")
    # Ratios, not powers of ten: the range is often less than one decade.
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.set_xlabel("bytes of the linears read per token, over dense")
    axes.set_ylabel("perplexity over dense")
    axes.set_title(f"held-out text, {losses[0].tokens} predictions")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    with writing(f"--plot {path}"):
        figure.savefig(path, dpi=150)
