# SPDX-License-Identifier: Apache-2.0
"""Quantized linears of a checkpoint: where they are, and their dequantised weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse.errors import CheckpointError, DamagedCheckpointError
from vllm_rsparse.formats.base import WeightFormatError
from vllm_rsparse.formats.checkpoints.layout import Layout
from vllm_rsparse.formats.checkpoints.parse import parse_scheme
from vllm_rsparse.formats.checkpoints.scheme import Scheme, refuse

OUR_METHOD = "rsparse"
OLD_KEY = "compression_config"
_PLAIN = "weight"


def base_quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the weights themselves are quantized, by the checkpoint's own description.

    Args:
        config: content of config.json, of a base model or of a prepared directory,
            whose ``quantization_config`` has the base's own under ``base``.

    Returns:
        The dictionary as the base checkpoint has it; None for a plain one.
    """
    found = config.get("quantization_config") or config.get(OLD_KEY)
    if isinstance(found, dict) and found.get("quant_method") == OUR_METHOD:
        found = found.get("base")
    return found or None


class QuantizedLinears:
    """The quantized linears of one checkpoint.

    Args:
        directory: of the checkpoint, for errors.
        config: its config.json.
        shapes: shape of every tensor by name.

    Raises:
        CheckpointError: it is quantized in a way that is not supported.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self._directory = directory
        self._shapes = shapes
        self._scheme: Scheme | None = None
        where = str(directory / "config.json")
        quantization = base_quantization(config)
        if quantization is not None:
            if not isinstance(quantization, dict):
                raise CheckpointError(
                    f"{where}: quantization_config must be an object, got"
                    f" {type(quantization).__name__}; download the checkpoint again"
                )
            self._scheme = parse_scheme(quantization, where)
        elif (directory / "hf_quant_config.json").exists():
            refuse(
                str(directory / "hf_quant_config.json"),
                "a checkpoint quantized with ModelOpt",
                "prepare the unquantized model it came from",
            )

    @property
    def any(self) -> bool:
        """Whether config.json describes a quantization."""
        return self._scheme is not None

    def layout(self, name: str) -> Layout | None:
        """Layout of a module's weight; None if it is a plain one, or if there is none.

        Args:
            name: of any module: a ``quantization_config`` does not tell linears from
                norms and embeddings, the tensors do.

        Raises:
            CheckpointError: it is quantized and lacks a tensor.
        """
        layout = None if self._scheme is None else self._scheme.layout(name)
        if layout is None:
            return None
        missing = [s for s in layout.required if f"{name}.{s}" not in self._shapes]
        if missing and not {*layout.required} - {*missing, _PLAIN}:
            return None
        if missing:
            raise self._missing(name, missing)
        return layout

    def require_layout(self, name: str) -> Layout | None:
        """The same for a linear, which must be quantized if config.json makes it so.

        Raises:
            CheckpointError: it is a plain one instead, or lacks a tensor.
        """
        layout = self.layout(name)
        if layout is None and self._scheme is not None:
            wanted = self._scheme.layout(name)
            plain = f"{name}.{_PLAIN}" in self._shapes
            if wanted is not None and plain and not self._scheme.tensors_decide:
                raise self._missing(name, {*wanted.required} - {_PLAIN})
        return layout

    def shape(self, name: str, layout: Layout) -> tuple[int, int]:
        """(N, K) of a quantized linear.

        Raises:
            CheckpointError: the shapes of its tensors do not agree.
        """
        shapes = {s: self._shapes[f"{name}.{s}"] for s in layout.required}
        try:
            return layout.shape(shapes)
        except WeightFormatError as error:
            raise self._error(name, error) from error

    def read(
        self,
        name: str,
        layout: Layout,
        dtype: torch.dtype,
        read: Callable[[Iterable[str]], dict[str, Tensor]],
    ) -> Tensor:
        """The dequantised weight of a quantized linear.

        Args:
            name: of the linear.
            layout: of the linear.
            dtype: of the result; the arithmetic is float32.
            read: returns tensors of the checkpoint by name.

        Returns:
            [N, K], contiguous.

        Raises:
            CheckpointError: its tensors do not fit the layout.
        """
        suffixes = list(layout.required)
        suffixes += [s for s in layout.checked if f"{name}.{s}" in self._shapes]
        tensors = read(f"{name}.{suffix}" for suffix in suffixes)
        parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes}
        try:
            weight = layout.store(parts).dequantise()
        except WeightFormatError as error:
            raise self._error(name, error) from error
        return weight.to(dtype).contiguous()

    def _missing(self, name: str, suffixes: Iterable[str]) -> CheckpointError:
        return CheckpointError(
            f"{self._directory}: quantization_config in config.json makes {name} a"
            f" quantized linear, but it has no tensor {min(suffixes)}; config and"
            " weights belong to different models"
        )

    def _error(self, name: str, error: WeightFormatError) -> CheckpointError:
        return DamagedCheckpointError(f"{self._directory}: {name}: {error}")
