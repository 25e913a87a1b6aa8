# SPDX-License-Identifier: Apache-2.0
"""From a recipe to what every linear gets, before any threshold is calibrated."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse import __version__

from .errors import PrepareError
from .journal import Journal
from .linears import Linear
from .options import PrepareOptions
from .recipe import LinearPlan, uniform
from .recipes import DEFAULT_RHO, EVOLUTIONARY, Recipe, check_plans
from .search_evolution import evolutionary
from .search_factors import Share, add_factors
from .search_greedy import measure, share_in_layers
from .search_sensitivity import Sensitivity, sensitivities, share_out
from .snapshots import Snapshots
from .streaming import StreamedModel

# Leading part of each calibration window that runs dense and is not counted, where the
# sparse model is calibrated on its own activations: a prompt before decoded tokens.
DENSE_FRACTION = 0.1


@dataclass(frozen=True)
class Planned:
    """What calibration needs to know.

    Attributes:
        recipe: with the plan of every linear.
        plans: the same plans.
        rho: share of exact channels where the recipe itself does not fix it.
        scales: float32 [K] by linear, the score is |x| times it; a linear that is not
            in it has the norms of its columns.
        metrics: [N, N] by linear, for regressed factors; others have the SVD.
        first: leading positions of a window that stay dense; 0 on dense activations.
    """

    recipe: Recipe
    plans: dict[str, LinearPlan]
    rho: float
    scales: dict[str, Tensor]
    metrics: dict[str, Tensor]
    first: int


def plan_linears(
    recipe: Recipe,
    options: PrepareOptions,
    model: StreamedModel,
    linears: Sequence[Linear],
    windows: Tensor,
    journal: Journal,
    snapshots: Snapshots,
) -> dict[str, Planned]:
    """Run whatever search the recipe asks for.

    Results are kept in ``journal``, tensors in ``snapshots``.

    Returns:
        Candidates by name; a single one but for the allocation "mixed".

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

    def planned(plans: dict[str, LinearPlan]) -> Planned:
        return Planned(recipe.with_plans(plans), plans, rho, scales, metrics, first)

    ways: dict[str, Share] = {}
    if plans is None and recipe.allocation in ("greedy", "mixed"):
        errors = measure(model, linears, windows, first, scales, journal)
        ways["greedy"] = partial(share_in_layers, linears, errors)
    if plans is None and recipe.allocation in ("sensitivity", "mixed"):
        ways["sensitivity"] = partial(share_out, linears, found)
    if recipe.allocation == "mixed" and ways:
        ways["half of each"] = partial(halved, ways["greedy"], ways["sensitivity"])
    if ways and metrics:
        return {
            name: planned(
                add_factors(
                    model, linears, first, found, share, options.sparsity,
                    options.seed, snapshots, name.replace(" ", "-"),
                )
            )
            for name, share in ways.items()
        }  # fmt: skip
    if ways:
        return {
            name: planned(dict(share(options.sparsity))) for name, share in ways.items()
        }
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
    return {recipe.allocation: planned(plans)}


def halved(one: Share, other: Share, sparsity: float) -> dict[str, LinearPlan]:
    """Plans without factors that give a linear the mean of what the two give it."""
    first, second = one(sparsity), other(sparsity)
    return {
        name: LinearPlan((first[name].sparsity + second[name].sparsity) / 2, 1.0)
        for name in first
    }


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
