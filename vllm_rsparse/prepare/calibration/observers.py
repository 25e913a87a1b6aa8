# SPDX-License-Identifier: Apache-2.0
"""Collect the inputs of the linears of one decoder layer during calibration."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.model.finite import check_activations
from vllm_rsparse.model.linears import Linear


def input_channels(linears: Iterable[Linear]) -> int:
    """Channels of the distinct inputs of a layer's linears, in the largest layer."""
    channels: Counter[int] = Counter()
    for linear in linears:
        if linear.kind == linear.input_group:
            channels[linear.layer] += linear.shape[1]
    return max(channels.values())


class LayerInputs:
    """The distinct inputs of a layer's linears, over all tokens.

    They are kept in the compute dtype: tokens x (2 hidden + attention + intermediate)
    elements in a Llama, the largest data that ``prepare`` has in memory.

    Args:
        members: the linears of the layer.
        total_tokens: calibration tokens in all.
    """

    def __init__(self, members: Iterable[Linear], total_tokens: int) -> None:
        self._groups = {linear.kind: linear.input_group for linear in members}
        self._total = total_tokens
        self._inputs: dict[str, Tensor] = {}
        self._filled: dict[str, int] = {}

    def of(self, linear: Linear) -> Tensor:
        """Input [tokens, K] of a linear of the layer.

        Raises:
            NotFiniteError: it contains NaN or infinity.
        """
        x = self[linear.kind]
        check_activations(x, f"the input of {linear.name}")
        return x

    def __getitem__(self, kind: str) -> Tensor:
        """Input [tokens, K] of the layer's linear of this kind."""
        return self._inputs[self._groups[kind]]

    @contextmanager
    def observe(self, layer: nn.Module) -> Iterator[None]:
        """Collect while the layer runs; every call appends its tokens."""
        handles = [
            layer.get_submodule(kind).register_forward_pre_hook(self._hook(kind))
            for kind in self._groups
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for kind, filled in self._filled.items():
            if filled != self._total:
                raise PrepareError(
                    f"{kind} saw {filled} of {self._total} calibration tokens: this"
                    " model does not call it once per token and is not supported"
                )

    def _hook(self, kind: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        source = self._groups[kind]

        def append(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            if kind not in self._inputs and kind == source:
                self._inputs[kind] = x.new_empty(self._total, x.shape[1])
            start = self._filled.get(kind, 0)
            rows = self._inputs[source][start : start + len(x)]
            self._filled[kind] = start + len(x)
            if kind == source:
                rows.copy_(x)
            elif rows.shape != x.shape or not torch.equal(rows, x):
                raise PrepareError(
                    f"{kind} and {source} read different inputs in this model, which"
                    " vLLM would fuse into one; it is not supported"
                )

        return append
