# SPDX-License-Identifier: Apache-2.0
"""What every stage of one ``prepare`` works on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Self

from torch import Tensor

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.store.run_store import Key, RunStore

# Leading part of each calibration window that runs dense and is not counted, where
# activations of the sparse model are used: it stands for the prompt.
DENSE_FRACTION = 0.1


@dataclass(frozen=True)
class LayerLinears:
    """The linears of one decoder layer that take part, in running order.

    Attributes:
        index: of the decoder layer in the model.
        linears: at least one.
    """

    index: int
    linears: tuple[Linear, ...]

    def __iter__(self) -> Iterator[Linear]:
        return iter(self.linears)

    def __len__(self) -> int:
        return len(self.linears)


@dataclass(frozen=True, eq=False)
class Run:
    """One preparation: the model, its calibration text, and its results so far.

    Attributes:
        model: the streamed base model.
        linears: all linears that take part, layer by layer.
        windows: int64 [samples, tokens], the calibration text.
        dense_prefix: leading positions of each window that stay dense and do not
            count; 0 where thresholds are calibrated on the dense model's activations.
        seed: of labels, randomised methods and searches.
        store: keeps results for an interrupted run to resume from.
        sparsity: of the artifact that is worked on; None in the stages that all
            sparsities share.
        head_sparsity: target of the output layer; 0: it is dense.
    """

    model: StreamedModel
    linears: tuple[Linear, ...]
    windows: Tensor
    dense_prefix: int
    seed: int
    store: RunStore
    sparsity: float | None = None
    head_sparsity: float = 0.0

    @cached_property
    def layers(self) -> tuple[LayerLinears, ...]:
        """The linears by decoder layer, first to last."""
        return tuple(
            LayerLinears(index, tuple(group))
            for index, group in groupby(self.linears, lambda linear: linear.layer)
        )

    def at(self, sparsity: float) -> Self:
        """The same for the artifact of one sparsity."""
        return replace(self, sparsity=sparsity)

    def key(self, stage: str, item: int | str) -> Key:
        """Key of a result that holds for this run's sparsity only."""
        if self.sparsity is None:
            return Key(stage, item)
        return Key(f"{stage}.{self.sparsity!r}", item)

    def with_windows(self, windows: Tensor) -> Self:
        """The same on other windows."""
        return replace(self, windows=windows)

    def with_dense_prefix(self) -> Self:
        """The same with the leading ``DENSE_FRACTION`` of each window dense."""
        return replace(self, dense_prefix=dense_prefix(self.windows))


def dense_prefix(windows: Tensor) -> int:
    """``DENSE_FRACTION`` of windows [samples, tokens], in tokens, rounded down."""
    return int(DENSE_FRACTION * windows.shape[1])
