# SPDX-License-Identifier: Apache-2.0
"""The linears of transformers' models, each as a module of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_rsparse.model.kinds import SHARED_EXPERT
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.layer_spec import FusedTensor, LayerSpec
from vllm_rsparse.model.names import LinearName, label_of


class _Joined(nn.Module):
    """Stands where a fused linear stood and concatenates what its parts give.

    The parts belong to its parent and are looked up in each call: they may be replaced.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._parent = (parent,)  # in a tuple, or it would be a submodule of this one
        self._names = names

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        (parent,) = self._parent
        return torch.cat([getattr(parent, name)(x) for name in self._names], dim=-1)


def linear_modules(
    model: Any, language_model: LanguageModel
) -> dict[str, tuple[nn.Module, str]]:
    """Where the linears of a transformers model are; fused ones are split for that.

    Args:
        model: of the checkpoint, or of the language model that it wraps.
        language_model: of the same checkpoint.

    Returns:
        The decoder layer of each linear and its kind, which is the module's name
        within the layer, by the linear's name in the checkpoint.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    for index, layer in enumerate(getattr(model.get_decoder(), "layers", ())):
        spec = language_model.layer(index)
        expose_linears(layer, spec, language_model.config)
        for kind in spec:
            name = LinearName(language_model.layer_path, index, kind.name)
            found[str(name)] = (layer, kind.name)
    return found


def expose_linears(
    layer: nn.Module, spec: LayerSpec, config: Mapping[str, Any]
) -> None:
    """Give every linear of a decoder layer a module and inputs [windows, tokens, K].

    The layer computes what it did.

    Args:
        layer: of transformers' model.
        spec: its linears.
        config: of the language model.

    Raises:
        ValueError: the config does not fit a fused weight.
    """
    split_fused(layer, spec, config)
    if any(kind in SHARED_EXPERT for kind in spec):
        _keep_windows(layer.get_submodule("mlp"), "shared_expert")


def _keep_windows(block: nn.Module, name: str) -> None:
    """Undo that a block joins all windows before it calls a module of its own."""
    shapes: list[torch.Size] = []

    def note(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes[:] = [args[0].shape]

    def part(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].view(shapes[0]),)

    def join(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.flatten(0, -2)

    block.register_forward_pre_hook(note)
    module = block.get_submodule(name)
    module.register_forward_pre_hook(part)
    module.register_forward_hook(join)


def split_fused(layer: nn.Module, spec: LayerSpec, config: Mapping[str, Any]) -> None:
    """Give every linear of a decoder layer a module of its own, named by its kind.

    The parts share the fused weight's memory, and the layer computes what it did.

    Args:
        layer: of transformers' model.
        spec: its linears.
        config: of the language model.

    Raises:
        ValueError: the config does not fit the weight.
    """
    for fused in spec.fused:
        whole = layer.get_submodule(fused.module)
        path, _, name = fused.module.rpartition(".")
        parent = layer.get_submodule(path)
        labels = [label_of(kind) for kind in fused.parts]
        for kind, label in zip(fused.parts, labels, strict=True):
            setattr(parent, label, _part(whole, fused, kind, config))
        setattr(parent, name, _Joined(parent, labels))


def _part(
    whole: nn.Module, fused: FusedTensor, kind: str, config: Mapping[str, Any]
) -> nn.Linear:
    if not isinstance(whole, nn.Linear):
        raise TypeError(f"{fused.module} is {type(whole).__name__}, not a Linear")
    rows = fused.rows(kind, config, whole.out_features)
    with torch.device("meta"):
        part = nn.Linear(
            whole.in_features, rows.stop - rows.start, whole.bias is not None
        )
    part.weight = nn.Parameter(whole.weight[rows], whole.weight.requires_grad)
    if whole.bias is not None:
        part.bias = nn.Parameter(whole.bias[rows], whole.bias.requires_grad)
    return part.train(whole.training)
