# SPDX-License-Identifier: Apache-2.0
"""The largest sparsity whose loss on held-out answers stays within a price.

The KL divergence grows about exponentially with the sparsity (nearly eightfold from
30 to 50%, docs/accuracy.md). Its logarithm is therefore interpolated first; should that
not end the search, the interval is halved.

A recipe's trials ("mixed") take most of the time of a sparsity. They run at the first
one that is tried, whose choice the others repeat, and again at the one that is found,
whose plans are then those of a run with that sparsity alone.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from vllm_rsparse.artifact.card import HeldOutLoss
from vllm_rsparse.errors import PrepareError
from vllm_rsparse.prepare.calibration.held_out import HeldOut
from vllm_rsparse.prepare.recipe.planned import Choice, Planned
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.planning import Planner

logger = logging.getLogger(__name__)

# Sparsities that are tried, in percent. Outside, nothing is gained, or nothing is left.
LEAST, MOST = 5, 95
_FIRST = 40
# Growth of the logarithm of the divergence per percent.
_GROWTH = math.log(7) / 20
# Interpolated sparsities that are tried before intervals are halved.
_INTERPOLATED = 4


@dataclass(frozen=True)
class Priced:
    """What was found.

    Attributes:
        max_kl: the price, nats.
        sparsity: the largest of the tried ones that stays within it.
        divergence: its KL divergence on the held-out answers.
        tokens: positions that it was measured on.
        tried: divergence of each sparsity that was tried, in that order; after trials,
            that of the first one's choice, except for ``sparsity``.
    """

    max_kl: float
    sparsity: float
    divergence: float
    tokens: int
    tried: dict[float, float]

    @property
    def loss(self) -> HeldOutLoss:
        """For the artifact's provenance."""
        tried = {f"{sparsity:g}": kl for sparsity, kl in self.tried.items()}
        return HeldOutLoss(self.divergence, self.tokens, self.max_kl, tried)


def find_priced(run: Run, planner: Planner, held_out: HeldOut, max_kl: float) -> Priced:
    """Search; every divergence is kept in the run's store.

    Args:
        run: the model, its calibration text, and the store of results.
        planner: allocates at any sparsity.
        held_out: measures plans.
        max_kl: the price, nats.

    Raises:
        PrepareError: the smallest sparsity loses more.
    """
    search = _Search(run, planner, held_out, max_kl)
    percent = largest_within(search.measure_repeated, max_kl)
    # The trials at another sparsity may choose otherwise, and what they choose for
    # the calibration text may lose more here.
    while percent is not None and search.measure(percent) > max_kl:
        percent = percent - 1 if percent > LEAST else None
    tried = search.tried
    if percent is None:
        raise PrepareError(
            f"--max-kl {max_kl:g}: out of reach, as the KL divergence is"
            f" {min(tried.values()):.4g} nats at a sparsity of {min(tried):g}, the"
            " smallest that is tried; allow more"
        )
    sparsity = percent / 100
    return Priced(max_kl, sparsity, tried[sparsity], held_out.tokens, tried)


class _Search:
    """Measures sparsities, given in percent.

    Attributes:
        tried: divergence of each sparsity, the last that was measured.
    """

    def __init__(
        self, run: Run, planner: Planner, held_out: HeldOut, max_kl: float
    ) -> None:
        self._run = run
        self._planner = planner
        self._held_out = held_out
        self._max_kl = max_kl
        self._choice: Choice | None = None
        self.tried: dict[float, float] = {}

    def measure_repeated(self, percent: int) -> float:
        """Of the plans that repeat the choice of the first sparsity."""
        planned = self._planner.plan(percent / 100, self._choice)
        self._choice = planned.choice
        return self._measure(percent / 100, planned)

    def measure(self, percent: int) -> float:
        """Of the plans that the sparsity has in a run with it alone."""
        if self._choice is None:  # they are the same
            return self.tried[percent / 100]
        return self._measure(percent / 100, self._planner.plan(percent / 100))

    def _measure(self, sparsity: float, planned: Planned) -> float:
        item = "divergence"
        if planned.choice is not None:
            item = f"divergence of {planned.choice.name}"
        key = self._run.at(sparsity).key("held-out", item)
        known = self._run.store.recall(key)
        if known is None:
            known = self._held_out.divergence(planned)
            self._run.store.record({key: known})
        if self.tried.get(sparsity) != known:
            logger.info(
                "sparsity %.2f: KL(dense || sparse) %.4g nats on %d held-out tokens"
                " (--max-kl %g)",
                sparsity,
                known,
                self._held_out.tokens,
                self._max_kl,
            )
        self.tried[sparsity] = known
        return known


def largest_within(measure: Callable[[int], float], limit: float) -> int | None:
    """The largest percentage whose measure is within a limit; None if none is.

    Args:
        measure: grows with the percentage.
        limit: more than 0.
    """
    measured: dict[int, float] = {}
    within, beyond = LEAST - 1, MOST + 1
    while beyond - within > 1:
        guess = (within + beyond) // 2
        if len(measured) < _INTERPOLATED:
            guess = _interpolated(measured, within, beyond, limit)
        guess = min(max(guess, within + 1), beyond - 1)
        measured[guess] = measure(guess)
        if measured[guess] <= limit:
            within = guess
        else:
            beyond = guess
    return within if within >= LEAST else None


def _interpolated(
    measured: dict[int, float], within: int, beyond: int, limit: float
) -> int:
    """The percentage at which the logarithm of the measure should meet the limit."""
    if not measured:
        return _FIRST
    # The two measured ones nearest to the limit, on either side if there are such.
    around = [x for x in (within, beyond) if x in measured]
    others = sorted(measured.keys() - set(around), key=lambda x: abs(x - around[0]))
    x, *rest = [*around, *others][:2]
    logarithm = _logarithm(measured[x])
    growth = _GROWTH
    for other in rest:
        growth = (_logarithm(measured[other]) - logarithm) / (other - x)
    if growth <= 0:  # rounding, or a broken model
        return (within + beyond) // 2
    return x + math.floor((_logarithm(limit) - logarithm) / growth)


def _logarithm(value: float) -> float:
    """Finite for any measure: rounding can make it 0, and a broken model infinite."""
    return math.log(min(max(value, 1e-300), 1e300))
