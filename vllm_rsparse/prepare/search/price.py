# SPDX-License-Identifier: Apache-2.0
"""The largest sparsity whose loss on held-out answers stays within a price.

The KL divergence grows about exponentially with the sparsity (sevenfold from 30 to 50%,
docs/accuracy.md). Its logarithm is therefore interpolated first; should that not end
the search, the interval is halved.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from vllm_rsparse.artifact.card import HeldOutLoss
from vllm_rsparse.errors import PrepareError
from vllm_rsparse.prepare.calibration.held_out import HeldOut
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
        tried: divergence of each sparsity that was tried, in that order.
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
    tried: dict[float, float] = {}

    def measure(percent: int) -> float:
        sparsity = percent / 100
        key = run.at(sparsity).key("held-out", "divergence")
        known = run.store.recall(key)
        if known is None:
            known = held_out.divergence(planner.plan(sparsity))
            run.store.record({key: known})
        tried[sparsity] = known
        logger.info(
            "sparsity %.2f: KL(dense || sparse) %.4g nats on %d held-out tokens"
            " (--max-kl %g)",
            sparsity,
            known,
            held_out.tokens,
            max_kl,
        )
        return known

    percent = largest_within(measure, max_kl)
    if percent is None:
        raise PrepareError(
            f"--max-kl {max_kl:g}: out of reach, as the KL divergence is"
            f" {min(tried.values()):.4g} nats at a sparsity of {min(tried):g}, the"
            " smallest that is tried; allow more"
        )
    sparsity = percent / 100
    return Priced(max_kl, sparsity, tried[sparsity], held_out.tokens, tried)


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
