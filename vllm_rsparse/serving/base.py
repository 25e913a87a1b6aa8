# SPDX-License-Identifier: Apache-2.0
"""``BaseQuantization``: vLLM's own quantization of the checkpoint that is served.

Everything that is not sparse belongs to the base: attention and its KV-cache scales,
the head, embeddings, experts, and every linear that the artifact does not list, or all
of them if every step is dense. They get the method that vLLM would give them without
rsparse.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    get_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import ArtifactError, CheckpointError
from vllm_rsparse.formats.checkpoints.layout import (
    Layout,
    format_of_layout,
    main_format,
)
from vllm_rsparse.formats.checkpoints.parse import parse_scheme
from vllm_rsparse.model.families import DENSE, family_of
from vllm_rsparse.model.names import LinearName
from vllm_rsparse.serving.served import ServedModel
from vllm_rsparse.serving.weights.factory import shared_layout

# Attributes that a compressed-tensors checkpoint's dictionary lacks: vLLM adds them if
# the dictionary is the model's own and not inside ours.
_HEADS = {
    "total_num_heads": "num_attention_heads",
    "total_num_kv_heads": "num_key_value_heads",
}


class BaseQuantization:
    """How the checkpoint is quantized, for vLLM and for the sparse layers.

    Args:
        dictionary: the checkpoint's own ``quantization_config``.
        where: its name in messages.

    Attributes:
        dictionary: the same, to be written into the model's config.
        config: vLLM's config of it.
        scheme: the same for the sparse layers: which linear has which layout.

    Raises:
        CheckpointError: a quantization that cannot be served sparse; the message says
            what to do.
    """

    def __init__(self, dictionary: Mapping[str, Any], where: str) -> None:
        self.dictionary = _normalised(dictionary)
        self.scheme = parse_scheme(self.dictionary, where)
        self.config = _vllm_config(self.dictionary)
        self._family = DENSE

    def update(self, model_name: str, hf_config: Any, revision: str | None) -> None:
        """Let vLLM's config read what it needs from the model."""
        architectures = getattr(hf_config, "architectures", None)
        self._family = family_of({"architectures": architectures})
        text_config = getattr(hf_config, "text_config", None) or hf_config
        for name, source in _HEADS.items():
            if getattr(self.config, name, 0) is None:
                setattr(self.config, name, getattr(text_config, source, None))
        self.config.maybe_update_config(
            model_name, hf_config=hf_config, revision=revision
        )

    def method(
        self,
        layer: torch.nn.Module,
        prefix: str,
        packed_modules_mapping: dict[str, list[str]],
    ) -> QuantizeMethodBase | None:
        """The method that vLLM gives a layer of the base model.

        Args:
            layer: a layer that is being built.
            prefix: its name in vLLM.
            packed_modules_mapping: of the model; vLLM passes it to our config only.
        """
        self.config.packed_modules_mapping = packed_modules_mapping
        return self.config.get_quant_method(layer, prefix)

    def layout(
        self, names: list[str], method: QuantizeMethodBase | None
    ) -> Layout | None:
        """How the checkpoint stores a linear; None if it is not quantized.

        Args:
            names: checkpoint names of the fused shards.
            method: vLLM's own method for the layer.

        Raises:
            CheckpointError: the shards differ in it, or vLLM interprets the
                dictionary differently.
        """
        layout = shared_layout(self.scheme, [self._stored(name) for name in names])
        plain = isinstance(method, UnquantizedLinearMethod)
        if plain and self.scheme.tensors_decide:
            return None
        if plain != (layout is None):
            ours = "plain" if layout is None else "quantized"
            raise CheckpointError(
                f"{', '.join(names)}: {ours} by the checkpoint's quantization_config,"
                f" but vLLM uses {type(method).__name__}; please report this checkpoint"
            )
        return layout

    def stored_format(self, name: str) -> tuple[str, int]:
        """Format and group of a linear's weight, as ``format_of_layout`` gives them."""
        return format_of_layout(self.scheme.layout(self._stored(name)))

    def _stored(self, name: str) -> str:
        """The checkpoint's module that holds a linear: its dictionary has these."""
        linear = LinearName.parse(name)
        return str(linear.of_kind(self._family.stored_module(linear.kind)))


def require_prepared_base(
    artifact: Artifact, base: BaseQuantization | None, model: str
) -> None:
    """Refuse an artifact that was prepared for weights in another format.

    Args:
        artifact: what was prepared.
        base: how the checkpoint is quantized; None: it is not.
        model: the served model, for the message.

    Raises:
        ArtifactError: names both formats.
    """
    prepared = artifact.info.base
    names = artifact.info.linears
    served = main_format(map(base.stored_format, names) if base else ())
    if served != (prepared.format, prepared.group):
        raise ArtifactError(
            f"{artifact.json_path}: was prepared for weights in"
            f" {_shown(prepared.format, prepared.group)}, but {model} has"
            f" {_shown(*served)}; prepare this model"
        )


def _shown(name: str, group: int) -> str:
    return f"{name} (groups of {group})" if group else name


def base_method(
    base: BaseQuantization | None,
    layer: torch.nn.Module,
    prefix: str,
    packed_modules_mapping: dict[str, list[str]],
) -> QuantizeMethodBase | None:
    """The base model's own method for a layer, quantized or not.

    None leaves the choice to the layer, which has its own plain method; linear layers
    have none.
    """
    if base is not None:
        return base.method(layer, prefix, packed_modules_mapping)
    return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def checked_first(
    served: ServedModel, method: QuantizeMethodBase | None
) -> QuantizeMethodBase | None:
    """The same method, which also checks the artifact against the model.

    A model without any sparse layer has no sparse method that could detect that none of
    its names is in the artifact, and would be served dense silently. The method keeps
    vLLM's own class, by whose name vLLM selects a weight's loader.
    """
    if method is not None:
        process = method.process_weights_after_loading

        def check_and_process(layer: torch.nn.Module) -> None:
            served.check_coverage()  # the whole model is built now
            process(layer)

        method.process_weights_after_loading = check_and_process
    return method


def _normalised(dictionary: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the method's name as vLLM spells it."""
    mine = copy.deepcopy(dict(dictionary))
    method = str(mine.get("quant_method", "")).lower()
    mine["quant_method"] = method.replace("compressed_tensors", "compressed-tensors")
    return mine


def _vllm_config(dictionary: dict[str, Any]) -> QuantizationConfig:
    """The config that vLLM builds for the checkpoint if no method is requested."""
    method = dictionary["quant_method"]
    for name in QUANTIZATION_METHODS:
        # Releases differ in which implementations of a format they have: 0.26 serves
        # gptq by gptq_marlin, 0.32 by auto_gptq. The implementations report this.
        if name != "rsparse":
            other = get_quantization_config(name).override_quantization_method(
                dictionary, None
            )
            if other is not None:
                method = other
                break
    # Some modify their argument.
    return get_quantization_config(method).from_config(copy.deepcopy(dictionary))
