# SPDX-License-Identifier: Apache-2.0
"""Model structure: the one table of which linears a decoder layer has.

A *family* lists the kinds (``kinds``) of each of its layers, and where the layers are
in the checkpoint. Nothing else in the package contains model structure.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_rsparse.model.experts import Experts, number_of_experts
from vllm_rsparse.model.kinds import (
    ATTENTION,
    DELTA_NET,
    GATED_MLP,
    SHARED_EXPERT,
    LinearKind,
    alone,
)
from vllm_rsparse.model.layer_spec import FusedTensor, LayerSpec
from vllm_rsparse.model.names import LinearName


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    heads = config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    return heads, kv, kv


def _delta_heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    return keys, keys, values


def _halves(config: Mapping[str, Any]) -> tuple[int, int]:
    return 1, 1


_QKV = FusedTensor(
    "self_attn.qkv_proj",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    _heads,
)
_GATE_UP = FusedTensor("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), _halves)
_DELTA_QKV = FusedTensor(
    "linear_attn.in_proj_qkv",
    ("linear_attn.in_proj_q", "linear_attn.in_proj_k", "linear_attn.in_proj_v"),
    _delta_heads,
)
_SEVEN = (*ATTENTION, *GATED_MLP)
_ALONE = LayerSpec(_SEVEN)  # each in a module of its own


def _has_all(config: Mapping[str, Any], index: int) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Family:
    """Architectures whose decoder layers have the same linears.

    Attributes:
        architectures: as ``config.json`` names them.
        spec: every linear that a layer may have.
        lacks: of the language model's config and a layer's index, the linears that this
            layer does not have, by what their names start with.
        text_config: key of the part of ``config.json`` that describes the language
            model; None where it is all of it.
        paths: where a checkpoint may hold what transformers' class of the language
            model alone calls "model".
        heads: and what it calls "lm_head".
        experts: routed experts, which some of its layers have.
        accepts: keys of a config that mark what other families do not have, see
            ``linears``.
    """

    architectures: tuple[str, ...] = ()
    spec: LayerSpec = _ALONE
    lacks: Callable[[Mapping[str, Any], int], Collection[str]] = _has_all
    text_config: str | None = None
    paths: tuple[str, ...] = ("model",)
    heads: tuple[str, ...] = ("lm_head",)
    experts: Experts | None = None
    accepts: Collection[str] = ()

    def layer(self, config: Mapping[str, Any], index: int) -> LayerSpec:
        """The linears of a decoder layer.

        Args:
            config: of the language model.
            index: of the layer.
        """
        return self.spec.without(self.lacks(config, index))

    def stored_module(self, kind: str) -> str:
        """The module of the checkpoint that holds a kind, itself or a fused one."""
        fused = self.spec.fused_tensor(kind)
        return kind if fused is None else fused.module

    def language_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of ``config.json`` that describes the language model."""
        if self.text_config is None:
            return config
        part = config.get(self.text_config)
        return part if isinstance(part, Mapping) else {}


def _other_mixer(config: Mapping[str, Any], index: int) -> tuple[str, ...]:
    """Every ``full_attention_interval``-th layer has attention, the rest DeltaNet."""
    types = config.get("layer_types")
    if types is None:
        interval = config.get("full_attention_interval", 4)
        attention = (index + 1) % interval == 0
    else:
        attention = types[index] == "full_attention"
    return ("linear_attn.",) if attention else ("self_attn.",)


def _no_mlp(config: Mapping[str, Any], index: int) -> tuple[str, ...]:
    """Layers with experts have no MLP, except for the shared expert."""
    step = config.get("decoder_sparse_step", 1)
    dense = index in (config.get("mlp_only_layers") or ()) or (index + 1) % step != 0
    if dense or not number_of_experts(config):
        return ("mlp.shared_expert.",)
    absent = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    if not config.get("shared_expert_intermediate_size"):
        absent.append("mlp.shared_expert.")
    return tuple(absent)


