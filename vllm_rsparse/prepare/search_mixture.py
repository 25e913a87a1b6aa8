# SPDX-License-Identifier: Apache-2.0
"""How much of each of two ways to share out: tried on the calibration text.

What gradients say ("sensitivity") holds for small errors only, so it starves the first
layers of a deep model; measured errors ("greedy") are of one layer at a time, and every
layer gets the same. KL divergence at 60%, on calibration text that was kept apart, by
the part that gradients have (0 to 1):

    layers, parameters        0       0.5     1
    4, 7.9 M, no factors      0.626   0.595   0.605
    16, 47 M                  0.205   0.203   0.268

Neither is right for every model, so a few mixtures are calibrated as the artifact will
be, factors included, and the one is taken whose loss on the text is least.
"""

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor
from tqdm import tqdm

from .calibrate_layers import run_sparse
from .journal import Journal
from .linears import Linear
from .loss import text_losses
from .planning import Planned
from .streaming import StreamedModel

logger = logging.getLogger(__name__)

# Calibration windows that the candidates are tried on.
TRIED_WINDOWS = 8


def least_loss(
    model: StreamedModel,
    linears: Sequence[Linear],
    candidates: Mapping[str, Planned],
    windows: Tensor,
    seed: int,
    journal: Journal,
) -> Planned:
    """The candidate that loses least on the first ``TRIED_WINDOWS`` windows.

    Args:
        model: the streamed base model.
        linears: all linears that take part, layer by layer.
        candidates: plans of the same sparsity by name, all on sparse activations. A
            single one is returned untried.
        windows: int64 [samples, tokens].
        seed: of the randomised methods.
        journal: keeps the losses.
    """
    if len(candidates) == 1:
        (only,) = candidates.values()
        return only
    tried = windows[:TRIED_WINDOWS]
    losses: dict[str, float] = {}
    for name, planned in tqdm(candidates.items(), "mixtures", unit="candidate"):
        known = journal.get(f"loss {name}")
        if known is None:
            hidden = model.embed(tried)
            run_sparse(model, linears, planned, hidden, seed)
            (known,) = text_losses(model, [hidden], tried, planned.first)
            journal.note({f"loss {name}": known})
        losses[name] = known
    best = min(losses, key=lambda name: losses[name])
    logger.info(
        "of the ways to share out, %s loses least on the calibration text (nats: %s)",
        best,
        ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()),
    )
    return candidates[best]
