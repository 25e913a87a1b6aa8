# SPDX-License-Identifier: Apache-2.0
"""Kinds of linears: what a linear is by its place in a decoder layer.

A kind is the same in every family that has it: which kinds share its input, how the
engine fuses it and splits it between ranks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vllm_rsparse.model.names import label_of


@dataclass(frozen=True)
class LinearKind:
    """A linear by its place in a decoder layer.

    Attributes:
        name: within the layer, "self_attn.q_proj".
        input_group: the first kind that reads the same input; may be this one.
        engine_layer: the layer of the engine that computes it, "self_attn.qkv_proj".
        shard: its index among the linears that the engine fuses into that layer.
        row_parallel: tensor-parallel ranks split its input instead of its output.
        factors_pay: low-rank factors are worth their bytes.
        copied: the kind whose weight the engine loads in its place into layers which,
            by config.json, do not have it; None if it is in every layer.
    """

    name: str
    input_group: str
    engine_layer: str
    shard: int = 0
    row_parallel: bool = False
    factors_pay: bool = False
    copied: str | None = None

    @property
    def label(self) -> str:
        """Its short form, "q_proj"."""
        return label_of(self.name)

    @property
    def reads_first(self) -> bool:
        """Whether the shared input is taken from this kind."""
        return self.name == self.input_group


def fused(
    engine_layer: str,
    *names: str,
    factors_pay: Iterable[str] = (),
    copied: Mapping[str, str] = MappingProxyType({}),
) -> tuple[LinearKind, ...]:
    """Column-parallel linears of one input, which the engine fuses in this order."""
    return tuple(
        LinearKind(
            name,
            names[0],
            engine_layer,
            shard,
            factors_pay=name in set(factors_pay),
            copied=copied.get(name),
        )
        for shard, name in enumerate(names)
    )


def alone(name: str, *, row_parallel: bool = False) -> LinearKind:
    """A linear that the engine does not fuse with another."""
    return LinearKind(name, name, name, row_parallel=row_parallel)


ATTENTION = (
    *fused(
        "self_attn.qkv_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        # Directions worth their bytes account for 7 to 62% of the loss of these two,
        # and for at most 11% elsewhere (down_proj; gate, up, v, o: 3%; bundled model
        # at 60%).
        factors_pay=("self_attn.q_proj", "self_attn.k_proj"),
        # Gemma 4's global layers take their keys for values.
        copied={"self_attn.v_proj": "self_attn.k_proj"},
    ),
    alone("self_attn.o_proj", row_parallel=True),
)
GATED_MLP = (
    *fused("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
    alone("mlp.down_proj", row_parallel=True),
)
# Gated DeltaNet of Qwen3.5. in_proj_a and in_proj_b have one output per head: too small
# to be worth a mask.
DELTA_NET = (
    *fused(
        "linear_attn.in_proj_qkvz",
        "linear_attn.in_proj_q",
        "linear_attn.in_proj_k",
        "linear_attn.in_proj_v",
        "linear_attn.in_proj_z",
    ),
    alone("linear_attn.out_proj", row_parallel=True),
)
# What every token goes through next to the routed experts that it chooses.
SHARED_EXPERT = (
    *fused(
        "mlp.shared_expert.gate_up_proj",
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
    ),
    alone("mlp.shared_expert.down_proj", row_parallel=True),
)