def _keys_of_others(config: Mapping[str, Any], index: int) -> tuple[str, ...]:
    """Gemma 4's global layers may have no values, the last of E2B and E4B no keys."""
    layers = config["num_hidden_layers"]
    shared = config.get("num_kv_shared_layers") or 0
    if index >= layers - shared:
        return ("self_attn.k_proj", "self_attn.v_proj")
    types = config.get("layer_types")
    # transformers' default: every sixth layer.
    is_global = (index + 1) % 6 == 0 if types is None else types[index] != _SLIDING
    copied = config.get("attention_k_eq_v") and (is_global or index == layers - 1)
    return ("self_attn.v_proj",) if copied else ()


_SLIDING = "sliding_attention"
_HYBRID = LayerSpec((*DELTA_NET, *_SEVEN), (_DELTA_QKV,))

# Llama, Mistral, Qwen2, Qwen3, Gemma and others with the same seven linears: every
# architecture that no other family lists.
DENSE = Family()
_HYBRID_EXPERTS = LayerSpec((*DELTA_NET, *ATTENTION, *SHARED_EXPERT), (_DELTA_QKV,))
_GEMMA_EXPERTS = Experts("experts", chosen_key="top_k_experts")
# E2B and E4B.
_GEMMA_ACCEPTS = (
    "num_kv_shared_layers",
    "hidden_size_per_layer_input",
    "audio_config",
)
FAMILIES = (
    Family(
        (
            "Mistral3ForConditionalGeneration",
            "Gemma3ForConditionalGeneration",
            "InternVLForConditionalGeneration",
        ),
        text_config="text_config",
        # The second is what transformers 4.52 and later may write.
        paths=("language_model.model", "model.language_model"),
        heads=("language_model.lm_head", "lm_head"),
    ),
    Family(("Phi3ForCausalLM",), LayerSpec(_SEVEN, (_QKV, _GATE_UP))),
    Family(("Glm4ForCausalLM",), LayerSpec(_SEVEN, (_GATE_UP,))),
    Family(
        ("Qwen3_5ForCausalLM",),
        _HYBRID,
        _other_mixer,
        # The first is what fine-tuning of the model with vision may write.
        paths=("model.language_model", "model"),
    ),
    Family(
        ("Qwen3_5ForConditionalGeneration",),
        _HYBRID,
        _other_mixer,
        text_config="text_config",
        paths=("model.language_model",),
    ),
    Family(
        ("Gemma4ForCausalLM",),
        lacks=_keys_of_others,
        experts=_GEMMA_EXPERTS,
        accepts=_GEMMA_ACCEPTS,
    ),
    Family(
        ("Gemma4ForConditionalGeneration",),
        lacks=_keys_of_others,
        text_config="text_config",
        paths=("model.language_model",),
        experts=_GEMMA_EXPERTS,
        accepts=_GEMMA_ACCEPTS,
    ),
    Family(
        ("Qwen3MoeForCausalLM", "Qwen2MoeForCausalLM"),
        LayerSpec((*_SEVEN, *SHARED_EXPERT)),
        _no_mlp,
        experts=Experts(),
    ),
    Family(
        ("Qwen3_5MoeForCausalLM",),
        _HYBRID_EXPERTS,
        _other_mixer,
        paths=("model.language_model", "model"),
        experts=Experts(),
    ),
    Family(
        ("Qwen3_5MoeForConditionalGeneration",),
        _HYBRID_EXPERTS,
        _other_mixer,
        text_config="text_config",
        paths=("model.language_model",),
        experts=Experts(),
    ),
)

_KINDS = {kind.name: kind for family in (DENSE, *FAMILIES) for kind in family.spec}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model, by its ``config.json``."""
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if set(architectures) & set(family.architectures):
            return family
    return DENSE


def kind_of(name: str | LinearName) -> LinearKind:
    """The table's entry for a linear, by its kind's name or its parsed name.

    A kind that no family has is not fused, and column-parallel.
    """
    kind = name.kind if isinstance(name, LinearName) else name
    return _KINDS.get(kind) or alone(kind)


def kinds_of_engine_layer(name: str) -> tuple[LinearKind, ...]:
    """The kinds that a layer of the engine computes, in the order of its output.

    Args:
        name: within the decoder layer, "self_attn.qkv_proj".
    """
    found = [kind for kind in _KINDS.values() if kind.engine_layer == name]
    return tuple(sorted(found, key=lambda kind: kind.shard)) or (alone(name),)


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
