# SPDX-License-Identifier: Apache-2.0
"""Layers to measure: of well-known models by shape, or of a prepared model."""

from dataclasses import dataclass, replace

from vllm_rsparse.artifact.schema import ArtifactInfo, LinearEntry, factor_rank
from vllm_rsparse.errors import SettingError
from vllm_rsparse.formats.fp8_block import BLOCK, FP8_BLOCK
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.formats.int8_planes import INT8_PLANES
from vllm_rsparse.formats.names import AS_STORED
from vllm_rsparse.formats.plain import FLOAT
from vllm_rsparse.formats.plane_bits import group_of
from vllm_rsparse.model.families import by_engine_layer, kind_of
from vllm_rsparse.model.names import HEAD, LinearName, label_of


@dataclass(frozen=True)
class Layer:
    """A linear layer as one rank of the engine sees it.

    Attributes:
        name: of the engine's layer, without "_proj": ``qkv``.
        shard_sizes: output features N_s of the fused shards.
        k: input features.
        kept: fraction of the channels that one token keeps.
        ranks: rank of each shard's factors.
        count: number of such layers in a model.
        format: name of the weight's format.
        group: input channels that share a scale, where the format has groups.
        full: fraction of the channels that one token reads with all planes, in a format
            with several.
    """

    name: str
    shard_sizes: tuple[int, ...]
    k: int
    kept: float = 0.5
    ranks: tuple[int, ...] = ()
    count: int = 1
    format: str = "float"
    group: int = 0
    full: float = 0.0

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", (0,) * len(self.shard_sizes))

    @property
    def n(self) -> int:
        """Output features of all shards."""
        return sum(self.shard_sizes)

    def with_budget(self, sparsity: float, rho: float) -> "Layer":
        """The layer at a target sparsity, a share rho of the budget for channels."""
        ranks = [factor_rank(n, self.k, sparsity, rho) for n in self.shard_sizes]
        kept = rho * (1 - sparsity)
        return replace(self, kept=kept, ranks=tuple(ranks), full=_FULL_SHARE * kept)

    def stored_as(self, weight_format: str, group: int) -> "Layer":
        """The layer with its weight in a format.

        Args:
            weight_format: name of the format.
            group: input channels that share a scale, where the format has a choice; 0:
                all of them.

        Raises:
            SettingError: the format has no such groups of this layer's channels.
        """
        if weight_format == FP8_BLOCK.name:
            group = BLOCK
        elif weight_format == INT4.name:
            group = group or self.k
        elif weight_format != INT8_PLANES.name:
            group = 0
        grouped = weight_format in (INT4.name, INT8_PLANES.name)
        if grouped and (not group or self.k % group):
            raise SettingError(
                f"--group {group} does not divide the {self.k} input channels of"
                f" {self.name}; {weight_format} takes 32, 64 and 128 where they do"
            )
        return replace(self, format=weight_format, group=group)


# Of the kept channels, those that are read with all planes: about what 2.4 bits a
# weight give (docs/notes/planes.md).
_FULL_SHARE = 0.1

# vLLM pads the vocabulary to a multiple of this.
_VOCABULARY_MULTIPLE = 64

_LLAMA_3_8B = (
    Layer("qkv", (4096, 1024, 1024), 4096),
    Layer("o", (4096,), 4096),
    Layer("gate_up", (14336, 14336), 4096),
    Layer("down", (4096,), 14336),
)
_LLAMA_3_2_1B = (
    Layer("qkv", (2048, 512, 512), 2048),
    Layer("o", (2048,), 2048),
    Layer("gate_up", (8192, 8192), 2048),
    Layer("down", (2048,), 8192),
)
# Mistral-7B has the shapes of Llama-3-8B.
SHAPES: dict[str, tuple[Layer, ...]] = {
    "llama-3.2-1b": _LLAMA_3_2_1B,
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3-70b-tp4": (
        Layer("qkv", (2048, 256, 256), 8192),
        Layer("o", (8192,), 2048),
        Layer("gate_up", (7168, 7168), 8192),
        Layer("down", (8192,), 7168),
    ),
    "qwen3-8b": (
        Layer("qkv", (4096, 1024, 1024), 4096),
        Layer("o", (4096,), 4096),
        Layer("gate_up", (12288, 12288), 4096),
        Layer("down", (4096,), 12288),
    ),
    "qwen3-32b": (
        Layer("qkv", (8192, 1024, 1024), 5120),
        Layer("o", (5120,), 8192),
        Layer("gate_up", (25600, 25600), 5120),
        Layer("down", (5120,), 25600),
    ),
}


def layers_of(info: ArtifactInfo, tensor_parallel: int) -> list[Layer]:
    """The distinct layers of a prepared model that are sparse, one per shape.

    Kept fractions and ranks of a shape are the means over its layers, so that the sum
    of ``count`` times each layer's time represents the model.

    Raises:
        SettingError: a shape does not divide by the tensor-parallel size.
    """
    alike: dict[tuple[str, tuple[int, ...], int], list[list[LinearEntry]]] = {}
    for names in by_engine_layer(info.linears):
        kinds = [kind_of(LinearName.parse(name)) for name in names]
        entries = [info.linears[name] for name in names]
        row_parallel = kinds[0].row_parallel
        rows = 1 if row_parallel else tensor_parallel
        columns = tensor_parallel if row_parallel else 1
        for kind, entry in zip(kinds, entries, strict=True):
            if entry.shape[0] % rows or entry.shape[1] % columns:
                raise SettingError(
                    f"--tensor-parallel-size {tensor_parallel} does not divide"
                    f" {kind.label}, which is {list(entry.shape)}"
                )
        sizes = tuple(entry.shape[0] // rows for entry in entries)
        name = label_of(kinds[0].engine_layer).removesuffix("_proj")
        shape = (name, sizes, entries[0].shape[1] // columns)
        alike.setdefault(shape, []).append(entries)
    layers = [_mean_layer(*shape, groups) for shape, groups in alike.items()]
    in_planes = info.served_format == INT8_PLANES.name
    stored = [
        one.stored_as(
            info.served_format, (group_of(one.k) or 0) if in_planes else info.base.group
        )
        for one in layers
    ]
    return stored + _head(info, tensor_parallel)


def _head(info: ArtifactInfo, tensor_parallel: int) -> list[Layer]:
    """The output layer, where it is sparse; a rank's rows as vLLM pads them."""
    entry = info.sparse_head
    if entry is None:
        return []
    n, k = entry.shape
    padded = -(-n // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    rows = -(-padded // tensor_parallel)
    name = FLOAT.name if info.head == AS_STORED else info.head
    return [Layer(HEAD, (rows,), k, entry.kept_fraction, format=name)]


def _mean_layer(
    name: str, sizes: tuple[int, ...], k: int, groups: list[list[LinearEntry]]
) -> Layer:
    elements = sum(e.dense_elements for group in groups for e in group)
    kept = sum(e.kept_fraction * e.dense_elements for g in groups for e in g) / elements
    ranks = [
        round(sum(group[shard].rank for group in groups) / len(groups))
        for shard in range(len(sizes))
    ]
    full = [entry.full_fraction or 0.0 for group in groups for entry in group]
    return Layer(
        name,
        sizes,
        k,
        kept,
        tuple(ranks),
        len(groups),
        full=sum(full) / len(full),
    )
