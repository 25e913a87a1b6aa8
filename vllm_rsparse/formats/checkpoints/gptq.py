# SPDX-License-Identifier: Apache-2.0
"""GPTQ, symmetric and without act-order: layout and ``quantization_config``.

``qweight`` int32 [K/8, N] packs eight input channels to a word, low nibble first;
``scales`` are [K/G, N]. The zero point is 8; ``qzeros`` contains nothing else and is
not read, as in vLLM.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormatError
from vllm_rsparse.formats.checkpoints.groups import group_count
from vllm_rsparse.formats.checkpoints.layout import (
    GroupLayout,
    Layout,
    matrix,
    require_shape,
    shapes_of,
)
from vllm_rsparse.formats.checkpoints.scheme import (
    Keys,
    Scheme,
    layout_group,
    read_keys,
    refuse,
)
from vllm_rsparse.formats.int4 import INT4, store_int4
from vllm_rsparse.formats.nibbles import PER_WORD, unpack_nibbles


@dataclass(frozen=True)
class Gptq(GroupLayout):
    """Symmetric, input channels in their own order."""

    format = INT4
    required = ("qweight", "scales")
    checked = ("g_idx",)
    unread = ("qzeros",)
    dtypes: ClassVar = {"qweight": torch.int32}
    scales = "scales"

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        words, n = matrix(shapes, "qweight")
        k = words * PER_WORD
        count = group_count("qweight", k, self.group)
        require_shape(shapes, "scales", (count, n))
        return n, k

    def _stored(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None
    ) -> StoredWeight:
        if "g_idx" in tensors:
            _, k = self.shape(shapes_of(tensors))
            self._require_order(tensors["g_idx"], k)
        codes = unpack_nibbles(tensors["qweight"].t()).t()
        return store_int4(codes, tensors["scales"], None)

    def _require_order(self, groups: Tensor, k: int) -> None:
        channels = torch.arange(k, device=groups.device)
        expected = channels // (self.group or k)
        if groups.shape != expected.shape or not torch.equal(groups.long(), expected):
            raise WeightFormatError(
                "g_idx orders the input channels by activation (act-order), which is"
                " not supported; use a checkpoint with desc_act = false"
            )


class _Keys(Keys):
    bits: int
    group_size: int
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: str = "gptq"
    dynamic: dict[str, dict[str, Any]] | None = None
    modules_in_block_to_quantize: list[str] | list[list[str]] | None = None


class GptqScheme(Scheme):
    """Parsed ``quantization_config`` of a GPTQ checkpoint.

    Args:
        config: the dictionary.
        where: its file, for errors.

    Raises:
        CheckpointError: a variant that is not supported; says what to do.
    """

    method = "gptq"

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        keys = read_keys(_Keys, config, where)
        self._default = _layout(keys, where)
        self._rules: list[tuple[re.Pattern[str], Layout | None]] = []
        for pattern, changes in (keys.dynamic or {}).items():
            kind, text = _rule(pattern)
            layout = None
            if kind == "+":
                layout = _layout(read_keys(_Keys, {**config, **changes}, where), where)
            self._rules.append((_compiled(text, where), layout))
        self._parts: list[str] = []
        for entry in keys.modules_in_block_to_quantize or []:
            self._parts += [entry] if isinstance(entry, str) else entry
        # Without a list, vLLM decides by the tensors in the files.
        self.tensors_decide = not self._parts

    def layout(self, name: str) -> Layout | None:
        """See the base class. ``dynamic``: the first pattern that matches counts."""
        for pattern, layout in self._rules:
            if pattern.match(name):
                return layout
        if self._parts and not any(part in name for part in self._parts):
            return None
        return self._default


def _layout(keys: _Keys, where: str) -> Layout:
    if keys.bits != 4:
        refuse(where, f"GPTQ with {keys.bits} bits", "use a checkpoint with 4 bits")
    if not keys.sym:
        refuse(
            where,
            "asymmetric GPTQ (sym = false)",
            "use a symmetric checkpoint, or an asymmetric one in AWQ or"
            " compressed-tensors W4A16",
        )
    group = layout_group(where, keys.group_size)
    if keys.desc_act and group is not None:
        refuse(
            where,
            "GPTQ with act-order (desc_act = true)",
            "use a checkpoint with desc_act = false",
        )
    if keys.checkpoint_format not in ("gptq", "gptq_v2"):
        refuse(
            where,
            f"the GPTQ checkpoint_format {keys.checkpoint_format!r}",
            "use a checkpoint in the format gptq or gptq_v2",
        )
    return Gptq(group)


def _rule(pattern: str) -> tuple[str, str]:
    """Kind of a rule, "+" (override) or "-" (leave out), and its regular expression."""
    if pattern[:2] in ("+:", "-:"):
        return pattern[0], pattern[2:]
    return "+", pattern


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        refuse(where, f"the pattern {pattern!r} in `dynamic` ({error})", "correct it")
