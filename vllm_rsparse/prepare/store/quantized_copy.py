# SPDX-License-Identifier: Apache-2.0
"""The base's weight files, with the linears as they are served.

What ``--copy-weights`` writes where weights are quantized: the files of the base, by
their names, in which the tensors of every linear that takes part are replaced.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_rsparse.formats.checkpoints.on_disk import OnDisk, on_disk_layout
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.model.checkpoint import FLOAT_DTYPES, Checkpoint
from vllm_rsparse.model.checkpoint_files import INDEX_NAME
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.store.files import write_text
from vllm_rsparse.prepare.store.writer import (
    SafetensorsWriter,
    TensorSpec,
    torch_dtype,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _File:
    """One file to be: its tensors, and which of them come from which linear."""

    specs: dict[str, TensorSpec]
    plain: tuple[str, ...]
    linears: tuple[str, ...]


class QuantizedCopy:
    """A copy of a checkpoint, planned from headers alone.

    Args:
        checkpoint: the base model.
        linears: those that take part.
        load_time: the format of their weights.
        device: where they are quantized: that of the calibration, for the scale that a
            group gets can depend on the order of a sum.

    Attributes:
        nbytes: of all tensors to write.

    Raises:
        WeightFormatError: a linear cannot be stored in the format.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        linears: Iterable[Linear],
        load_time: LoadTimeFormat,
        device: torch.device,
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._load_time = load_time
        self._layout: OnDisk = on_disk_layout(load_time.name)
        model = LanguageModel(checkpoint)
        # Fused linears stay one tensor: the engine's and transformers' loaders both
        # expect them as the base has them.
        stored = (model.stored_linear(one.layer, one.kind)[0] for one in linears)
        self._modules = dict.fromkeys(stored)
        self._files = {file.name: self._plan(file) for file in checkpoint.weight_files}
        self.nbytes = sum(
            spec.nbytes for file in self._files.values() for spec in file.specs.values()
        )

    def write(self, directory: Path) -> None:
        """Write every file, and the index if the base has one.

        Raises:
            CheckpointError: the base cannot be read any more.
            PrepareError: the disk is full or a file cannot be written.
        """
        with tqdm(
            total=len(self._modules),
            desc=f"writing {self._load_time.name}",
            unit="linear",
        ) as progress:
            for name, file in self._files.items():
                with SafetensorsWriter(directory / name, file.specs) as writer:
                    for plain in file.plain:
                        read = self._checkpoint.read_stored([plain])
                        writer.write(plain, read[plain])
                    for module in file.linears:
                        for suffix, tensor in self._encoded(module).items():
                            writer.write(f"{module}.{suffix}", tensor)
                        progress.update()
        if (self._checkpoint.directory / INDEX_NAME).exists():
            index = {
                "metadata": {"total_size": self.nbytes},
                "weight_map": {
                    tensor: name
                    for name, file in self._files.items()
                    for tensor in file.specs
                },
            }
            write_text(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")

    def _encoded(self, module: str) -> dict[str, Tensor]:
        name = f"{module}.weight"
        if self._checkpoint.linear_layout(module) is None:
            weight = self._checkpoint.read_stored([name])[name]
            encoded = self._load_time.encode(weight.to(self._device))
        else:
            dtype = FLOAT_DTYPES[self._checkpoint.linear_dtype(module)]
            stored = self._checkpoint.read_linear(module).to(self._device)
            encoded = self._load_time.requantise(stored, dtype)
        return self._layout.tensors(encoded.to(torch.device("cpu")))

    def _plan(self, file: Path) -> _File:
        specs: dict[str, TensorSpec] = {}
        plain, linears = [], []
        for tensor, info in self._checkpoint.tensors.items():
            if info.file != file:
                continue
            module = self._replaced(tensor)
            if module is None:
                plain.append(tensor)
                specs[tensor] = TensorSpec(info.shape, torch_dtype(info.dtype))
            elif tensor == f"{module}.{self._first(module)}":
                linears.append(module)
                shape = self._checkpoint.linear_shape(module)
                assert shape is not None  # it takes part
                for suffix, spec in self._layout.specs(*shape).items():
                    specs[f"{module}.{suffix}"] = TensorSpec(*spec)
        return _File(specs, tuple(plain), tuple(linears))

    def _replaced(self, tensor: str) -> str | None:
        """The linear whose weight a tensor is part of; None for all others."""
        module, _, suffix = tensor.rpartition(".")
        if module not in self._modules:
            return None
        layout = self._checkpoint.linear_layout(module)
        suffixes = ("weight",) if layout is None else layout.suffixes
        return module if suffix in suffixes else None

    def _first(self, module: str) -> str:
        """The tensor of a linear in whose file the new ones are written."""
        layout = self._checkpoint.linear_layout(module)
        return "weight" if layout is None else layout.required[0]
