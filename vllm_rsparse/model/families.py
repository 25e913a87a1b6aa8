# SPDX-License-Identifier: Apache-2.0
"""Model structure: the one table of which linears a decoder layer has.

A *kind* of linear is the same in every family that has it: which kinds share its input,
how the engine fuses it and splits it between ranks. A *family* lists the kinds of each
of its layers, and where the layers are in the checkpoint. Nothing else in the package
contains model structure.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_rsparse.model.names import LinearName, label_of


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
    """

    name: str
    input_group: str
    engine_layer: str
    shard: int = 0
    row_parallel: bool = False
    factors_pay: bool = False

    @property
    def label(self) -> str:
        """Its short form, "q_proj"."""
        return label_of(self.name)

    @property
    def reads_first(self) -> bool:
        """Whether the shared input is taken from this kind."""
        return self.name == self.input_group


def _fused(
    engine_layer: str, *names: str, factors_pay: Iterable[str] = ()
) -> tuple[LinearKind, ...]:
    """Column-parallel linears of one input, which the engine fuses in this order."""
    return tuple(
        LinearKind(
            name, names[0], engine_layer, shard, factors_pay=name in set(factors_pay)
        )
        for shard, name in enumerate(names)
    )


def _alone(name: str, *, row_parallel: bool = False) -> LinearKind:
    """A linear that the engine does not fuse with another."""
    return LinearKind(name, name, name, row_parallel=row_parallel)


_ATTENTION = (
    *_fused(
        "self_attn.qkv_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        # Directions worth their bytes account for 7 to 62% of the loss of these two,
        # and for at most 11% elsewhere (down_proj; gate, up, v, o: 3%; bundled model
        # at 60%).
        factors_pay=("self_attn.q_proj", "self_attn.k_proj"),
    ),
    _alone("self_attn.o_proj", row_parallel=True),
)
_GATED_MLP = (
    *_fused("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
    _alone("mlp.down_proj", row_parallel=True),
)


@dataclass(frozen=True)
class LayerSpec:
    """The linears of one decoder layer, in the order in which they run."""

    kinds: tuple[LinearKind, ...]

    def __iter__(self) -> Iterator[LinearKind]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)


_DENSE_LAYER = LayerSpec((*_ATTENTION, *_GATED_MLP))


@dataclass(frozen=True)
class Family:
    """Architectures whose decoder layers have the same linears.

    Attributes:
        layer_path: of the list of decoder layers in a checkpoint.
        spec: the linears of a layer.
    """

    layer_path: str = "model.layers"
    spec: LayerSpec = _DENSE_LAYER

    def layer(self, index: int) -> LayerSpec:
        """The linears of a decoder layer."""
        return self.spec


# Llama, Mistral, Qwen2, Qwen3, Gemma and others with the same seven linears.
DENSE = Family()

_KINDS = {kind.name: kind for kind in _DENSE_LAYER}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model, by its ``config.json``."""
    return DENSE


def kind_of(name: str | LinearName) -> LinearKind:
    """The table's entry for a linear, by its kind's name or its parsed name.

    A kind that no family has is not fused, and column-parallel.
    """
    kind = name.kind if isinstance(name, LinearName) else name
    return _KINDS.get(kind) or _alone(kind)


def kinds_of_engine_layer(name: str) -> tuple[LinearKind, ...]:
    """The kinds that a layer of the engine computes, in the order of its output.

    Args:
        name: within the decoder layer, "self_attn.qkv_proj".
    """
    found = [kind for kind in _KINDS.values() if kind.engine_layer == name]
    return tuple(sorted(found, key=lambda kind: kind.shard)) or (_alone(name),)


def by_engine_layer(names: Iterable[str]) -> list[list[str]]:
    """Linears' names grouped by the engine's layer that computes them.

    Groups are in the order of their first member, members in the order of the output.
    """
    groups: dict[tuple[str, int | None, str], list[str]] = {}
    for name in names:
        parsed = LinearName.parse(name)
        layer = kind_of(parsed).engine_layer
        groups.setdefault((parsed.path, parsed.layer, layer), []).append(name)
    return [
        sorted(group, key=lambda name: kind_of(LinearName.parse(name)).shard)
        for group in groups.values()
    ]
