# SPDX-License-Identifier: Apache-2.0
"""How the sparsity is allocated: a recipe maps every linear to a plan."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vllm_rsparse.artifact.schema import factor_rank
from vllm_rsparse.model.linears import Linear


@dataclass(frozen=True)
class LinearPlan:
    """What one linear gets.

    Attributes:
        sparsity: s, fraction of the dense bytes not read.
        rho: share of the kept budget for exact channels; 1 means no factors.
    """

    sparsity: float
    rho: float

    @property
    def keep(self) -> float:
        """Fraction of the channels that the exact path keeps."""
        return self.rho * (1.0 - self.sparsity)

    @classmethod
    def with_rank(cls, keep: float, rank: int, shape: tuple[int, int]) -> "LinearPlan":
        """The plan that keeps this fraction of the channels and has this rank."""
        n, k = shape
        # Half a rank more, because `rank` rounds down.
        budget = keep + (rank + 0.5) * (n + k) / (n * k)
        if rank == 0 or budget >= 1.0:
            return cls(1.0 - keep, 1.0)
        return cls(1.0 - budget, keep / budget)

    def rank(self, shape: tuple[int, int]) -> int:
        """Rank of the factors for a linear of shape (N, K)."""
        return factor_rank(*shape, self.sparsity, self.rho)


# A way to allocate: the model's sparsity -> plans without factors, by linear.
Allocation = Callable[[float], Mapping[str, LinearPlan]]


def uniform(
    linears: Iterable[Linear], sparsity: float, rho: float
) -> dict[str, LinearPlan]:
    """The paper's uniform recipe: the same s and rho everywhere."""
    plan = LinearPlan(sparsity, rho)
    return {linear.name: plan for linear in linears}


def mean_of(
    first: Allocation, second: Allocation, sparsity: float
) -> dict[str, LinearPlan]:
    """Plans without factors: each linear gets the mean of the two allocations."""
    plans, others = first(sparsity), second(sparsity)
    return {
        name: LinearPlan((plan.sparsity + others[name].sparsity) / 2, 1.0)
        for name, plan in plans.items()
    }
