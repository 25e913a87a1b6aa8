# SPDX-License-Identifier: Apache-2.0
"""Recipes: how channels are scored, how the sparsity is allocated, on what inputs.

Nothing here imports torch: ``--help`` lists the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_rsparse.errors import PrepareError

if TYPE_CHECKING:
    from vllm_rsparse.prepare.recipe.plan import LinearPlan

SCORES = ("magnitude", "norm", "sensitivity")
ACTIVATIONS = ("dense", "sparse")
FACTORS = ("svd", "regressed")
NEVER, ALWAYS, TRY = CORRECTIONS = ("never", "always", "try")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices of one preparation.

    Attributes:
        name: for messages and provenance; nothing depends on it.
        score: the factor of |x_j| that ranks channels: 1 ("magnitude"), the norm of the
            weight's column ("norm"), or a mean of the loss's gradient with respect to
            x_j through this linear ("sensitivity", see ``search.sensitivity``).
        allocation: every linear the same ("uniform"), least added error per byte within
            each layer ("greedy"), one threshold on the loss per byte for the whole
            model ("sensitivity"), the best of these two, their mean, and a variant
            closer to even ("mixed"), the paper's search over rho ("evolutionary") or
            over sparsity and rho ("evolutionary-joint") of every linear. The names are
            those of ``search.allocators``.
        activations: calibrate thresholds on the linears' inputs in the dense model
            ("dense"), or in the sparse model, from the first layer on ("sparse").
        correction: add the mean of what is dropped, as a constant per linear: "never",
            "always", or, where the allocation tries candidates ("mixed"), "try" both
            and add the constant only if it reduces the loss.
        factors: where a plan has a rank: the truncated SVD of the weight ("svd"), or,
            for q and k, the best approximation of the dropped part ("regressed").
        rho: share of the kept bytes for exact channels where the allocation does not
            choose it; ``--rho`` replaces it.
        linears: plan of every linear by name; None: as ``allocation`` finds.
    """

    name: str
    score: str
    allocation: str
    activations: str
    correction: str = NEVER
    factors: str = "svd"
    rho: float = 1.0
    linears: "Mapping[str, LinearPlan] | None" = None

    def __post_init__(self) -> None:
        for key, allowed in (
            ("score", SCORES),
            ("activations", ACTIVATIONS),
            ("correction", CORRECTIONS),
            ("factors", FACTORS),
        ):
            if getattr(self, key) not in allowed:
                raise PrepareError(
                    f"recipe {self.name!r}: {key} must be one of {', '.join(allowed)},"
                    f" got {getattr(self, key)!r}"
                )
        if self.factors == "regressed" and self.score != "sensitivity":
            raise PrepareError(
                f"recipe {self.name!r}: factors 'regressed' uses the loss's gradients,"
                f" so it needs score 'sensitivity', got {self.score!r}"
            )
        if self.correction == TRY and self.linears is not None:
            raise PrepareError(
                f"recipe {self.name!r}: correction {TRY!r} goes with a search, but"
                " `linears` fixes its result; choose 'never' or 'always'"
            )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # The paper's own: 5% of the kept bytes are for factors.
        Recipe(
            name="uniform",
            score="norm",
            allocation="uniform",
            activations="dense",
            rho=0.95,
        ),
        Recipe(
            name="teal",
            score="magnitude",
            allocation="uniform",
            activations="dense",
        ),
        Recipe(
            name="wina",
            score="norm",
            allocation="uniform",
            activations="dense",
        ),
        Recipe(
            name="greedy",
            score="norm",
            allocation="greedy",
            activations="sparse",
        ),
        Recipe(
            name="best",
            score="sensitivity",
            allocation="mixed",
            activations="sparse",
            correction=TRY,
            factors="regressed",
        ),
        Recipe(
            name="evolutionary",
            score="norm",
            allocation="evolutionary",
            activations="dense",
        ),
        Recipe(
            name="evolutionary-joint",
            score="norm",
            allocation="evolutionary-joint",
            activations="sparse",
            correction=ALWAYS,
        ),
    )
}
