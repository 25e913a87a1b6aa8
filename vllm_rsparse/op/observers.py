# SPDX-License-Identifier: Apache-2.0
"""Observers of the op's calls: any number of them; layers are known by number."""

from collections.abc import Callable

from torch import Tensor

from vllm_rsparse.op.layers import layer_of
from vllm_rsparse.op.operands import SparseOperands

# (number of the layer, x, operands, whether the call goes dense), before each call.
Observer = Callable[[int, Tensor, SparseOperands, bool], None]

_observers: list[Observer] = []


def add_observer(observer: Observer) -> None:
    """Notify an observer of every call of a numbered layer whose Python body runs."""
    _observers.append(observer)


def remove_observer(observer: Observer) -> None:
    """Undo ``add_observer``; nothing happens if the observer is not there."""
    if observer in _observers:
        _observers.remove(observer)


def notify(x: Tensor, operands: SparseOperands, dense: bool) -> None:
    """Notify all observers of a call, in the order in which they were added."""
    if not _observers:
        return
    layer = layer_of(operands.thresholds)
    if layer is None:
        return
    for observer in tuple(_observers):
        observer(layer, x, operands, dense)
