# SPDX-License-Identifier: Apache-2.0
"""``ModuleWeights``: loads one module of a skeleton at a time."""

from typing import Any

import torch
from torch import Tensor, nn

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.finite import check_weight
from vllm_rsparse.model.language_model import LanguageModel

# On CUDA, the share of the free memory that keeps weights of layers: reading and
# copying a layer takes longer than running it. On a CPU, layers are read from the page
# cache each time.
KEPT_SHARE = 0.4


class ModuleWeights:
    """The weights of a model whose modules are on the meta device.

    Args:
        tensors: of the checkpoint.
        model: the skeleton.
        device: where modules get their weights.
    """

    def __init__(
        self, tensors: LanguageModel, model: Any, device: torch.device
    ) -> None:
        self._tensors = tensors
        self._directory = tensors.checkpoint.directory
        self._model = model
        self._device = device
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._room = 0
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            self._room = int(KEPT_SHARE * free)

    def materialise(self, module: nn.Module, prefix: str) -> None:
        """Give a module its weights; ``module.to("meta")`` frees what is not kept.

        Args:
            module: of the skeleton.
            prefix: its name in the language model, for example ``model.layers.0``.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or a buffer is not
                initialised by transformers.
            NotFiniteError: NaN or infinity in a tensor.
        """
        state = self._kept.get(prefix)
        if state is None:
            state = self._read(module, prefix)
            size = sum(tensor.nbytes for tensor in state.values())
            if size <= self._room:
                self._room -= size
                self._kept[prefix] = state
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)
        for name, submodule in module.named_modules():
            if submodule._non_persistent_buffers_set:
                self._initialise_buffers(submodule, f"{prefix}.{name}".rstrip("."))

    def _read(self, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        """A module's state from the checkpoint, on the device."""
        expected = module.state_dict()
        stored = self._tensors.read(f"{prefix}.{name}" for name in expected)
        state = {}
        for name, meta in expected.items():
            tensor = stored.pop(f"{prefix}.{name}")
            if tensor.shape != meta.shape:
                raise CheckpointError(
                    f"{self._directory}: {prefix}.{name} is"
                    f" {list(tensor.shape)}, but config.json makes it"
                    f" {list(meta.shape)}; config and weights belong to different"
                    " models"
                )
            state[name] = self._converted(f"{prefix}.{name}", tensor, meta.dtype)
        return state

    def _converted(self, name: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the checkpoint on the device, refused where it is not finite."""
        converted = stored.to(self._device, dtype)
        check_weight(stored, converted, f"{self._directory}: {name}")
        return converted

    def _initialise_buffers(self, module: nn.Module, where: str) -> None:
        """Compute what no checkpoint contains (rotary frequencies, embedding scales).

        ``_init_weights`` is the method that each model overrides for this, and that
        ``from_pretrained`` calls for the same purpose. Loaded parameters are marked, so
        it does not change them.
        """
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        names = sorted(module._non_persistent_buffers_set)
        for name in names:
            buffer = getattr(module, name)
            fill = float("nan") if buffer.is_floating_point() else -1
            module.register_buffer(
                name,
                torch.full_like(buffer, fill, device=self._device),
                persistent=False,
            )
        self._model._init_weights(module)
        for name in names:
            buffer = getattr(module, name)
            if buffer.is_floating_point() and buffer.isnan().any():
                raise CheckpointError(
                    f"{type(self._model).__name__}: transformers does not initialise"
                    f" the buffer {where}.{name}, so the model cannot be streamed; it"
                    " is not supported"
                )
