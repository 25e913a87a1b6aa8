# SPDX-License-Identifier: Apache-2.0
"""Which linears of a checkpoint take part, and which models are refused by name."""

from dataclasses import dataclass
from typing import Any

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.families import family_of, kind_of
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.names import LinearName
from vllm_rsparse.model.quantized import OUR_METHOD

# safetensors' name of a dtype -> torch's.
FLOAT_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_SUPPORTED = (
    "supported are dense decoders whose layers have q, k, v, o, gate, up and down"
    " projections (Llama, Mistral, Qwen2, Qwen3 and the like), also fused in Phi-3 and"
    " GLM-4, and in the language model of Mistral 3, InternVL and Gemma 3 with vision;"
    " Qwen3.5 with its Gated DeltaNet layers; Gemma 4; and what is not a routed expert"
    " in Qwen3, Qwen3.5 and Gemma 4 mixtures of experts"
)
_EXPERTS = "a mixture of experts"
# Tensor names (within a layer) that mark an architecture which is out of scope.
_FOREIGN_TENSORS = {
    ".experts.": _EXPERTS,
    ".block_sparse_moe.": _EXPERTS,
    ".shared_expert.": _EXPERTS,
    ".kv_a_proj_with_mqa.": "multi-head latent attention (MLA)",
    ".kv_b_proj.": "multi-head latent attention (MLA)",
    ".qkv_proj.": "a checkpoint with fused linears (qkv_proj)",
    ".gate_up_proj.": "a checkpoint with fused linears (gate_up_proj)",
    ".query_key_value.": "a checkpoint with fused linears (query_key_value)",
}


@dataclass(frozen=True)
class Linear:
    """One linear that takes part.

    Attributes:
        name: its name in the checkpoint, "model.layers.0.self_attn.q_proj"; that of
            its part where the checkpoint fuses it with others.
        layer: index of its decoder layer.
        kind: its name within the layer, "self_attn.q_proj" (see ``families``).
        shape: (N, K).
    """

    name: str
    layer: int
    kind: str
    shape: tuple[int, int]

    @property
    def input_group(self) -> str:
        """The kind of the layer whose input this linear reads too."""
        return kind_of(self.kind).input_group

    @property
    def factors_pay(self) -> bool:
        """Whether low-rank factors are worth their bytes in linears of this kind."""
        return kind_of(self.kind).factors_pay


def find_linears(checkpoint: Checkpoint) -> tuple[list[Linear], str]:
    """The linears of every decoder layer, in order, and their common dtype.

    A quantized linear counts with the dtype that its weight is read in
    (``Checkpoint.linear_dtype``).

    Returns:
        The linears, layer by layer in the order in which they run; "bfloat16",
        "float16" or "float32".

    Raises:
        CheckpointError: the model is not supported; the message says why.
    """
    _refuse_config(checkpoint.config, str(checkpoint.directory / "config.json"))
    model = LanguageModel(checkpoint)
    _refuse_tensors(model)
    layers = model.config["num_hidden_layers"]
    linears, dtypes = [], set()
    for layer in range(layers):
        for kind in model.layer(layer):
            name = str(LinearName(model.layer_path, layer, kind.name))
            stored, _ = model.stored_linear(layer, kind.name)
            shape = model.linear_shape(layer, kind.name)
            if shape is None:
                _refuse_missing_layer(model, layer)
                raise CheckpointError(
                    f"{checkpoint.directory}: {_model_name(checkpoint.config)} has no"
                    f" linear {stored} (layer {layer} of {layers}) and is not"
                    f" supported; {_SUPPORTED}"
                )
            linears.append(Linear(name, layer, kind.name, shape))
            dtypes.add(checkpoint.linear_dtype(stored))
    if len(dtypes) != 1 or not dtypes <= FLOAT_DTYPES.keys():
        raise CheckpointError(
            f"{checkpoint.directory}: the linears' weights are"
            f" {', '.join(sorted(dtypes))}; prepare needs all in one of"
            f" {', '.join(FLOAT_DTYPES)}"
        )
    return linears, FLOAT_DTYPES[dtypes.pop()]


def _refuse_tensors(model: LanguageModel) -> None:
    known = {fused.module for fused in model.family.spec.fused}
    foreign = {
        part: what
        for part, what in _FOREIGN_TENSORS.items()
        if what != _EXPERTS or model.family.experts is None
    }
    for name in model.checkpoint.tensors:
        parsed = LinearName.parse(name)
        if parsed.path != model.layer_path:
            continue
        for part, what in foreign.items():
            if (
                part in f".{parsed.kind}"
                and parsed.kind.rpartition(".")[0] not in known
            ):
                raise CheckpointError(
                    f"{model.checkpoint.directory}: is {what} ({name}), which is not"
                    f" supported; {_SUPPORTED}"
                )


def _refuse_missing_layer(model: LanguageModel, layer: int) -> None:
    """Refuse a config.json that has more layers than the weights."""
    checkpoint, prefix = model.checkpoint, f"{model.layer_path}.{layer}."
    if layer > 0 and not any(name.startswith(prefix) for name in checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.directory}: config.json has num_hidden_layers ="
            f" {model.config['num_hidden_layers']}, but the weights have no layer"
            f" {layer} ({prefix}*); config and weights belong to different models, or"
            " a shard is missing: download the model again"
        )


def _refuse_config(config: dict[str, Any], where: str) -> None:
    quantization = config.get("quantization_config")
    if quantization and quantization.get("quant_method") == OUR_METHOD:
        raise CheckpointError(
            f"{where}: the directory was written by `vllm-rsparse prepare`; prepare the"
            " base model that it was made from"
        )
    family = family_of(config)
    language = family.language_config(config)
    for key, what in (
        ("kv_lora_rank", "multi-head latent attention (MLA)"),
        ("num_local_experts", _EXPERTS),
        ("num_experts", _EXPERTS),
        ("n_routed_experts", _EXPERTS),
        ("vision_config", "a vision-language model"),
        ("audio_config", "an audio model"),
        ("altup_num_inputs", "a model of several residual streams (AltUp)"),
        ("num_kv_shared_layers", "a model whose layers share keys and values"),
        ("hidden_size_per_layer_input", "a model with per-layer embeddings"),
    ):
        if key == "vision_config" and family.text_config is not None:
            continue
        if what == _EXPERTS and family.experts is not None:
            continue
        if key in family.accepts:
            continue
        value = config.get(key) or language.get(key)
        if value:
            raise CheckpointError(
                f"{where}: {_model_name(config)} is {what} ({key} ="
                f" {str(value)[:40]}), which is not supported; {_SUPPORTED}"
            )
    if config.get("is_encoder_decoder"):
        raise CheckpointError(
            f"{where}: {_model_name(config)} is an encoder-decoder model, which is not"
            f" supported; {_SUPPORTED}"
        )
    layers = language.get("num_hidden_layers")
    if layers is None and isinstance(config.get("text_config"), dict):
        raise CheckpointError(
            f"{where}: {_model_name(config)} keeps its decoder's settings in"
            " text_config, as models with several modalities do, which is not"
            f" supported; {_SUPPORTED}"
        )
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise CheckpointError(
            f"{where}: num_hidden_layers is {layers!r}, expected a positive integer;"
            f" {_SUPPORTED}"
        )


def _model_name(config: dict[str, Any]) -> str:
    architectures = config.get("architectures") or [config.get("model_type", "unknown")]
    return str(architectures[0])
