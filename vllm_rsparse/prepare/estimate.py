# SPDX-License-Identifier: Apache-2.0
"""How long a preparation takes on a CPU, before it starts.

Nearly all of the time goes into products of activations and weights. A recipe's cost is
therefore counted in forward passes of the linears over the calibration text, and the
speed of this machine's products is measured. With ``wina`` and 1B parameters, 8192
tokens and one thread, 95% of the processor time of a layer is accounted for; attention,
sorting and reading are not.
"""

import logging
import time
from collections.abc import Sequence

import torch

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.calibration.linear import CPU_ERROR_TOKENS
from vllm_rsparse.prepare.recipe.recipes import RECIPES, Recipe
from vllm_rsparse.prepare.search.greedy import CPU_SEARCH_TOKENS, LEVELS
from vllm_rsparse.prepare.search.trials import CANDIDATES, TRIED_TOKENS
from vllm_rsparse.text_table import counted

logger = logging.getLogger(__name__)

# Estimates above are a warning that names a cheaper recipe.
LONG = 30 * 60.0
# Forward, forward again with gradients, their way back, and what each channel costs.
_GRADIENT_PASSES = 4.0
# Each linear once, sparse (``calibration.replay``), and what the prefix adds.
_SPARSE_PASSES = 1.1
# A linear is made sparse while the rest of its layer runs dense; outputs of the linears
# before it are replayed.
_LINEARS_OF_A_LAYER = 7
_PROBE_PASSES = 0.74
# Candidates of the paper's search, at any depth.
_EVOLUTION = 112
# Sparsities that --max-kl usually tries, and at how many of them there are trials.
TRIED_FOR_PRICE = 4
TRIALS_FOR_PRICE = 2
_PRODUCT = 2048
_ROWS = 512
# Seconds of one row from which more rows tell nothing new: 0.8 GFLOP/s.
_SLOW = 0.01
# Operations per second that every machine reaches.
_SLOWEST = 5e8
# A share of the time that another dtype must stay below to be named.
_WORTHWHILE = 0.7
# Seconds up to which a run is not worth a message.
_SHORT = 60.0


def warn_if_long(
    recipe: Recipe,
    linears: Sequence[Linear],
    tokens: int,
    dtype: torch.dtype,
    targets: int,
    searches: int,
) -> None:
    """Say how long a preparation on a CPU will take, if that is minutes.

    Args:
        recipe: of the run.
        linears: all linears that take part.
        tokens: of the calibration text.
        dtype: of calibration.
        targets: sparsities that are tried or written.
        searches: those of them at which the recipe's trials run.
    """
    elements = sum(linear.shape[0] * linear.shape[1] for linear in linears)

    def operations(other: Recipe) -> float:
        return 2.0 * elements * tokens * passes(other, tokens, targets, searches)

    if operations(recipe) / _SLOWEST < _SHORT:
        return  # on any machine; measuring its speed may take longer
    speed = product_speed(dtype)

    def seconds(other: Recipe) -> float:
        return operations(other) / speed

    mine = seconds(recipe)
    cheap = RECIPES["wina"]
    if mine > LONG and seconds(cheap) < mine / 2:
        logger.warning(
            "recipe %r will take about %s on this CPU; %s--recipe %s takes about %s and"
            " loses more (docs/accuracy.md), and fewer --calibration-samples take less"
            " in proportion",
            recipe.name,
            _words(mine),
            _half_precision(operations(recipe), mine, dtype),
            cheap.name,
            _words(seconds(cheap)),
        )
    elif mine > _SHORT:
        logger.info("this takes about %s on this CPU", _words(mine))


def _half_precision(operations: float, seconds: float, dtype: torch.dtype) -> str:
    """What the warning says of bfloat16, where this CPU multiplies it faster."""
    if dtype == torch.bfloat16:
        return ""
    faster = operations / product_speed(torch.bfloat16)
    if faster > _WORTHWHILE * seconds:
        return ""
    return f"--dtype bfloat16 takes about {_words(faster)}, "


def passes(recipe: Recipe, tokens: int, targets: int = 1, searches: int = 1) -> float:
    """Forward passes of all linears over the calibration text that a recipe costs.

    Args:
        recipe: any.
        tokens: of the text.
        targets: sparsities.
        searches: those of them at which its trials run.
    """
    errors = 2 * min(1.0, CPU_ERROR_TOKENS / tokens)
    sparse = recipe.activations == "sparse"
    shared = 0.0 if sparse else 1.0
    each = errors + (_SPARSE_PASSES if sparse else 0.0)
    if recipe.score == "sensitivity":
        shared += _GRADIENT_PASSES
    if recipe.linears is None:
        if recipe.allocation in ("greedy", "mixed"):
            runs = _LINEARS_OF_A_LAYER * (len(LEVELS) - 1)
            shared += _PROBE_PASSES * runs * min(1.0, CPU_SEARCH_TOKENS / tokens)
        if recipe.allocation == "mixed":
            trials = CANDIDATES * _SPARSE_PASSES * min(1.0, TRIED_TOKENS / tokens)
            shared += searches * trials
        if recipe.allocation.startswith("evolutionary"):
            each += _EVOLUTION
    return shared + targets * each


def product_speed(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product on the CPU; takes 0.1 s.

    One row comes first: a processor that emulates float16 takes 10 s for all of them,
    at the same speed.
    """
    weight = torch.ones(_PRODUCT, _PRODUCT, dtype=dtype)
    # The first product also starts the library.
    taken = min(_seconds_of(1, weight), _seconds_of(1, weight))
    rows = 1
    if taken < _SLOW:
        rows = _ROWS
        taken = min(_seconds_of(rows, weight) for _ in range(3))
    return 2.0 * rows * _PRODUCT**2 / taken


def _seconds_of(rows: int, weight: torch.Tensor) -> float:
    x = torch.ones(rows, _PRODUCT, dtype=weight.dtype)
    started = time.perf_counter()
    x @ weight
    return max(time.perf_counter() - started, 1e-9)


def _words(seconds: float) -> str:
    """A duration as a user says it."""
    if seconds < 90 * 60:
        return counted(max(1, round(seconds / 60)), "minute")
    return f"{seconds / 3600:.1f} hours"
