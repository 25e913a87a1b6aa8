# SPDX-License-Identifier: Apache-2.0
"""Write a safetensors file tensor by tensor, without holding it in memory.

The safetensors library writes from a dict of all tensors; an artifact of a 70B model
has 3.4 GB of them. Here the header is written first, from shapes declared up front, the
whole file is allocated at once (so that a full disk is noticed before hours of
calibration), and every tensor is written to its place when it is ready.
"""

import errno
import json
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.prepare.store.files import writing_output

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that safetensors calls ``name``.

    Raises:
        PrepareError: PyTorch has none, or none that this module writes.
    """
    for dtype, known in _DTYPES.items():
        if known == name:
            return dtype
    raise PrepareError(
        f"the checkpoint has a tensor of dtype {name}, which --copy-weights with"
        " --weights cannot write; leave out --copy-weights"
    )


@dataclass(frozen=True)
class TensorSpec:
    """Declared shape and dtype of a future tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """A safetensors file whose tensors are written in any order, each once.

    Leaving the context normally requires that all were written and flushes the file to
    disk; after an exception the file is incomplete and the caller removes it.

    Args:
        path: file to create; it must not exist.
        specs: shape and dtype of every tensor by name.
        metadata: of the file.
        sync: whether leaving the context waits until the file is on disk.

    Raises:
        PrepareError: the file exists, or the disk has no room for all of it.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str] | None = None,
        sync: bool = True,
    ) -> None:
        self.path = path
        self._sync = sync
        self._specs = dict(specs)
        # Wide dtypes first, as the library does: every tensor is then aligned to its
        # element size, without the holes that the format forbids.
        order = sorted(self._specs, key=lambda name: -self._specs[name].dtype.itemsize)
        header: dict[str, object] = {
            "__metadata__": {"format": "pt", **(metadata or {})}
        }
        offset = 0
        offsets = {}
        for name in order:
            spec = self._specs[name]
            offsets[name] = offset
            header[name] = {
                "dtype": _DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        start = 8 + len(encoded)
        self._offsets = {name: start + offset for name, offset in offsets.items()}
        self._missing = dict.fromkeys(order)
        with writing_output(path):
            self._file = path.open("xb")
            try:
                _allocate(path, self._file.fileno(), start + offset)
                self._file.write(len(encoded).to_bytes(8, "little") + encoded)
            except BaseException:
                self._file.close()
                raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from any device.

        Raises:
            ValueError: not declared, written before, or of another shape or dtype.
            PrepareError: the disk is full.
        """
        if name not in self._missing:
            state = "already written" if name in self._specs else "not declared"
            raise ValueError(f"{self.path}: tensor {name!r} was {state}")
        spec = self._specs[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(
                f"{self.path}: {name} is {tensor.dtype} {tuple(tensor.shape)},"
                f" declared {spec.dtype} {spec.shape}"
            )
        # The dtype is reinterpreted as bytes, because NumPy has no bfloat16.
        raw = tensor.contiguous().cpu().flatten().view(torch.uint8).numpy()
        with writing_output(self.path):
            self._file.seek(self._offsets[name])
            self._file.write(raw.data)
        del self._missing[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with writing_output(self.path), closing(self._file):
            if error is None:
                if self._missing:
                    raise ValueError(
                        f"{self.path}: never written: {', '.join(self._missing)}"
                    )
                self._file.flush()
                if self._sync:
                    os.fsync(self._file.fileno())


def _allocate(path: Path, descriptor: int, size: int) -> None:
    """Reserve the disk blocks, where the platform can; a full disk is an OSError."""
    if not hasattr(os, "posix_fallocate"):  # macOS: a full disk shows on writing
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # not on this filesystem
            return
        raise OSError(
            error.errno,
            f"{error.strerror} (the file needs {size} bytes)",
            str(path),
        ) from error
