# SPDX-License-Identifier: Apache-2.0
"""The language model in a checkpoint, by transformers' names and linear by linear.

A wrapper holds it among other models and under other names than transformers' class of
the language model alone, and some families hold several linears in one tensor. Here
tensors go by the names of that class ("model.layers.0.input_layernorm.weight"), with
every linear on its own ("model.layers.0.self_attn.q_proj.weight").
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.checkpoints.on_disk import on_disk_layout
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.formats.plain import FLOAT
from vllm_rsparse.model.checkpoint import FLOAT_DTYPES, Checkpoint
from vllm_rsparse.model.families import family_of
from vllm_rsparse.model.layer_spec import FusedTensor, LayerSpec
from vllm_rsparse.model.names import LinearName

_BODY, _HEAD = "model.", "lm_head."
_LAYERS = "model.layers"
_EMBEDDING = "model.embed_tokens.weight"
_WEIGHT = ".weight"


class LanguageModel:
    """A checkpoint's language model.

    Args:
        checkpoint: the opened checkpoint.
        load_time: format that the linears' weights are quantized to while they load;
            what is read is then what is served. None: as the checkpoint stores them.
        device: where they are quantized, and left; None: the CPU.

    Attributes:
        family: of the model.
        config: the part of config.json that describes the language model.
        layer_path: of the list of decoder layers in the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        load_time: LoadTimeFormat | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.load_time = load_time
        # Encoding 1.5 billion weights in planes keeps a core busy for 47 s, and a
        # calibration encodes them several times.
        self.device = device or torch.device("cpu")
        self.family = family_of(checkpoint.config)
        self.config: Mapping[str, Any] = self.family.language_config(checkpoint.config)
        names = checkpoint.plain_names()
        self._body = _first_present(self.family.paths, names)
        self._head = _first_present(self.family.heads, names)
        self.layer_path = f"{self._body}.layers"

    @property
    def head_is_quantized(self) -> bool:
        """Whether the checkpoint has a quantized output layer."""
        return self.checkpoint.linear_format(self._head) != (FLOAT.name, 0)

    def layer(self, index: int) -> LayerSpec:
        """The linears of a decoder layer.

        Raises:
            CheckpointError: config.json does not describe this layer.
        """
        try:
            return self.family.layer(self.config, index)
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"{self.checkpoint.directory / 'config.json'}: does not give the type"
                f" of layer {index} ({type(error).__name__}: {error})"
            ) from error

    def stored_linear(self, index: int, kind: str) -> tuple[str, FusedTensor | None]:
        """The checkpoint's module that holds a linear, and how it is fused, if it is.

        Args:
            index: of the decoder layer.
            kind: of the linear.
        """
        fused = self.layer(index).fused_tensor(kind)
        module = kind if fused is None else fused.module
        return str(LinearName(self.layer_path, index, module)), fused

    def linear_shape(self, index: int, kind: str) -> tuple[int, int] | None:
        """(N, K) of a linear, by the files' headers; None where there is none.

        Args:
            index: of the decoder layer.
            kind: of the linear.

        Raises:
            CheckpointError: config.json does not fit its tensors, or they each other.
        """
        stored, fused = self.stored_linear(index, kind)
        shape = self.checkpoint.linear_shape(stored)
        if shape is None or fused is None:
            return shape
        rows = self.rows(fused, kind, shape[0])
        return rows.stop - rows.start, shape[1]

    @property
    def head_tensor(self) -> str:
        """The checkpoint's name of the output projection, or of what it is tied to."""
        name = "lm_head.weight" if self.has("lm_head.weight") else _EMBEDDING
        return self._stored(name)[0]

    def has(self, name: str) -> bool:
        """Whether ``read`` knows a name."""
        return self.checkpoint.has(self._stored(name)[0])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors on the CPU, in the checkpoint's dtype.

        Weights that are quantized while they load are float32, on ``device``.

        Raises:
            CheckpointError: a name is unknown, or its file cannot be read any more.
        """
        if self.load_time is None:
            return self._read(names)
        names = list(names)
        coded = {n: self._encoded(n) for n in names if self._is_quantized_weight(n)}
        tensors = self._read(name for name in names if name not in coded)
        for name, tensor in tensors.items():
            if self._is_weight(name):
                tensors[name] = self.load_time.round_trip(tensor.to(self.device))
        return tensors | {n: stored.dequantise() for n, stored in coded.items()}

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        stored = {name: self._stored(name) for name in names}
        parts = {
            source: parts
            for source, _, _ in stored.values()
            if (parts := self._expert_parts(source)) is not None
        }
        whole = {source for source, _, _ in stored.values()} - parts.keys()
        tensors = self.checkpoint.read(whole)
        for source, experts in parts.items():
            tensors[source] = self._stacked(experts)
        result = {}
        for name, (source, kind, fused) in stored.items():
            tensor = tensors[source]
            if fused is not None:
                tensor = tensor[self.rows(fused, kind, tensor.shape[0])]
            result[name] = tensor
        return result

    def read_weights(self, linears: Iterable[str]) -> dict[str, Tensor]:
        """Read the weights of linears, by the names that they have in an artifact.

        Returns:
            Name -> [N, K], in the checkpoint's dtype.

        Raises:
            CheckpointError: as ``read``.
        """
        names = {linear: self._weight_name(linear) for linear in linears}
        tensors = self.read(names.values())
        weights = {}
        for linear, name in names.items():
            module = self._stored(name)[0].removesuffix(_WEIGHT)
            dtype = FLOAT_DTYPES.get(self.checkpoint.linear_dtype(module))
            weights[linear] = tensors[name].to(dtype or tensors[name].dtype)
        return weights

    def read_stored(self, linear: str) -> StoredWeight:
        """Read a weight as it is quantized while it loads, or as ``prepare`` wrote it.

        Args:
            linear: the name that it has in an artifact.

        Raises:
            CheckpointError: as ``read``.
        """
        name = self._weight_name(linear)
        if self.checkpoint.prepared_weights:
            source, kind, fused = self._stored(name)
            module = source.removesuffix(_WEIGHT)
            shape = self.checkpoint.linear_shape(module)
            rows = None
            if fused is not None and shape is not None:
                rows = self.rows(fused, kind, shape[0])
            return self.checkpoint.read_linear(module, rows)
        return self._encoded(name)

    def _encoded(self, name: str) -> StoredWeight:
        """The weight of a linear, quantized as it is while it loads."""
        if self.load_time is None:
            raise ValueError("the weights are served as the checkpoint stores them")
        if not self._is_quantized_weight(name):
            return self.load_time.encode(self._read([name])[name].to(self.device))
        source, kind, fused = self._stored(name)
        module = source.removesuffix(_WEIGHT)
        whole = self.load_time.requantise(
            self.checkpoint.read_linear(module).to(self.device),
            FLOAT_DTYPES[self.checkpoint.linear_dtype(module)],
        )
        if fused is None:
            return whole
        layout = on_disk_layout(self.load_time.name)
        rows = self.rows(fused, kind, whole.n)
        return layout.store(layout.rows(layout.tensors(whole), rows))

    def _is_quantized_weight(self, name: str) -> bool:
        """Whether a linear takes part whose weight the checkpoint has quantized."""
        if not self.checkpoint.quantized or not self._is_weight(name):
            return False
        module = self._stored(name)[0].removesuffix(_WEIGHT)
        return self.checkpoint.linear_layout(module) is not None

    def read_scales(self, linear: str) -> Tensor | None:
        """What the artifact has to know of a weight that is quantized while it loads.

        Args:
            linear: the name that it has in an artifact.

        Returns:
            float32 [N], see ``LoadTimeFormat.scales``; None where it needs nothing.

        Raises:
            CheckpointError: as ``read``.
        """
        if self.load_time is None or not self.load_time.artifact_scales:
            return None
        name = self._weight_name(linear)
        return self.load_time.scales(self._read([name])[name])

    def rows(self, fused: FusedTensor, kind: str, total: int) -> slice:
        """The rows of a part of a fused tensor.

        Raises:
            CheckpointError: config.json does not fit the tensor.
        """
        try:
            return fused.rows(kind, self.config, total)
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"{self.checkpoint.directory}: {error}; config and weights belong to"
                " different models"
            ) from error

    def _weight_name(self, linear: str) -> str:
        """By transformers' names, from the name that a linear has in an artifact."""
        parsed = LinearName.parse(linear)
        if parsed.path == self.layer_path:
            parsed = replace(parsed, path=_LAYERS)
        return f"{parsed}{_WEIGHT}"

    def _is_weight(self, name: str) -> bool:
        """Whether a tensor is the weight of a linear that takes part."""
        parsed = LinearName.parse(name.removesuffix(_WEIGHT))
        if not name.endswith(_WEIGHT) or parsed.path != _LAYERS or parsed.layer is None:
            return False
        return any(kind.name == parsed.kind for kind in self.layer(parsed.layer))

    def _expert_parts(self, source: str) -> list[list[str]] | None:
        """Names of what is stacked to a tensor that the checkpoint does not have."""
        experts = self.family.experts
        path, _, tensor = source.rpartition(".")
        if experts is None or self.checkpoint.has(source):
            return None
        if LinearName.parse(path).kind != experts.module:
            return None
        return experts.parts(path, tensor, self.config)

    def _stacked(self, experts: Sequence[Sequence[str]]) -> Tensor:
        """[experts, N, K] from the linears of each, one below the other."""
        tensors = self.checkpoint.read(name for parts in experts for name in parts)
        return torch.stack(
            [torch.cat([tensors[name] for name in parts]) for parts in experts]
        )

    def _stored(self, name: str) -> tuple[str, str, FusedTensor | None]:
        """The checkpoint's tensor, and the kind that is part of it."""
        module, _, suffix = name.rpartition(".")
        parsed = LinearName.parse(module)
        if parsed.path == _LAYERS and parsed.layer is not None:
            source, fused = self.stored_linear(parsed.layer, parsed.kind)
            return f"{source}.{suffix}", parsed.kind, fused
        if name.startswith(_BODY):
            name = f"{self._body}.{name.removeprefix(_BODY)}"
        elif name.startswith(_HEAD):
            name = f"{self._head}.{name.removeprefix(_HEAD)}"
        return name, "", None


def _first_present(paths: Iterable[str], names: Iterable[str]) -> str:
    """The first path under which there are tensors; the first of all where none has."""
    paths, names = list(paths), list(names)
    for path in paths:
        if any(name.startswith(f"{path}.") for name in names):
            return path
    return paths[0]
