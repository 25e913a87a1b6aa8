# SPDX-License-Identifier: Apache-2.0
"""Choices that no estimate makes well, made by trials on the calibration text.

An allocation by gradients ("sensitivity") is valid for small errors only and starves
the first layers of a deep model; measured errors ("greedy") consider one linear at a
time; at high sparsity neither is valid, and plans closer to even ones lose less. The
constant correction is optimal for a linear's own output, but harms deep models. Factors
do not always pay either. docs/notes/recipes.md has the measurements.

Each candidate is therefore calibrated as the artifact would be, on ``TRIED_TOKENS``
tokens, and the one whose predictions stay closest to the dense model's is chosen.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from vllm_rsparse.prepare.calibration.layer import run_sparse
from vllm_rsparse.prepare.calibration.loss import divergence
from vllm_rsparse.prepare.recipe.plan import Allocation, LinearPlan, mean_of, uniform
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.recipe.recipes import ALWAYS, NEVER, TRY
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.allocator import Allocator
from vllm_rsparse.prepare.search.factors import find_ranks, with_factors
from vllm_rsparse.prepare.search.greedy import Greedy
from vllm_rsparse.prepare.search.one_threshold import OneThreshold
from vllm_rsparse.prepare.search.scores import Scored

logger = logging.getLogger(__name__)

# Calibration tokens for the trials, in whole windows. With 4096, the two best
# candidates of the bundled model at 60% (0.470 both) were ranked in the wrong order.
TRIED_TOKENS = 8192
# Three allocations with and without a correction, one evened, one without factors.
CANDIDATES = 8


class Mixed(Allocator):
    """Tries two strategies and their mean, then variants of the best of them."""

    needs_gradients = True
    takes_planes = True
    tries_correction = True

    def allocate(self, run: Run, scored: Scored, sparsity: float) -> Planned:
        """Calibrates up to eight candidates.

        Weights that are read in planes have even shares instead of measured errors,
        which are of dropped channels.
        """
        one_threshold = OneThreshold().allocation(run, scored)
        name, first = "even", self._even(run)
        if run.model.plane_count == 1:
            name, first = "greedy", Greedy().allocation(run, scored)
        mean = partial(mean_of, first, one_threshold)
        allocations: dict[str, Allocation] = {
            name: first,
            "sensitivity": one_threshold,
            "half of each": mean,
        }
        return choose(run, scored, allocations, mean, sparsity)

    @staticmethod
    def _even(run: Run) -> Allocation:
        return partial(uniform, run.linears, rho=1.0)


@dataclass(frozen=True)
class Candidate:
    """One combination to try.

    Attributes:
        origin: name of the allocation that it is derived from.
        allocation: of the channels; with ``evened``, moved half way to even ones.
        corrected: with the constant correction.
        evened: see ``allocation``.
        factors: with factors where they pay.
    """

    origin: str
    allocation: Allocation
    corrected: bool
    evened: bool = False
    factors: bool = True

    @property
    def name(self) -> str:
        """Name of its divergence in the run's store."""
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


def choose(
    run: Run,
    scored: Scored,
    allocations: Mapping[str, Allocation],
    typical: Allocation,
    sparsity: float,
) -> Planned:
    """Choose plans, correction and factors by the KL divergence of calibrated models.

    Args:
        run: the model and its calibration text.
        scored: the recipe, and the sensitivity pass with the dense model's states.
        allocations: of the channels, by name; at least one.
        typical: the allocation that ranks are chosen for; they hardly depend on it.
        sparsity: of the model, factors counted.
    """
    corrections = _CORRECTIONS[scored.recipe.correction]
    ranks: dict[bool, Mapping[str, int]] = {corrected: {} for corrected in corrections}
    if scored.metrics:
        plans = typical(sparsity)
        for corrected in corrections:
            ranks[corrected] = find_ranks(run, scored, plans, corrected)
    trials = _Trials(run, scored, ranks, sparsity)
    trials.add(
        Candidate(name, allocation, corrected)
        for name, allocation in allocations.items()
        for corrected in corrections
    )
    best = trials.best
    even = partial(uniform, run.linears, rho=1.0)
    evened = partial(mean_of, best.allocation, even)
    trials.add([replace(best, allocation=evened, evened=True)])
    best = trials.best
    if any(ranks[best.corrected].values()):
        trials.add([replace(best, factors=False)])
    trials.report()
    return trials.planned(trials.best)


# The corrections that candidates may have, by the recipe's correction.
_CORRECTIONS = {NEVER: [False], ALWAYS: [True], TRY: [False, True]}


class _Trials:
    """Divergences of candidates, in the order in which they were tried."""

    def __init__(
        self,
        run: Run,
        scored: Scored,
        ranks: Mapping[bool, Mapping[str, int]],
        sparsity: float,
    ) -> None:
        tried = math.ceil(TRIED_TOKENS / run.windows.shape[1])
        self._run = run.with_windows(run.windows[:tried])
        self._dense = scored.gradients.states.leaving()[:tried].to(run.model.device)
        self._scored = scored
        self._ranks = ranks
        self._sparsity = sparsity
        self._divergences: dict[Candidate, float] = {}

    def add(self, candidates: Iterable[Candidate]) -> None:
        """Try them, except those that an interrupted run has already tried."""
        store = self._run.store
        for candidate in candidates:
            key = self._run.key("divergence", candidate.name)
            known = store.recall(key)
            if known is None:
                known = self._divergence(candidate)
                store.record({key: known})
            self._divergences[candidate] = known

    @property
    def best(self) -> Candidate:
        """The candidate with the smallest divergence, the first of equal ones."""
        return min(self._divergences, key=self._divergences.__getitem__)

    def planned(self, candidate: Candidate) -> Planned:
        """The plans of a candidate, and all divergences."""
        planned = self._scored.planned(
            self._plans(candidate), ALWAYS if candidate.corrected else NEVER
        )
        trials = {c.label: divergence for c, divergence in self._divergences.items()}
        return replace(planned, trials=trials)

    def report(self) -> None:
        """Log the divergences."""
        logger.info(
            "KL(dense || sparse) on %d windows of the calibration text, nats: %s;"
            " the smallest is chosen",
            len(self._run.windows),
            ", ".join(f"{c.label} {kl:.4f}" for c, kl in self._divergences.items()),
        )

    def _divergence(self, candidate: Candidate) -> float:
        run = self._run
        hidden = run_sparse(run, self.planned(candidate), candidate.label)
        return divergence(run, hidden, self._dense)

    def _plans(self, candidate: Candidate) -> Mapping[str, LinearPlan]:
        if not candidate.factors:
            return candidate.allocation(self._sparsity)
        return with_factors(
            self._run.linears,
            self._ranks[candidate.corrected],
            candidate.allocation,
            self._sparsity,
        )
