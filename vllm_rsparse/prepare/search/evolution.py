# SPDX-License-Identifier: Apache-2.0
"""The paper's evolutionary search (its Algorithm 1), by perplexity of the whole model.

In each generation the better half of the plans stays and has equally many children:
every linear's genes come from one of two parents, and mutate with probability 0.5. The
genes are rho of every linear at one common sparsity, as in the paper, or sparsity and
rho of every linear, brought to the model's byte budget by a common shift of the
sparsities.
"""

import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.allocator import Allocator
from vllm_rsparse.prepare.search.candidates import Candidates
from vllm_rsparse.prepare.search.scores import Scored
from vllm_rsparse.prepare.store.run_store import Key

MUTATION = 0.5
# The paper's initial value, and the standard deviations of a mutation.
START_RHO = 0.95
RHO_STEP = 0.05
SPARSITY_STEP = 0.08
# The recipe that the paper's authors publish goes down to 0.02, but 193 of its 224
# linears have 1. The ranks that go with this are found before the search.
MIN_RHO = 0.7
MAX_SPARSITY = 0.95
# Seconds between results on disk, unless one candidate takes longer.
NOTE_EVERY = 30.0
_STAGE = "evolution"

Plans = dict[str, LinearPlan]


@dataclass(frozen=True)
class Evolution(Allocator):
    """The search, with the paper's sizes.

    The same seed finds the same plans. Losses are kept in the run's store.

    Attributes:
        joint: search sparsities too, not only rho.
        population: plans of a generation.
        generations: after the first.
    """

    long = True

    joint: bool
    population: int = 32
    generations: int = 5

    def allocate(self, run: Run, scored: Scored, sparsity: float) -> Planned:
        """The best plans found; the paper takes 16 windows."""
        # Candidates are compared as decoding would run them, behind a dense prompt,
        # on whatever activations the thresholds are calibrated.
        run = run.with_dense_prefix()
        low = max(0.0, 2 * sparsity - 1) if self.joint else sparsity
        candidates = Candidates(run, LinearPlan(low, MIN_RHO))
        generator = random.Random(run.seed)
        breeder = Breeder(run.linears, sparsity, low, self.joint, generator)
        children = self.population // 2
        survivors = self.population - children
        total = self.population + self.generations * children
        with tqdm(total=total, desc="evolutionary", unit="candidate") as progress:
            ranked: list[tuple[float, Plans]] = []

            def rank(new: list[Plans]) -> list[tuple[float, Plans]]:
                losses = _losses(run, candidates, new, progress)
                # Stable: of equal losses the older plan stays.
                both = ranked + list(zip(losses, new, strict=True))
                return sorted(both, key=lambda pair: pair[0])[: self.population]

            ranked = rank(breeder.start(self.population))
            for _ in range(self.generations):
                ranked = ranked[:survivors]
                parents = [plans for _, plans in ranked]
                ranked = rank([breeder.child(parents) for _ in range(children)])
        return scored.planned(ranked[0][1])


class Breeder:
    """Makes plans that all read the same number of bytes.

    Args:
        linears: what a plan is for.
        sparsity: of the model.
        low: smallest sparsity of a linear.
        joint: whether sparsities differ from linear to linear.
        generator: source of all randomness; only ``random``, ``gauss`` and ``sample``
            of it are used.
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        sparsity: float,
        low: float,
        joint: bool,
        generator: random.Random,
    ) -> None:
        self._sizes = {
            linear.name: linear.shape[0] * linear.shape[1] for linear in linears
        }
        self._sparsity = sparsity
        self._low = low
        self._joint = joint
        self._random = generator

    def start(self, count: int) -> list[Plans]:
        """The uniform plan with and without factors, and mutations of the first."""
        uniform = dict.fromkeys(self._sizes, LinearPlan(self._sparsity, START_RHO))
        exact = dict.fromkeys(self._sizes, LinearPlan(self._sparsity, 1.0))
        others = [self._mutated(uniform, 1.0) for _ in range(count - 2)]
        return [uniform, exact, *others]

    def child(self, parents: Sequence[Plans]) -> Plans:
        """A mutated mixture of two of them."""
        mother, father = self._random.sample(range(len(parents)), 2)
        mixed = {
            name: parents[mother if self._random.random() < 0.5 else father][name]
            for name in self._sizes
        }
        return self._mutated(mixed, MUTATION)

    def _mutated(self, plans: Plans, probability: float) -> Plans:
        result = {}
        for name, plan in plans.items():
            sparsity, rho = plan.sparsity, plan.rho
            if self._random.random() < probability:
                rho += self._random.gauss(0.0, RHO_STEP)
                rho = min(max(rho, MIN_RHO), 1.0)
                if self._joint:
                    sparsity += self._random.gauss(0.0, SPARSITY_STEP)
            result[name] = LinearPlan(sparsity, rho)
        return self._on_budget(result) if self._joint else result

    def _on_budget(self, plans: Plans) -> Plans:
        """Shift all sparsities equally, within bounds, to the model's sparsity."""

        def shifted(by: float) -> dict[str, float]:
            return {
                name: min(max(plan.sparsity + by, self._low), self._high)
                for name, plan in plans.items()
            }

        total = sum(self._sizes.values())
        below, above = -1.0, 1.0
        for _ in range(50):
            middle = (below + above) / 2
            skipped = sum(s * self._sizes[name] for name, s in shifted(middle).items())
            if skipped < self._sparsity * total:
                below = middle
            else:
                above = middle
        return {
            name: LinearPlan(share, plans[name].rho)
            for name, share in shifted(above).items()
        }

    @property
    def _high(self) -> float:
        return max(MAX_SPARSITY, self._sparsity)


def _losses(
    run: Run, candidates: Candidates, new: Sequence[Plans], progress: tqdm
) -> list[float]:
    """Losses of plans, in order; losses in the store are not computed again."""
    store = run.store
    keys = [_key(run, plans) for plans in new]
    missing = [i for i, key in enumerate(keys) if store.recall(key) is None]
    progress.update(len(new) - len(missing))
    size = 1  # candidates at a time: each chunk loads every layer once
    while missing:
        chunk, missing = missing[:size], missing[size:]
        started = time.monotonic()
        losses = candidates.losses([new[i] for i in chunk])
        seconds = (time.monotonic() - started) / len(chunk)
        size = min(max(1, int(NOTE_EVERY / max(seconds, 1e-3))), candidates.at_once)
        store.record({keys[i]: loss for i, loss in zip(chunk, losses, strict=True)})
        progress.update(len(chunk))
        progress.set_postfix_str(f"best {store.smallest(keys[0].stage):.4f} nats")
    return [store.recall(key) for key in keys]


def _key(run: Run, plans: Mapping[str, LinearPlan]) -> Key:
    genes = tuple((name, p.sparsity, p.rho) for name, p in sorted(plans.items()))
    return run.key(_STAGE, hashlib.sha256(repr(genes).encode()).hexdigest()[:16])
