# SPDX-License-Identifier: Apache-2.0
"""Quantized linears of a checkpoint: where they are, and their dequantised weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_rsparse.errors import CheckpointError, DamagedCheckpointError
from vllm_rsparse.formats.base import StoredWeight, WeightFormatError
from vllm_rsparse.formats.checkpoints.layout import Layout
from vllm_rsparse.formats.checkpoints.on_disk import OnDisk, on_disk_layout
from vllm_rsparse.formats.checkpoints.parse import parse_scheme
from vllm_rsparse.formats.checkpoints.scheme import Scheme, refuse
from vllm_rsparse.formats.names import LOAD_TIME_FORMATS

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


def weights_on_disk(config: Mapping[str, Any]) -> str | None:
    """Format in which a prepared directory holds the artifact's linears.

    Args:
        config: content of config.json.

    Returns:
        The name of a load-time format; None where the linears are the base's own.
    """
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != OUR_METHOD:
        return None
    name = found.get("weights_on_disk")
    return name if name in LOAD_TIME_FORMATS else None


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
        name = weights_on_disk(config)
        self._on_disk: OnDisk | None = None if name is None else on_disk_layout(name)
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
        return self._scheme is not None or self._on_disk is not None

    @property
    def on_disk(self) -> OnDisk | None:
        """How ``prepare`` wrote the linears; None where they are the base's own."""
        return self._on_disk

    def layout(self, name: str) -> Layout | None:
        """Layout of a module's weight; None if it is a plain one, or if there is none.

        Args:
            name: of any module: a ``quantization_config`` does not tell linears from
                norms and embeddings, the tensors do.

        Raises:
            CheckpointError: it is quantized and lacks a tensor.
        """
        mine = self._on_disk
        if mine and all(f"{name}.{s}" in self._shapes for s in mine.required):
            return mine
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

    def stored(
        self,
        name: str,
        layout: Layout,
        read: Callable[[Iterable[str]], dict[str, Tensor]],
        rows: slice | None = None,
    ) -> StoredWeight:
        """The weight of a quantized linear, as the kernels read it.

        Args:
            name: of the linear.
            layout: of the linear.
            read: returns tensors of the checkpoint by name.
            rows: some output channels, of a linear that ``prepare`` wrote; None: all.

        Raises:
            CheckpointError: its tensors do not fit the layout.
        """
        suffixes = list(layout.required)
        suffixes += [s for s in layout.checked if f"{name}.{s}" in self._shapes]
        tensors = read(f"{name}.{suffix}" for suffix in suffixes)
        parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes}
        if rows is not None and isinstance(layout, OnDisk):
            parts = layout.rows(parts, rows)
        try:
            return layout.store(parts)
        except WeightFormatError as error:
            raise self._error(name, error) from error

    def _missing(self, name: str, suffixes: Iterable[str]) -> CheckpointError:
        return CheckpointError(
            f"{self._directory}: quantization_config in config.json makes {name} a"
            f" quantized linear, but it has no tensor {min(suffixes)}; config and"
            " weights belong to different models"
        )

    def _error(self, name: str, error: WeightFormatError) -> CheckpointError:
        return DamagedCheckpointError(f"{self._directory}: {name}: {error}")
