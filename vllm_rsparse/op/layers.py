# SPDX-License-Identifier: Apache-2.0
"""The numbers that identify the layers of a process, and the operands of each.

A layer's number is an attribute of its thresholds and not an argument of the op: as an
argument it would be a constant of the traced graph, and vLLM, which compiles equal
graphs once, would find no two equal decoder layers. Weights that are reloaded in place
keep their tensors, and with them the number.
"""

import itertools
from collections.abc import Callable

from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.registry import format_of_code
from vllm_rsparse.op.operands import SparseOperands

_ATTRIBUTE = "rsparse_layer"
_numbers = itertools.count()
# The operands of the last call by number, so that they are built and checked once.
_operands: dict[int, SparseOperands] = {}
# x [M, K], bias -> [M, N]: what dense steps of a layer use instead of the backend's
# dense route, such as the base model's own layer.
DenseLayer = Callable[[Tensor, Tensor | None], Tensor]
_dense: dict[int, DenseLayer] = {}


def next_layer() -> int:
    """A number that no other layer of this process has."""
    return next(_numbers)


def set_layer(thresholds: Tensor, layer: int) -> None:
    """Give a layer's number to the thresholds that the op will be called with."""
    setattr(thresholds, _ATTRIBUTE, layer)


def layer_of(thresholds: Tensor) -> int | None:
    """The number, or None if the tensors belong to no numbered layer."""
    return getattr(thresholds, _ATTRIBUTE, None)


def set_dense_layer(layer: int, dense: DenseLayer) -> None:
    """Let the dense steps of a layer take a route of their own."""
    _dense[layer] = dense


def dense_layer_of(thresholds: Tensor) -> DenseLayer | None:
    """The route of a layer's dense steps; None: the backend's dense route."""
    layer = layer_of(thresholds)
    return None if layer is None else _dense.get(layer)


def forget_layer(layer: int) -> None:
    """Release a layer's tensors, when it is unloaded or they are replaced."""
    _operands.pop(layer, None)
    _dense.pop(layer, None)


def operands_of_call(
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    thresholds: Tensor,
    u: Tensor,
    v: Tensor,
    correction: Tensor | None,
    shard_sizes: list[int],
    ranks: list[int],
    format_code: int,
    group: int,
) -> SparseOperands:
    """The operands of a call of the op, from its flat arguments.

    Those of a numbered layer are cached: building and checking them takes 9 us (AMD
    EPYC), as long as the rest of a call. They are reused while every tensor is the same
    object.
    """
    layer = layer_of(thresholds)
    if layer is not None:
        known = _operands.get(layer)
        if (
            known is not None
            and known.thresholds is thresholds
            and known.weight.data is weight
            and known.weight.scales is scales
            and known.weight.zeros is zeros
            and known.u is u
            and known.v is v
            and known.correction is correction
        ):
            return known
    stored = StoredWeight(
        format_of_code(format_code),
        weight,
        sum(shard_sizes),
        thresholds.shape[1],
        scales,
        zeros,
        group,
    )
    operands = SparseOperands(
        stored, thresholds, u, v, correction, tuple(shard_sizes), tuple(ranks)
    )
    if layer is not None:
        _operands[layer] = operands
    return operands
