# SPDX-License-Identifier: Apache-2.0
"""The dense model, run one decoder layer at a time.

The model's own code (transformers) does all the arithmetic; only its weights are loaded
and freed. The skeleton is on the meta device. The embedding is loaded, and the model's
own forward runs with its decoder layers replaced by recorders, which yields the first
hidden states and the arguments (rotary embeddings, attention masks by layer type) of
each layer. After that one layer at a time is loaded, run and freed, so peak memory does
not depend on the number of layers. On CUDA, the weights of as many layers as fit stay.

What goes from layer to layer besides hidden states (``SharedKeysValues``) is appended
to them, so that whoever keeps the states keeps that too.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.model.checkpoint import FLOAT_DTYPES, Checkpoint
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.loading import load_skeleton
from vllm_rsparse.model.memory import release_freed_memory
from vllm_rsparse.model.module_weights import ModuleWeights
from vllm_rsparse.model.modules import expose_linears
from vllm_rsparse.model.output_head import OutputHead
from vllm_rsparse.model.shared_kv import SharedKeysValues

# On CUDA, the tokens that run together (whole windows). On a CPU windows run alone.
CUDA_TOKENS = 8192
# In transformers' class of the language model alone.
_LAYERS = "model.layers"


class StreamedModel:
    """Skeleton of the model; its layers are materialised one at a time.

    Args:
        checkpoint: the opened base checkpoint.
        device: where to compute.
        dtype: dtype to compute in.
        load_time: format that the linears' weights are quantized to while they load;
            the model is then the one that is served.
        head_load_time: the same for the output layer.

    Attributes:
        running: the windows that ``call_layer`` runs, or ran last.

    Raises:
        CheckpointError: transformers does not know the architecture, or its decoder
            layers are not at ``model.layers``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        load_time: LoadTimeFormat | None = None,
        head_load_time: LoadTimeFormat | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.head_load_time = head_load_time
        self._tensors = LanguageModel(checkpoint, load_time, device)
        self._model = load_skeleton(self._tensors, dtype)
        self._base: nn.Module = self._model.base_model
        layers = getattr(self._base, "layers", None)
        prefix = self._model.base_model_prefix
        if not isinstance(layers, nn.ModuleList) or prefix != "model":
            raise CheckpointError(
                f"{checkpoint.directory}: {type(self._model).__name__} does not have"
                f" its decoder layers at {_LAYERS}; it is not supported"
            )
        self._layers = layers
        for index, layer in enumerate(layers):
            spec = self._tensors.layer(index)
            expose_linears(layer, spec, self._tensors.config)
        self._shared = SharedKeysValues(layers)
        # Arguments of each layer: positional ones (Gemma 4's per-layer embeddings) by
        # window, the others the same for all, which are as long and not padded.
        self._positional: list[list[tuple[Any, ...]]] = []
        self._named: list[dict[str, Any]] = []
        self._weights = ModuleWeights(self._tensors, self._model, device)
        self._tokens_at_once = CUDA_TOKENS if device.type == "cuda" else 1
        self.running = slice(0)

    @property
    def config(self) -> Mapping[str, Any]:
        """The part of the checkpoint's config.json that describes this model."""
        return self._tensors.config

    @property
    def load_time(self) -> LoadTimeFormat | None:
        """Format that the linears' weights are quantized to while they load."""
        return self._tensors.load_time

    def check_head(self) -> None:
        """Refuse to change an output layer that cannot be changed.

        Raises:
            CheckpointError: the checkpoint has quantized it, or it has a shape that
                its new format does not have; names what to do.
        """
        if self._tensors.head_is_quantized:
            raise CheckpointError(
                f"{self.checkpoint.directory}: the output layer is quantized already;"
                " leave out --head and --head-sparsity"
            )
        projection = self._model.get_output_embeddings()
        if self.head_load_time is None or projection is None:
            return
        n, k = projection.weight.shape
        rows, channels = self.head_load_time.multiples
        if n % rows or k % channels:
            raise CheckpointError(
                f"{self.checkpoint.directory}: the output layer is [{n}, {k}]: --head"
                f" {self.head_load_time.name} needs a vocabulary in multiples of {rows}"
                f" and a hidden size in multiples of {channels}; use --head fp8"
            )

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self._model.get_input_embeddings().num_embeddings

    @torch.no_grad()
    def embed(self, windows: Tensor) -> Tensor:
        """Hidden states that enter the first layer; also records the layers' arguments.

        Args:
            windows: int64 [samples, tokens].

        Returns:
            [samples, tokens, hidden] in the compute dtype, on the device. Where layers
            share keys and values, these follow in the last dimension (``visible``).
        """
        outside = [
            (name, module)
            for name, module in self._base.named_children()
            if module is not self._layers
        ]
        for name, module in outside:
            self._weights.materialise(module, f"model.{name}")
        self._positional = []
        hidden = [self._record(window) for window in windows.split(1)]
        for _, module in outside:
            module.to("meta")
        return self._shared.append_empty(torch.cat(hidden))

    def visible(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., hidden] alone, without shared keys and values."""
        return self._shared.without(hidden)

    def batches(self, hidden: Tensor) -> Iterator[slice]:
        """Rows of states [samples, tokens, hidden] whose windows run together."""
        size = max(1, self._tokens_at_once // hidden.shape[1])
        for start in range(0, len(hidden), size):
            yield slice(start, min(start + size, len(hidden)))

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The decoder layer with its weights, which the end of the block frees."""
        module = self._layers[index]
        self._weights.materialise(module, f"{_LAYERS}.{index}")
        try:
            yield module
        finally:
            module.to("meta")
            release_freed_memory()

    def weight(self, linear: Linear) -> Tensor:
        """A linear's weight [N, K] in the checkpoint's dtype.

        It is on the device if it is quantized while it loads, or if its layer is
        materialised in that dtype; else on the CPU.
        """
        name, _ = self._tensors.stored_linear(linear.layer, linear.kind)
        stored = FLOAT_DTYPES[self.checkpoint.linear_dtype(name)]
        loaded = self._layers[linear.layer].get_submodule(linear.kind).weight
        if (
            isinstance(loaded, Tensor)
            and not loaded.is_meta
            and loaded.dtype == stored
            and self.load_time is None
        ):
            return loaded.detach()
        return self._tensors.read_weights([linear.name])[linear.name]

    @property
    def plane_count(self) -> int:
        """Planes in which the linears' weights are read; 1: whole."""
        return 1 if self.load_time is None else self.load_time.format.planes

    def planes(self, linear: Linear) -> tuple[Tensor, ...]:
        """What each plane of a linear's weight stands for: float32 [N, K].

        A weight that is read whole is that of ``weight``.
        """
        if self.plane_count == 1:
            return (self.weight(linear),)
        stored = self._tensors.read_stored(linear.name)
        return stored.format.dequantise_planes(stored)

    def scales(self, linear: Linear) -> Tensor | None:
        """Scales that the artifact holds of a linear's weight: float32 [N], or None."""
        return self._tensors.read_scales(linear.name)

    @torch.no_grad()
    def run_layer(self, index: int, hidden: Tensor) -> None:
        """Replace hidden states by the layer's output, in place.

        Args:
            index: a layer that is materialised now.
            hidden: [samples, tokens, hidden].
        """
        for rows in self.batches(hidden):
            hidden[rows] = self.call_layer(index, hidden[rows], rows)

    def call_layer(self, index: int, hidden: Tensor, rows: slice) -> Tensor:
        """Output of a materialised layer for some of the embedded windows.

        Differentiable by ``hidden`` where gradients are enabled.

        Args:
            index: of the layer.
            hidden: [windows, tokens, hidden], entering the layer.
            rows: which of the windows that ``embed`` got last.
        """
        self.running = rows
        windows = [arguments[index] for arguments in self._positional[rows]]
        args = [_joined(one, hidden.device) for one in zip(*windows, strict=True)]
        visible, shared = self._shared.split(hidden)
        out = self._layers[index](visible, *args, **{**self._named[index], **shared})
        return self._shared.join(out[0] if isinstance(out, tuple) else out, shared)

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        """Final norm, output projection and what the model does to its logits.

        Raises:
            CheckpointError: the architecture has no ``model.norm`` or no output
                projection.
        """
        norm = getattr(self._base, "norm", None)
        projection = self._model.get_output_embeddings()
        if norm is None or projection is None:
            raise CheckpointError(
                f"{self.checkpoint.directory}: {type(self._model).__name__} has no"
                " model.norm and lm_head, which this recipe, --head and --head-sparsity"
                " need; use --recipe greedy without the two"
            )
        tied = not self._tensors.has("lm_head.weight")
        self._weights.materialise(
            projection, "model.embed_tokens" if tied else "lm_head"
        )
        self._weights.materialise(norm, "model.norm")
        served = None
        if self.head_load_time is not None:
            weight = projection.weight
            served = self.head_load_time.round_trip(weight).to(weight.dtype)
        try:
            yield OutputHead(self._model, norm, projection, self.visible, served)
        finally:
            norm.to("meta")
            projection.to("meta")

    def _record(self, window: Tensor) -> Tensor:
        """Run the model's forward on one window [1, tokens] with recording layers."""
        first: list[Tensor] = []
        positional: list[tuple[Any, ...]] = []
        named: list[dict[str, Any]] = []

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first.append(hidden_states)
            positional.append(tuple(_on_cpu(argument) for argument in args))
            named.append(kwargs)
            return hidden_states

        # An attribute of the instance, not another module: the model's forward may
        # read attributes of its layers (attention_type).
        for layer in self._layers:
            layer.forward = record
        try:
            self._base(input_ids=window.to(self.device), use_cache=False)
        finally:
            for layer in self._layers:
                del layer.forward
        self._positional.append(positional)
        self._named = named
        return first[0]


def _on_cpu(argument: Any) -> Any:
    """Where the embeddings of all layers for all windows are kept."""
    return argument.cpu() if isinstance(argument, Tensor) else argument


def _joined(windows: Sequence[Any], device: torch.device) -> Any:
    """An argument of several windows as one; what is no tensor is the same for all."""
    if not isinstance(windows[0], Tensor):
        return windows[0]
    return torch.cat([window.to(device) for window in windows])
