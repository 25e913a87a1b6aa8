# SPDX-License-Identifier: Apache-2.0
"""Which weights a decoded token reads, and which of them are in sparse linears."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.names import LinearName


@dataclass(frozen=True)
class TokenReads:
    """Elements of weight matrices that the dense model reads for one decoded token.

    Attributes:
        linears: of the linears that take part.
        experts: of the routed experts that a token chooses.
        others: of the decoder layers besides these.
        head: of the output projection.
    """

    linears: int
    experts: int
    others: int
    head: int


def token_reads(model: LanguageModel, linears: Iterable[Linear]) -> TokenReads:
    """Count them, by the headers of the checkpoint."""
    experts = model.family.experts
    layers = model.config["num_hidden_layers"]
    kinds = {kind.name for kind in model.family.spec}
    chosen, in_layers = 0, 0
    for name in model.checkpoint.plain_names():
        module, _, _ = name.rpartition(".")
        parsed = LinearName.parse(module)
        if parsed.path != model.layer_path or (parsed.layer or 0) >= layers:
            continue
        present = {kind.name for kind in model.layer(parsed.layer or 0)}
        if parsed.kind in kinds - present:
            continue  # keys and values that Gemma 4's last layers do not use
        size = _size(model, name)
        if experts is not None and f"{parsed.kind}.".startswith(f"{experts.module}."):
            chosen += size
        else:
            in_layers += size
    if experts is not None and chosen:
        chosen = round(chosen * experts.share_read(model.config))
    listed = sum(math.prod(linear.shape) for linear in linears)
    head = _size(model, model.head_tensor)
    return TokenReads(listed, chosen, in_layers - listed, head)


def _size(model: LanguageModel, name: str) -> int:
    """Elements of a matrix, or of a stack of matrices; 0 for a vector."""
    info = model.checkpoint.tensors.get(name)
    if info is not None:
        return math.prod(info.shape) if len(info.shape) > 1 else 0
    # Packed: the checkpoint has its parts.
    module, _, suffix = name.rpartition(".")
    shape = model.checkpoint.linear_shape(module) if suffix == "weight" else None
    return 0 if shape is None else math.prod(shape)
