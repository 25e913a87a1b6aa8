# SPDX-License-Identifier: Apache-2.0
"""The method ``fp8``: blocks of 128 x 128 (Qwen, DeepSeek) or one scale per tensor."""

from collections.abc import Mapping
from typing import Any

from vllm_rsparse.formats.checkpoints.fp8 import Fp8BlockInverse, Fp8Tensor
from vllm_rsparse.formats.checkpoints.layout import Layout
from vllm_rsparse.formats.checkpoints.scheme import Keys, Scheme, read_keys, refuse
from vllm_rsparse.formats.fp8_block import BLOCK


class _Keys(Keys):
    weight_block_size: list[int] | None = None
    fmt: str = "e4m3"
    ignored_layers: list[str] | None = None
    modules_to_not_convert: list[str] | None = None


class NativeFp8Scheme(Scheme):
    """Parsed ``quantization_config`` with ``quant_method`` "fp8".

    Args:
        config: the dictionary.
        where: its file, for errors.

    Raises:
        CheckpointError: a variant that is not supported; says what to do.
    """

    method = "fp8"

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        keys = read_keys(_Keys, config, where)
        if keys.fmt not in ("e4m3", "float8_e4m3fn"):
            refuse(where, f"FP8 in the format {keys.fmt!r}", "use one in e4m3")
        if keys.weight_block_size is None:
            self._layout: Layout = Fp8Tensor()
        elif keys.weight_block_size == [BLOCK, BLOCK]:
            self._layout = Fp8BlockInverse()
        else:
            refuse(
                where,
                f"FP8 in blocks of {keys.weight_block_size}",
                f"use a checkpoint with blocks of [{BLOCK}, {BLOCK}]",
            )
        self._plain = frozenset(
            keys.ignored_layers or keys.modules_to_not_convert or ()
        )

    def layout(self, name: str) -> Layout | None:
        """See the base class. The list holds whole names, as in vLLM."""
        return None if name in self._plain else self._layout
