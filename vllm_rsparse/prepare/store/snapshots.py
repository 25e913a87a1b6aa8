# SPDX-License-Identifier: Apache-2.0
"""Tensors that a long run needs again: by its own later stages, and to go on after an
interruption.

One safetensors file a key in a directory beside OUTPUT, whole or absent. What a stage
finds in a layer is kept when the layer is done; the states that it carries from layer
to layer (hidden states, gradients), which it needs to go on, only every
``STATE_SECONDS``, for they are large: 0.5 GB for 16 windows of 4096 tokens and 4096
channels in bf16.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_rsparse.errors import PrepareError

logger = logging.getLogger(__name__)

IDENTITY = "search.json"
STATE_SECONDS = 20.0


class Snapshots:
    """Tensors by key; the directory goes when the run has ended well.

    Args:
        directory: where they lie; made when the first are kept.
        identity: JSON of everything that they depend on. A directory of another
            identity is emptied.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory = directory
        self._identity = json.dumps(identity, sort_keys=True)
        self._opened = False
        self._last_state = time.monotonic()

    def __contains__(self, key: str) -> bool:
        return self._open() and self._path(key).exists()

    def put(self, key: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Keep tensors, and JSON beside them, in place of the key's earlier ones.

        They are on disk when this returns.

        Raises:
            PrepareError: they cannot be written.
        """
        self._open(make=True)
        path = self._path(key)
        partial = path.with_suffix(".partial")
        stored = {name: one.cpu().contiguous() for name, one in tensors.items()}
        try:
            save_file(stored, partial, {"note": json.dumps(note)})
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise PrepareError(
                f"{path}: cannot be written ({error}); make room there, or choose an"
                " OUTPUT on a larger disk"
            ) from error

    def get(self, key: str) -> tuple[dict[str, Tensor], Any]:
        """Tensors on the CPU, which may be changed in place, and the note.

        Raises:
            PrepareError: the key was never put, or the file is damaged.
        """
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                note = json.loads(file.metadata()["note"])
                names = list(file.keys())
                return {name: file.get_tensor(name).clone() for name in names}, note
        except (OSError, SafetensorError) as error:
            raise PrepareError(
                f"{path}: cannot be read ({error}); remove {self.directory} and start"
                " again"
            ) from error

    def state_due(self) -> bool:
        """Whether the last True is ``STATE_SECONDS`` ago."""
        now = time.monotonic()
        if now - self._last_state < STATE_SECONDS:
            return False
        self._last_state = now
        return True

    def require(self, size: int) -> None:
        """Check that so many bytes fit beside what is kept already.

        Raises:
            PrepareError: they do not.
        """
        self._open(make=True)
        kept = sum(file.stat().st_size for file in self.directory.iterdir())
        free = shutil.disk_usage(self.directory).free
        if size > kept + free:
            raise PrepareError(
                f"{self.directory}: what enters each layer takes {size} bytes there,"
                f" and {kept + free} are free; make room, choose an OUTPUT on a larger"
                " disk, or lower --calibration-samples or --calibration-tokens"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._opened:
            return
        if error is None:
            self._clear()
            self.directory.rmdir()
        else:
            logger.info(
                "what was found so far is in %s: the same command goes on from there;"
                " remove it if you do not want to",
                self.directory,
            )

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"

    def _open(self, make: bool = False) -> bool:
        """Whether there is a directory of this identity now."""
        if self._opened:
            return True
        identity = self.directory / IDENTITY
        if self.directory.exists():
            files = list(self.directory.iterdir())
            if files and identity not in files:
                raise PrepareError(
                    f"{self.directory}: prepare keeps what it has found so far there,"
                    " but this directory is not of its making; remove it or choose"
                    " another OUTPUT"
                )
            if files and identity.read_text(encoding="utf-8") != self._identity:
                logger.warning(
                    "%s is from a run with another model, text or options, or from"
                    " another release: starting again",
                    self.directory,
                )
                self._clear()
            elif files:
                logger.info("resuming from %s", self.directory)
                self._opened = True
        if make and not self._opened:
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = identity.with_suffix(".partial")
            partial.write_text(self._identity, encoding="utf-8")
            partial.replace(identity)
            self._opened = True
        return self._opened

    def _clear(self) -> None:
        for pattern in ("*.safetensors", "*.partial", IDENTITY):
            for file in self.directory.glob(pattern):
                file.unlink()
