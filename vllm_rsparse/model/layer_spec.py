# SPDX-License-Identifier: Apache-2.0
"""How the linears of a decoder layer are described, and stored in a checkpoint."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_rsparse.model.kinds import LinearKind
from vllm_rsparse.model.names import label_of


@dataclass(frozen=True)
class FusedTensor:
    """A module of the checkpoint that holds several linears, one below the other.

    Attributes:
        module: its name within the layer, "self_attn.qkv_proj".
        parts: the kinds in the order of its rows, all of the same parent as it is.
        shares: of a config, the rows of each part relative to the others'.
    """

    module: str
    parts: tuple[str, ...]
    shares: Callable[[Mapping[str, Any]], tuple[int, ...]]

    def rows(self, part: str, config: Mapping[str, Any], total: int) -> slice:
        """The rows of one part.

        Args:
            part: a kind.
            config: of the language model.
            total: rows of the whole.

        Raises:
            ValueError: the rows cannot be divided so.
        """
        shares = self.shares(config)
        unit, rest = divmod(total, sum(shares))
        if rest:
            raise ValueError(
                f"{self.module} has {total} rows, which config.json cannot divide into"
                f" {', '.join(map(label_of, self.parts))} as {shares}"
            )
        position = self.parts.index(part)
        start = unit * sum(shares[:position])
        return slice(start, start + unit * shares[position])


@dataclass(frozen=True)
class LayerSpec:
    """The linears of one decoder layer.

    Attributes:
        kinds: in the order in which they run.
        fused: modules that hold several of them in the checkpoint; all others have a
            module of their own.
    """

    kinds: tuple[LinearKind, ...]
    fused: tuple[FusedTensor, ...] = ()

    def __iter__(self) -> Iterator[LinearKind]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def fused_tensor(self, kind: str) -> FusedTensor | None:
        """The module that holds a kind together with others; None for its own."""
        return next((fused for fused in self.fused if kind in fused.parts), None)

    def without(self, lacking: Collection[str]) -> "LayerSpec":
        """The same layer without the linears whose names start with one of these."""

        def stays(kind: str) -> bool:
            return not kind.startswith(tuple(lacking))

        return LayerSpec(
            tuple(kind for kind in self.kinds if stays(kind.name)),
            tuple(fused for fused in self.fused if stays(fused.module)),
        )
