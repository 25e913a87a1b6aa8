# SPDX-License-Identifier: Apache-2.0
"""The interface of a strategy that allocates sparsity; ``allocators`` lists them."""

from abc import ABC, abstractmethod
from typing import ClassVar

from vllm_rsparse.prepare.recipe.planned import Choice, Planned
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.scores import Scored


class Allocator(ABC):
    """Decides what every linear gets.

    Attributes:
        needs_gradients: whether it reads ``Scored.gradients``.
        takes_rho: whether it uses the recipe's rho; others choose factors themselves.
        takes_planes: whether it allocates bits of weights that are read in planes.
        tries_correction: whether it can decide a correction of "try".
        long: whether allocating at a sparsity is a search of its own, too long to be
            repeated at several in order to find one.
    """

    needs_gradients: ClassVar[bool] = False
    takes_rho: ClassVar[bool] = False
    takes_planes: ClassVar[bool] = False
    tries_correction: ClassVar[bool] = False
    long: ClassVar[bool] = False

    @abstractmethod
    def allocate(self, run: Run, scored: Scored, sparsity: float) -> Planned:
        """Plans that add up to the model's sparsity, factors counted.

        Args:
            run: the model, its calibration text, and the store of results.
            scored: the recipe with its scores.
            sparsity: fraction of the linears' bytes that are not read.
        """

    def repeat(
        self, run: Run, scored: Scored, sparsity: float, choice: Choice
    ) -> Planned:
        """Plans of what ``allocate`` chose at another sparsity, without trials.

        Args:
            run: as for ``allocate``.
            scored: as for ``allocate``.
            sparsity: as for ``allocate``.
            choice: of ``allocate``'s result.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no choices")
