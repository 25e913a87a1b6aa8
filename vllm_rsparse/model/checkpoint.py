# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint on disk: its config and its tensors.

Nothing is kept in memory: a tensor is read from its safetensors file on request, and
the file is closed again, which also releases mapped pages.

The weights of a quantized checkpoint are dequantised when they are read, one linear at
a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.checkpoints.layout import Layout, format_of_layout
from vllm_rsparse.model.checkpoint_files import HUB_PATTERNS, find_weight_files
from vllm_rsparse.model.links import refuse_broken_links
from vllm_rsparse.model.quantized import QuantizedLinears
from vllm_rsparse.validation import read_json

# safetensors' name of a dtype -> torch's, for those that a plain weight may have.
FLOAT_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
# Quantized checkpoints leave the embedding in the dtype that the model computes in.
_EMBEDDING = "embed_tokens.weight"
_GIVE_MODEL = "; pass the directory of a model, with its config.json"


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor: its file, shape and safetensors dtype ("BF16")."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """An opened checkpoint directory; only headers are read.

    Attributes:
        directory: the resolved directory.
        config: the content of ``config.json``.
        weight_files: the safetensors files that the index lists, as named there.
        tensors: header entry of every tensor by name.

    Raises:
        CheckpointError: something is missing, damaged or in another format.
    """

    def __init__(self, directory: Path) -> None:
        refuse_broken_links(directory, "download the model again", HUB_PATTERNS)
        self.directory = directory.resolve()
        self.config = read_json(
            self.directory / "config.json", CheckpointError, _GIVE_MODEL
        )
        self.weight_files = find_weight_files(self.directory)
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.weight_files:
            self._read_header(file)
        shapes = {name: info.shape for name, info in self.tensors.items()}
        self._quantized = QuantizedLinears(self.directory, self.config, shapes)

    def linear_shape(self, name: str) -> tuple[int, int] | None:
        """(N, K) of a linear, quantized or not; None where there is no such linear.

        Raises:
            CheckpointError: config.json makes it quantized and its tensors do not fit
                that, or each other.
        """
        layout = self._quantized.require_layout(name)
        if layout is not None:
            return self._quantized.shape(name, layout)
        info = self.tensors.get(f"{name}.weight")
        if info is None or len(info.shape) != 2:
            return None
        return info.shape[0], info.shape[1]

    def linear_dtype(self, name: str) -> str:
        """safetensors' name of the dtype in which ``read`` gives a linear's weight.

        This is the checkpoint's own dtype, or the embedding's if the linear is
        quantized.
        """
        if self._quantized.layout(name) is not None:
            for tensor, info in self.tensors.items():
                if tensor.endswith(_EMBEDDING) and info.dtype in FLOAT_DTYPES:
                    return info.dtype
            return "F32"
        return self.tensors[f"{name}.weight"].dtype

    def linear_format(self, name: str) -> tuple[str, int]:
        """Format and group of a linear's weight, as ``format_of_layout`` gives them."""
        return format_of_layout(self._quantized.layout(name))

    def linear_zeros(self, name: str) -> bool:
        """Whether a linear's weight has zero points."""
        layout = self._quantized.layout(name)
        return layout is not None and layout.zeros

    @property
    def quantized(self) -> bool:
        """Whether some linears are quantized."""
        return self._quantized.any

    @property
    def prepared_weights(self) -> bool:
        """Whether ``prepare`` wrote the linears in the format that is served."""
        return self._quantized.on_disk is not None

    def linear_layout(self, name: str) -> Layout | None:
        """How a linear's weight is stored; None for a plain one."""
        return self._quantized.layout(name)

    def read_linear(self, name: str, rows: slice | None = None) -> StoredWeight:
        """A quantized linear's weight as it is stored, on the CPU.

        Args:
            name: of the linear.
            rows: some output channels, of a linear that ``prepare`` wrote; None: all.

        Raises:
            CheckpointError: it is a plain one, or its tensors do not fit together.
        """
        layout = self._quantized.layout(name)
        if layout is None:
            raise CheckpointError(
                f"{self.directory}: {name} is not quantized, but config.json makes it"
                " a quantized linear; config and weights belong to different models"
            )
        return self._quantized.stored(name, layout, self.read_stored, rows)

    def plain_names(self) -> list[str]:
        """Names of all tensors that a plain checkpoint of the same model would have."""
        names: dict[str, None] = {}
        for name in self.tensors:
            module, _, suffix = name.rpartition(".")
            layout = self._quantized.layout(module)
            part = layout is not None and suffix in layout.suffixes
            names[f"{module}.weight" if part else name] = None
        return list(names)

    def has(self, name: str) -> bool:
        """Whether ``read`` knows a name."""
        return name in self.tensors or self._quantized_linear(name) is not None

    def read(
        self, names: Iterable[str], dequantised: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Read tensors as a plain checkpoint would have them, on the CPU.

        Args:
            names: the weight of a quantized linear goes by the plain name,
                "...q_proj.weight".
            dequantised: dtype of the weights of quantized linears; None for that of the
                embedding. Everything else has the checkpoint's own dtype.

        Raises:
            CheckpointError: a name is unknown, its file cannot be read any more, or the
                tensors of a quantized linear do not fit together.
        """
        result, plain = {}, []
        for name in names:
            linear = self._quantized_linear(name)
            layout = None if linear is None else self._quantized.layout(linear)
            if linear is None or layout is None:
                plain.append(name)
                continue
            dtype = dequantised or FLOAT_DTYPES[self.linear_dtype(linear)]
            weight = self._quantized.stored(linear, layout, self.read_stored)
            result[name] = weight.dequantise().to(dtype).contiguous()
        return result | self.read_stored(plain)

    def _quantized_linear(self, name: str) -> str | None:
        """Name of the quantized linear whose weight is requested, or None."""
        linear, _, suffix = name.rpartition(".")
        if suffix != "weight" or self._quantized.layout(linear) is None:
            return None
        return linear

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors as this checkpoint stores them, on the CPU.

        Raises:
            CheckpointError: a name is unknown or its file cannot be read any more.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise CheckpointError(
                    f"{self.directory}: the checkpoint has no tensor {name!r}, which"
                    " its config says it should; download it again"
                )
            by_file.setdefault(self.tensors[name].file, []).append(name)
        result: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in wanted:
                        result[name] = tensors.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read ({error})") from error
        return result

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    view = tensors.get_slice(name)
                    self.tensors[name] = TensorInfo(
                        file, tuple(view.get_shape()), view.get_dtype()
                    )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file}: cannot be read as safetensors ({error}); download it again"
            ) from error
