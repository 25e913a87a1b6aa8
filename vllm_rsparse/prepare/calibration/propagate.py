# SPDX-License-Identifier: Apache-2.0
"""Inputs of a layer's linears as the sparse model produces them.

Thresholds found on the dense model's activations skip 1 to 3 points more than requested
(bundled model, 50 to 70%), because sparse linears change the inputs of later ones. Here
the linears of a layer are calibrated in the order in which they run, and each runs
sparse from then on, which affects this layer and, through the hidden states, all later
ones.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.model.finite import check_activations
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.op.reference import kept_mask
from vllm_rsparse.prepare.calibration.replay import set_forward


class _Reached(Exception):  # noqa: N818 (no error)
    """The wanted input has arrived: the rest of the layer need not run."""


def stages(members: Iterable[Linear]) -> Iterator[list[Linear]]:
    """The linears of a layer, grouped by their common input, in running order."""
    for _, group in groupby(members, lambda linear: linear.input_group):
        yield list(group)


@torch.no_grad()
def stage_input(
    model: StreamedModel,
    linear: Linear,
    layer: nn.Module,
    hidden: Tensor,
    dense_prefix: int,
) -> Tensor:
    """The input of a linear, [samples x (tokens - dense_prefix), K].

    Hidden states are not changed.

    Args:
        model: the streamed model; ``layer`` is the materialised layer of ``linear``.
        linear: whose input is wanted.
        layer: with the linears that run before it already sparse.
        hidden: [samples, tokens, hidden], entering the layer.
        dense_prefix: leading positions of each window that are left out.

    Raises:
        NotFiniteError: it contains NaN or infinity.
    """
    rows: list[Tensor] = []

    def reach(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(args[0][:, dense_prefix:].flatten(0, 1))
        raise _Reached

    handle = layer.get_submodule(linear.kind).register_forward_pre_hook(reach)
    try:
        for windows in model.batches(hidden):
            with suppress(_Reached):
                model.call_layer(linear.layer, hidden[windows], windows)
    finally:
        handle.remove()
    x = torch.cat(rows)
    check_activations(x, f"the input of {linear.name}")
    return x


@contextmanager
def sparse_linears(layer: nn.Module) -> Iterator["SparseLayer"]:
    """A layer whose linears can be made sparse; all are dense again afterwards."""
    sparse = SparseLayer(layer)
    try:
        yield sparse
    finally:
        sparse.restore()


class SparseLayer:
    """Makes linears of one layer sparse behind each window's dense prefix."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._changed: list[tuple[nn.Module, Callable[..., Tensor] | None]] = []

    def install(
        self,
        kind: str,
        tensors: LinearTensors,
        dense: int | Tensor,
        first: Tensor | None = None,
    ) -> None:
        """Run the linear of this kind sparse, with tensors on the layer's device.

        Args:
            kind: of the linear.
            tensors: of the artifact.
            dense: leading positions of each window that stay dense; or bool [windows,
                tokens], those that do.
            first: what the first of two planes of the weight stands for, [N, K]; None
                where it is read whole.
        """
        module = self._layer.get_submodule(kind)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{kind} is {type(module).__name__}, not a Linear")
        weight, bias = module.weight, module.bias
        u = None if tensors.u is None else tensors.u.to(weight.dtype)
        v = None if tensors.v is None else tensors.v.to(weight.dtype)

        rows = tensors.thresholds.view(-1, weight.shape[1])
        parts = [weight]
        if first is not None:
            parts = [first.to(weight.dtype), weight - first.to(weight.dtype)]

        def run_sparse(rest: Tensor) -> Tensor:
            flat = rest.reshape(-1, rest.shape[-1])
            masks = kept_mask(flat, rows).view(-1, *rest.shape)
            mask = masks[0]
            y = functional.linear(rest.masked_fill(~mask, 0), parts[0], bias)
            for part, more in zip(parts[1:], masks[1:], strict=True):
                y = y + functional.linear(rest.masked_fill(~more, 0), part)
            if u is not None and v is not None:
                y = y + (rest.masked_fill(mask, 0) @ v.mT) @ u.mT
            if tensors.correction is not None:
                y = y + tensors.correction.to(y.dtype)
            return y

        def forward(x: Tensor) -> Tensor:
            if isinstance(dense, Tensor):
                y = functional.linear(x, weight, bias)
                y[~dense] = run_sparse(x[~dense])
                return y
            exact, rest = x[:, :dense], x[:, dense:]
            y = functional.linear(exact, weight, bias)
            return torch.cat([y, run_sparse(rest)], dim=1)

        # An attribute of the instance: the layer keeps its modules and their names.
        self._changed.append((module, module.__dict__.get("forward")))
        set_forward(module, forward)

    def restore(self) -> None:
        """As they were: dense."""
        while self._changed:
            set_forward(*self._changed.pop())
