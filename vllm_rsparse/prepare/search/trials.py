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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from vllm_rsparse.prepare.calibration.layer import run_sparse
from vllm_rsparse.prepare.calibration.loss import divergence
from vllm_rsparse.prepare.recipe.plan import Allocation, LinearPlan, mean_of, uniform
from vllm_rsparse.prepare.recipe.planned import Choice, Planned
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
        return choose(self._candidates(run, scored, sparsity))

    def repeat(
        self, run: Run, scored: Scored, sparsity: float, choice: Choice
    ) -> Planned:
        """The same combination; only its ranks are found again."""
        return self._candidates(run, scored, sparsity).planned(choice)

    @staticmethod
    def _candidates(run: Run, scored: Scored, sparsity: float) -> "Candidates":
        one_threshold = OneThreshold().allocation(run, scored)
        name, first = "even", _even(run)
        if run.model.plane_count == 1:
            name, first = "greedy", Greedy().allocation(run, scored)
        mean = partial(mean_of, first, one_threshold)
        allocations: dict[str, Allocation] = {
            name: first,
            "sensitivity": one_threshold,
            "half of each": mean,
        }
        return Candidates(run, scored, allocations, mean, sparsity)


def _even(run: Run) -> Allocation:
    return partial(uniform, run.linears, rho=1.0)


# The corrections that candidates may have, by the recipe's correction.
_CORRECTIONS = {NEVER: [False], ALWAYS: [True], TRY: [False, True]}


@dataclass(frozen=True, eq=False)
class Candidates:
    """The plans of every choice that can be made at one sparsity.

    Attributes:
        run: the model and its calibration text.
        scored: the recipe, and the sensitivity pass with the dense model's states.
        allocations: of the channels, by name; at least one.
        typical: the allocation that ranks are chosen for; they hardly depend on it.
        sparsity: of the model, factors counted.
    """

    run: Run
    scored: Scored
    allocations: Mapping[str, Allocation]
    typical: Allocation
    sparsity: float
    _ranks: dict[bool, dict[str, int]] = field(default_factory=dict, init=False)

    @property
    def corrections(self) -> list[bool]:
        """Whether there may be a correction: what the recipe allows."""
        return _CORRECTIONS[self.scored.recipe.correction]

    @property
    def plain(self) -> list[Choice]:
        """Every allocation with every correction."""
        return [
            Choice(name, corrected)
            for name in self.allocations
            for corrected in self.corrections
        ]

    def find_ranks(self, corrections: Sequence[bool]) -> None:
        """Find the ranks of several choices of the correction together."""
        if self.scored.metrics:
            plans = self.typical(self.sparsity)
            found = find_ranks(self.run, self.scored, plans, corrections)
            self._ranks.update(found)

    def ranks(self, corrected: bool) -> Mapping[str, int]:
        """Ranks of the factors that pay; they depend on the correction."""
        if corrected not in self._ranks:
            self.find_ranks([corrected])
        return self._ranks.get(corrected, {})

    def planned(self, choice: Choice) -> Planned:
        """The plans of a choice."""
        correction = ALWAYS if choice.corrected else NEVER
        planned = self.scored.planned(self._plans(choice), correction)
        return replace(planned, choice=choice)

    def _plans(self, choice: Choice) -> Mapping[str, LinearPlan]:
        allocation = self.allocations[choice.origin]
        if choice.evened:
            allocation = partial(mean_of, allocation, _even(self.run))
        if not choice.factors:
            return allocation(self.sparsity)
        ranks = self.ranks(choice.corrected)
        return with_factors(self.run.linears, ranks, allocation, self.sparsity)


def choose(candidates: Candidates) -> Planned:
    """Choose plans, correction and factors by the KL divergence of calibrated models.

    Returns:
        The plans of the choice, with the divergences of all that were tried.
    """
    candidates.find_ranks(candidates.corrections)  # before the trials, which are long
    trials = _Trials(candidates)
    trials.add(candidates.plain)
    trials.add([replace(trials.best, evened=True)])
    best = trials.best
    if any(candidates.ranks(best.corrected).values()):
        trials.add([replace(best, factors=False)])
    trials.report()
    divergences = {c.label: kl for c, kl in trials.divergences.items()}
    return replace(candidates.planned(trials.best), trials=divergences)


class _Trials:
    """Tries candidates on the first windows.

    Attributes:
        divergences: KL(dense || sparse), nats, in the order in which they were tried.
    """

    def __init__(self, candidates: Candidates) -> None:
        run = candidates.run
        tried = math.ceil(TRIED_TOKENS / run.windows.shape[1])
        states = candidates.scored.gradients.states
        self._candidates = candidates
        self._run = run.with_windows(run.windows[:tried])
        self._dense = states.leaving()[:tried].to(run.model.device)
        self.divergences: dict[Choice, float] = {}

    def add(self, choices: Iterable[Choice]) -> None:
        """Try them, except those that an interrupted run has already tried."""
        store = self._run.store
        for choice in choices:
            key = self._run.key("divergence", choice.name)
            known = store.recall(key)
            if known is None:
                planned = self._candidates.planned(choice)
                hidden = run_sparse(self._run, planned, choice.label)
                known = divergence(self._run, hidden, self._dense)
                store.record({key: known})
            self.divergences[choice] = known

    @property
    def best(self) -> Choice:
        """The one with the smallest divergence, the first of equal ones."""
        return min(self.divergences, key=self.divergences.__getitem__)

    def report(self) -> None:
        """Log the divergences."""
        logger.info(
            "KL(dense || sparse) on %d windows of the calibration text, nats: %s;"
            " the smallest is chosen",
            len(self._run.windows),
            ", ".join(f"{c.label} {kl:.4f}" for c, kl in self.divergences.items()),
        )
