# SPDX-License-Identifier: Apache-2.0
"""What calibration needs to know."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.recipe.recipes import ALWAYS, Recipe


@dataclass(frozen=True)
class Choice:
    """One combination that an allocation can try, or has chosen by trials.

    Attributes:
        origin: name of the allocation of the channels.
        corrected: with the constant correction.
        evened: the allocation is moved half way to an even one.
        factors: with factors where they pay.
    """

    origin: str
    corrected: bool
    evened: bool = False
    factors: bool = True

    @property
    def name(self) -> str:
        """Name of its results in the run's store."""
        flags = {
            "corrected": self.corrected,
            "evened": self.evened,
            "without factors": not self.factors,
        }
        words = [self.origin, *(word for word, given in flags.items() if given)]
        return ", ".join(words)

    @property
    def label(self) -> str:
        """For the log and the artifact's provenance."""
        if not self.factors:
            return "without factors"
        if self.evened:
            return "half evenly"
        return f"{self.origin}, corrected" if self.corrected else self.origin


@dataclass(frozen=True, eq=False)
class Planned:
    """A recipe with the results of its searches.

    Attributes:
        recipe: with the plan of every linear, and its correction settled.
        scales: float32 [K] by linear, the score is |x| times it; a linear that is not
            in it has the norms of its columns.
        metrics: [N, N] by linear, for regressed factors; others have the SVD.
        trials: KL(dense || sparse), nats, of each candidate where some were tried, in
            that order.
        choice: that the trials led to; None where nothing was tried.
    """

    recipe: Recipe
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    trials: Mapping[str, float] = field(default_factory=dict)
    choice: Choice | None = None

    @property
    def plans(self) -> Mapping[str, LinearPlan]:
        """The plan of every linear by name."""
        if self.recipe.linears is None:
            raise ValueError(f"recipe {self.recipe.name!r} has no plans yet")
        return self.recipe.linears

    @property
    def corrected(self) -> bool:
        """Whether every linear has a constant correction."""
        return self.recipe.correction == ALWAYS
