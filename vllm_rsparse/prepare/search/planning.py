# SPDX-License-Identifier: Apache-2.0
"""From a recipe to what every linear gets, before any threshold is calibrated."""

import hashlib
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse import __version__
from vllm_rsparse.errors import PrepareError
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.recipe.plan import uniform
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.recipe.recipes import (
    DEFAULT_RHO,
    EVOLUTIONARY,
    Recipe,
    check_plans,
)
from vllm_rsparse.prepare.search.evolution import evolutionary
from vllm_rsparse.prepare.search.factors import Share, find_ranks, with_factors
from vllm_rsparse.prepare.search.greedy import measure, share_in_layers
from vllm_rsparse.prepare.search.sensitivity import (
    Sensitivity,
    sensitivities,
    share_out,
)
from vllm_rsparse.prepare.search.trials import choose, halved
from vllm_rsparse.prepare.store.journal import Journal
from vllm_rsparse.prepare.store.snapshots import Snapshots

# Leading part of each calibration window that runs dense and is not counted, where the
# sparse model is calibrated on its own activations: a prompt before decoded tokens.
DENSE_FRACTION = 0.1


def plan_linears(
    recipe: Recipe,
    options: PrepareOptions,
    model: StreamedModel,
    linears: Sequence[Linear],
    windows: Tensor,
    journal: Journal,
    snapshots: Snapshots,
) -> Planned:
    """Run whatever search the recipe asks for.

    Results are kept in ``journal``, tensors in ``snapshots``.

    Raises:
        PrepareError: the recipe does not fit the model or the options.
    """
    rho = options.rho
    if rho is None:
        rho = DEFAULT_RHO.get(recipe.name, 1.0)
    if rho < 1.0 and recipe.allocation != "uniform":
        raise PrepareError(
            f"--rho {rho}: recipe {recipe.name!r} chooses the factors itself, if"
            " it uses any; leave --rho out, or use --recipe uniform"
        )
    check_plans(recipe, linears, options.sparsity)
    first = 0
    if recipe.activations == "sparse":
        first = int(DENSE_FRACTION * windows.shape[1])
    scales: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    found: dict[str, Sensitivity] = {}
    plans = recipe.linears
    if recipe.score == "magnitude":
        scales = {one.name: torch.ones(one.shape[1]) for one in linears}
    elif recipe.score == "sensitivity":
        found = sensitivities(model, linears, windows, first, options.seed, snapshots)
        scales = {name: one.scale for name, one in found.items()}
        if recipe.factors == "regressed":
            metrics = {
                name: one.metric
                for name, one in found.items()
                if one.metric is not None
            }

    start = Planned(recipe, {}, rho, scales, metrics, first)
    ways: dict[str, Share] = {}
    if plans is None and recipe.allocation in ("greedy", "mixed"):
        errors = measure(model, linears, windows, first, scales, journal)
        ways["greedy"] = partial(share_in_layers, linears, errors)
    if plans is None and recipe.allocation in ("sensitivity", "mixed"):
        ways["sensitivity"] = partial(share_out, linears, found)
    if plans is None and recipe.allocation == "mixed":
        ways["half of each"] = partial(halved, ways["greedy"], ways["sensitivity"])
        return choose(
            model, linears, start, ways, found, windows, options.sparsity,
            options.seed, journal, snapshots,
        )  # fmt: skip
    for share in ways.values():
        plans = dict(share(options.sparsity))
        if metrics:
            ranks = find_ranks(
                model, linears, first, found, plans, options.seed, snapshots,
                recipe.correction,
            )  # fmt: skip
            plans = with_factors(linears, ranks, share, options.sparsity)
    if plans is None and recipe.allocation in EVOLUTIONARY:
        plans = evolutionary(
            model,
            linears,
            windows,
            int(DENSE_FRACTION * windows.shape[1]),
            options.sparsity,
            recipe.allocation == "evolutionary-joint",
            options.seed,
            journal,
        )
    if plans is None:
        plans = uniform(linears, options.sparsity, rho)
    return start.with_plans(plans)


def search_identity(
    recipe: Recipe, options: PrepareOptions, model: StreamedModel, windows: Tensor
) -> dict[str, Any]:
    """All that the results of a run depend on, as JSON."""
    return {
        "vllm_rsparse": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "weights": [
            [file.name, file.stat().st_size, file.stat().st_mtime_ns]
            for file in model.checkpoint.weight_files
        ],
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "recipe": hashlib.sha256(recipe.to_json().encode()).hexdigest(),
        "rho": options.rho,
        "sparsity": options.sparsity,
        "seed": options.seed,
        "device": model.device.type,
        "dtype": str(model.dtype),
    }
