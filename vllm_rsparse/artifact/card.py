# SPDX-License-Identifier: Apache-2.0
"""One line about an artifact, for a model card: what it skips, and what that costs."""

from collections.abc import Mapping
from dataclasses import field

from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from vllm_rsparse.artifact.schema import ArtifactInfo
from vllm_rsparse.formats.names import AS_STORED
from vllm_rsparse.model.names import HEAD
from vllm_rsparse.validation import CONFIG

# Key of the provenance; it is there where ``prepare --max-kl`` found the sparsity.
LOSS = "held_out_loss"


@dataclass(frozen=True, config=CONFIG)
class HeldOutLoss:
    """What ``prepare`` measured on text that it did not calibrate on.

    Attributes:
        kl_divergence: mean KL(dense || sparse) of the next token, nats.
        tokens: positions that it was measured on.
        max_kl: what was allowed.
        tried: the divergence of each sparsity that was tried.
    """

    kl_divergence: float
    tokens: int
    max_kl: float
    tried: Mapping[str, float] = field(default_factory=dict)


def held_out_loss(info: ArtifactInfo) -> HeldOutLoss | None:
    """The loss in an artifact's provenance; None where there is none."""
    raw = info.provenance.get(LOSS)
    if not isinstance(raw, dict):
        return None
    try:
        return HeldOutLoss(**raw)
    except (TypeError, ValidationError):  # provenance is free form
        return None


def card_line(info: ArtifactInfo) -> str:
    """The line.

    An artifact whose sparsity was given has not been measured on other text, and its
    line has no loss: ``evaluate`` measures it.
    """
    skipped = (
        f"{info.achieved_sparsity:.1%} of the linears' bytes skipped (target"
        f" {info.sparsity:.1%})"
    )
    if info.bits_read is not None:
        skipped = f"{info.bits_read:.2f} bits read of a weight"
    recipe = info.provenance.get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else None
    by = f", recipe {name}" if isinstance(name, str) and name.isprintable() else ""
    loss = held_out_loss(info)
    lost = ""
    if loss is not None:
        lost = (
            f"; KL divergence from the dense model {loss.kl_divergence:.4f} nats on"
            f" {loss.tokens} held-out tokens (at most {loss.max_kl:g} allowed)"
        )
    served = [f"weights {info.weights}"] if info.weights != AS_STORED else []
    served += [f"{HEAD} {info.head}"] if info.head != AS_STORED else []
    if info.sparse_head is not None:
        served.append(f"{1 - info.sparse_head.kept_fraction:.1%} of {HEAD} skipped")
    formats = "".join(f", {one}" for one in served)
    return f"vllm-rsparse{by}{formats}: {skipped}{lost}"
