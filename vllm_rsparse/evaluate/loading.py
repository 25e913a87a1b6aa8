# SPDX-License-Identifier: Apache-2.0
"""A base model in PyTorch whose linears can be switched to sparse."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_rsparse.artifact.schema import LinearEntry
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import ArtifactError, SettingError
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.formats.registry import load_time_format
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.loading import load_model
from vllm_rsparse.model.modules import linear_modules
from vllm_rsparse.model.names import HEAD
from vllm_rsparse.op.reference import kept_mask


class SwitchableLinear(nn.Module):
    """A linear of the base model, or that of a prepared one.

    Attributes:
        sparse: bool [windows, positions], where the prepared model is sparse, it is
            dense elsewhere; None makes it the base model's.
        served: the prepared model's weight where that is quantized while it loads.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.sparse: Tensor | None = None
        self.served: StoredWeight | None = None
        self.thresholds: Tensor | None = None
        self.u: Tensor | None = None
        self.v: Tensor | None = None
        self.correction: Tensor | None = None
        # On the device, so that counting does not wait for it.
        self._kept = torch.zeros(2, dtype=torch.int64, device=linear.weight.device)

    @property
    def weight(self) -> Tensor:
        """The base model's, [N, K]."""
        return self.linear.weight

    @property
    def kept(self) -> list[int]:
        """Channels kept by each plane of the weight (one where it is read whole).

        Summed over the sparse positions seen since ``restart``.
        """
        planes = 1 if self.served is None else self.served.format.planes
        return self._kept[:planes].tolist()

    def restart(self) -> None:
        """Count from zero."""
        self._kept.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[windows, positions, K] -> [windows, positions, N]."""
        if self.sparse is None or self.thresholds is None:
            return self.linear(x)
        weight, bias = self.linear.weight, self.linear.bias
        planes: tuple[Tensor, ...] = (weight,)
        if self.served is not None:
            planes = self.served.format.dequantise_planes(self.served)
        sparse = self.sparse.unsqueeze(-1)
        rows = self.thresholds.view(-1, x.shape[-1])
        masks = kept_mask(x.flatten(0, 1), rows).view(-1, *x.shape)
        self._kept[: len(rows)] += (masks & sparse).sum((1, 2, 3))
        masks |= ~sparse
        mask = masks[0]
        y = functional.linear(x.masked_fill(~mask, 0), planes[0].to(x.dtype), bias)
        for plane, more in zip(planes[1:], masks[1:], strict=True):
            y = y + functional.linear(x.masked_fill(~more, 0), plane.to(x.dtype))
        if self.u is not None and self.v is not None:
            dropped = x.masked_fill(mask, 0)
            y = y + functional.linear(functional.linear(dropped, self.v), self.u)
        if self.correction is not None:
            y = y + self.correction * sparse
        return y


class SwitchableModel:
    """The base model with every linear that an artifact lists made switchable.

    Args:
        checkpoint: the base model, or a prepared directory's link to it.
        device: where to run.
        dtype: dtype of weights and activations.

    Raises:
        ArtifactError: transformers cannot load the model, or it lacks a linear.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.directory = checkpoint.directory
        self.device = device
        self.dtype = dtype
        self.model, self._modules = _load_base(checkpoint, dtype, device)
        self._checkpoint = checkpoint
        self.linears: dict[str, SwitchableLinear] = {}
        self.head = SwitchableLinear(self.model.get_output_embeddings())
        self.model.set_output_embeddings(self.head)
        # By load-time format and linear: artifacts take turns, batch by batch.
        self._quantized: dict[tuple[str, str], StoredWeight] = {}

    def use(self, artifact: Artifact) -> None:
        """Install an artifact's thresholds, factors and corrections; counters restart.

        Raises:
            ArtifactError: the artifact belongs to another model.
        """
        self._use_head(artifact)
        for name, entry in artifact.info.linears.items():
            module = self._switchable(name, entry, artifact)
            tensors = artifact.read(name)
            module.thresholds = tensors.thresholds.to(self.device)
            module.served = self._served(name, artifact)
            module.u = self._cast(tensors.u)
            module.v = self._cast(tensors.v)
            module.correction = self._cast(tensors.correction)
            module.restart()
        for name in self.linears.keys() - artifact.info.linears.keys():
            self.linears[name].thresholds = None

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def longest(self) -> int | None:
        """Positions that the model has, where its config limits them."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def check_window(self, window: int) -> None:
        """Refuse windows longer than the model's positions (SettingError)."""
        if self.longest and window > self.longest:
            raise SettingError(
                f"--window {window} is more than the model's length of {self.longest}"
                " (max_position_embeddings)"
            )

    @torch.inference_mode()
    def logits(self, windows: Tensor, first: int, sparse: Tensor | bool) -> Tensor:
        """Logits from position ``first`` of each window on.

        Args:
            windows: int64 [windows, positions].
            first: positions before it give no logits.
            sparse: bool [windows, positions], the sparse positions of the prepared
                model; True: those from ``first`` on; False: the base model.

        Returns:
            [windows, positions - first, vocabulary] in the compute dtype.
        """
        mask = None
        if isinstance(sparse, Tensor):
            mask = sparse.to(self.device)
        elif sparse:
            mask = torch.ones(windows.shape, dtype=torch.bool, device=self.device)
            mask[:, :first] = False
        for module in self.linears.values():
            module.sparse = mask
        # It sees the positions that give logits.
        self.head.sparse = None if mask is None else mask[:, first:]
        return self.model(
            input_ids=windows.to(self.device),
            use_cache=False,
            logits_to_keep=windows.shape[1] - first,
        ).logits

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Greedy answers of the dense model, whatever else its config asks for.

        Args:
            prompts: tokens of each; they run together, padded at the start.
            tokens: longest answer.

        Returns:
            Tokens of each answer, with the one that ends it if it was reached.
        """
        from transformers import GenerationConfig

        for module in self.linears.values():
            module.sparse = None
        self.head.sparse = None
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
        )
        found = self.model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=greedy,
        )
        answers = []
        for reply in found[:, longest:].tolist():
            reached = [i for i, token in enumerate(reply) if token in ends]
            answers.append(reply[: reached[0] + 1] if reached else reply)
        return answers

    def kept(self, name: str) -> list[int]:
        """Channels that a linear or the output layer has kept, by plane."""
        return (self.head if name == HEAD else self.linears[name]).kept

    def _use_head(self, artifact: Artifact) -> None:
        load_time, entry = (
            load_time_format(artifact.info.head),
            artifact.info.sparse_head,
        )
        head, weight = self.head, self.head.weight.detach()
        head.served = None
        if load_time is not None:
            key = (load_time.name, HEAD)
            if key not in self._quantized:
                self._quantized[key] = load_time.encode(weight)
            head.served = self._quantized[key]
        head.thresholds = None
        if entry is not None:
            _require_shape(HEAD, entry, weight, artifact)
            head.thresholds = artifact.read(HEAD).thresholds.to(self.device)
        elif head.served is not None:
            # All channels, of the quantized weight.
            shape = (head.served.format.planes, weight.shape[1])
            head.thresholds = torch.full(shape, -1.0, device=self.device)
        head.restart()

    def _switchable(
        self, name: str, entry: LinearEntry, artifact: Artifact
    ) -> SwitchableLinear:
        if name not in self.linears:
            try:
                layer, kind = self._modules[name]
                linear = layer.get_submodule(kind)
            except (AttributeError, KeyError):
                linear = None
            if not isinstance(linear, nn.Linear):
                raise ArtifactError(
                    f"{artifact.json_path}: lists {name}, which this model does not"
                    " have; the artifact belongs to another model"
                )
            self.linears[name] = SwitchableLinear(linear)
            layer.set_submodule(kind, self.linears[name])
        _require_shape(name, entry, self.linears[name].weight, artifact)
        return self.linears[name]

    def _served(self, name: str, artifact: Artifact) -> StoredWeight | None:
        """A linear's weight as the engine quantizes it; None: as it is stored."""
        load_time = load_time_format(artifact.info.weights)
        if load_time is None:
            return None
        key = (load_time.name, name)
        if key not in self._quantized:
            self._quantized[key] = self._quantize(name, load_time, artifact)
        return self._quantized[key]

    def _quantize(
        self, name: str, load_time: LoadTimeFormat, artifact: Artifact
    ) -> StoredWeight:
        if self._checkpoint.quantized:
            model = LanguageModel(self._checkpoint, load_time, self.device)
            return model.read_stored(name).to(self.device)
        scales = artifact.read_scales(name)
        return load_time.encode(
            self.linears[name].linear.weight.detach(),
            None if scales is None else scales.to(self.device),
        )

    def _cast(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.device, self.dtype)


def _require_shape(
    name: str, entry: LinearEntry, weight: Tensor, artifact: Artifact
) -> None:
    if tuple(weight.shape) != entry.shape:
        raise ArtifactError(
            f"{artifact.json_path}: {name} is {list(entry.shape)}, but the model's is"
            f" {list(weight.shape)}; the artifact belongs to another model"
        )


def _load_base(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> tuple[Any, dict[str, tuple[nn.Module, str]]]:
    """The base model, and where its linears are."""
    try:
        model = load_model(checkpoint, dtype, device)
        modules = linear_modules(model, LanguageModel(checkpoint))
    # Unknown architectures, remote code, broken weights: each its own exception.
    except Exception as error:
        raise ArtifactError(
            f"{checkpoint.directory}: transformers cannot load the base model ({error})"
        ) from error
    return model, modules
