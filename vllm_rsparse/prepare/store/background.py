# SPDX-License-Identifier: Apache-2.0
"""Writes files while the run goes on: 3 s of 44 for 1.5B on an H200."""

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from vllm_rsparse.prepare.store.files import writing_output
from vllm_rsparse.prepare.store.writer import SafetensorsWriter, TensorSpec

# Files that may wait to be written; each holds a copy of its tensors.
AHEAD = 2


class BackgroundFiles:
    """Safetensors files that one thread writes, in the order in which they are put.

    Each is complete, and on disk, or absent.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: dict[Path, Future[None]] = {}

    def put(self, path: Path, tensors: Mapping[str, Tensor], note: str) -> None:
        """Write a file soon, in place of an earlier one; tensors may change meanwhile.

        Args:
            path: of the file.
            tensors: from any device.
            note: metadata of the file.

        Raises:
            PrepareError: an earlier file cannot be written.
        """
        self.wait(path)
        while len(self._pending) >= AHEAD:
            self.wait(next(iter(self._pending)))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "prepare-files")
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._pending[path] = self._pool.submit(_write, path, copies, note)

    def wait(self, path: Path | None = None) -> None:
        """Return when a file, or every file, that was put is on disk.

        Raises:
            PrepareError: it cannot be written.
        """
        for one in [path] if path is not None else list(self._pending):
            pending = self._pending.pop(one, None)
            if pending is not None:
                pending.result()

    def close(self) -> None:
        """Write what was put, and end the thread; a failure is no error any more."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._pending.clear()


def _write(path: Path, tensors: Mapping[str, Tensor], note: str) -> None:
    partial = path.with_suffix(".partial")
    specs = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in tensors.items()
    }
    with writing_output(partial):
        partial.unlink(missing_ok=True)
    with SafetensorsWriter(partial, specs, {"note": note}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    with writing_output(path):
        os.replace(partial, path)
