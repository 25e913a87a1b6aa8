# SPDX-License-Identifier: Apache-2.0
"""A run's results so far, on disk: later stages read them, and an interrupted run
resumes from them.

One directory next to OUTPUT. ``search.json`` records what the results depend on (see
``identity``). Tensors, with an optional JSON note, have a safetensors file per key,
complete or absent. They are written in the background, in the order in which they were
put. Results that are JSON alone are appended to ``results.jsonl``, one object per line,
and reach the disk before the run continues. A killed run loses the files that were not
on disk yet, which the resumed run makes again.

A stage keeps its results of a layer when the layer is done. The states that it carries
from layer to layer (hidden states, gradients) are also needed to resume, but they are
large, 0.5 GB for 16 windows of 4096 tokens and 4096 channels in bf16, so they are kept
only every ``STATE_SECONDS``.
"""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_rsparse.errors import DamagedCheckpointError, NotFiniteError, PrepareError
from vllm_rsparse.prepare.store.background import BackgroundFiles
from vllm_rsparse.prepare.store.files import (
    append_text,
    replace_text,
    writing_output,
)

logger = logging.getLogger(__name__)

IDENTITY = "search.json"
RESULTS = "results.jsonl"
STATE_SECONDS = 20.0
# What mends these errors changes what the results depend on.
_USELESS_AFTER = (DamagedCheckpointError, NotFiniteError)


@dataclass(frozen=True)
class Key:
    """Names one result.

    Attributes:
        stage: what found it; a namespace of its own.
        item: which of the stage's results: a layer's position, or a name that the stage
            chooses. Tensors of the key are in ``STAGE.ITEM.safetensors``.
    """

    stage: str
    item: int | str

    def __str__(self) -> str:
        return f"{self.stage}.{self.item}"


class RunStore:
    """Results by key; the directory is removed when the run has succeeded.

    It is also removed when an error shows that the results are useless.

    Nothing is read or created before a result is read or put, so that a run that keeps
    nothing does not touch the directory of another run. From then on the directory is
    locked until the run ends.

    Args:
        directory: where the results are.
        identity: JSON of everything that they depend on. A directory of another
            identity is emptied, with a warning that names the differences.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory = directory
        self._identity = json.dumps(identity, sort_keys=True)
        self._results: dict[Key, Any] = {}
        self._files = BackgroundFiles()
        self._opened = False
        self._lock: int | None = None
        self._last_state = time.monotonic()

    def __contains__(self, key: Key) -> bool:
        if not self._open():
            return False
        path = self._path(key)
        return key in self._results or path in self._files or path.exists()

    def put(self, key: Key, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Keep tensors, and a JSON note, in place of the key's earlier ones.

        They are copied, and written in the background.

        Raises:
            PrepareError: earlier ones cannot be written.
        """
        self._open(make=True)
        self._files.put(self._path(key), tensors, json.dumps(note))

    def get(self, key: Key) -> tuple[dict[str, Tensor], Any]:
        """Tensors on the CPU, which may be changed in place, and the note.

        Raises:
            PrepareError: the key was never put, or the file is damaged or cannot be
                written.
        """
        path = self._files.place(self._path(key))
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

    def record(self, results: Mapping[Key, Any]) -> None:
        """Keep results that are JSON; they are on disk when this returns.

        Raises:
            PrepareError: they cannot be written.
        """
        self._open(make=True)
        lines = "".join(_line(*result) for result in results.items())
        append_text(self.directory / RESULTS, lines)
        self._files.settle()
        self._results.update(results)

    def recall(self, key: Key) -> Any:
        """A recorded result, or None."""
        return self._results.get(key) if self._open() else None

    def smallest(self, stage: str) -> float:
        """The least of a stage's recorded results, which must be numbers."""
        return min(v for key, v in self._results.items() if key.stage == stage)

    def state_due(self) -> bool:
        """Whether the last True is ``STATE_SECONDS`` ago."""
        now = time.monotonic()
        if now - self._last_state < STATE_SECONDS:
            return False
        self._last_state = now
        return True

    def require(self, size: int) -> None:
        """Check that ``size`` bytes fit, including what is already kept.

        Raises:
            PrepareError: they do not.
        """
        self._open(make=True)
        self._files.wait()
        kept = sum(file.stat().st_size for file in self.directory.iterdir())
        free = shutil.disk_usage(self.directory).free
        if size > kept + free:
            raise PrepareError(
                f"{self.directory}: the inputs of all layers take {size} bytes there,"
                f" and {kept + free} are free; free space, choose an OUTPUT on a larger"
                " disk, or lower --calibration-samples or --calibration-tokens"
            )

    def clear(self) -> None:
        """Remove everything that was kept."""
        for pattern in ("*.safetensors", "*.partial", RESULTS, IDENTITY):
            for file in self.directory.glob(pattern):
                file.unlink()
        self._results.clear()
        self._opened = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._opened:
                self._leave(error)
        finally:
            self.close()

    def close(self) -> None:
        """Finish what is being written, and let another run use the directory."""
        self._files.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _leave(self, error: BaseException | None) -> None:
        self._files.close()
        if error is None or isinstance(error, _USELESS_AFTER):
            self.clear()
            with suppress(OSError):  # the user has added files there
                self.directory.rmdir()
        else:
            logger.info(
                "the results so far are in %s: the same command resumes from them;"
                " remove the directory to start again",
                self.directory,
            )

    def _path(self, key: Key) -> Path:
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
                    f"{self.directory}: prepare keeps its intermediate results there,"
                    " but did not create this directory; remove it or choose"
                    " another OUTPUT"
                )
            self._acquire()
            earlier = identity.read_text(encoding="utf-8") if files else None
            if earlier == self._identity:
                self._read_results()
                logger.info("resuming from %s", self.directory)
                self._opened = True
            elif earlier is not None:
                logger.warning(
                    "%s is from a run that differs in %s: starting again",
                    self.directory,
                    _differences(earlier, self._identity),
                )
                self.clear()
        if make and not self._opened:
            with writing_output(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
            self._acquire()
            replace_text(identity, self._identity)
            self._opened = True
        return self._opened

    def _acquire(self) -> None:
        """Lock the directory, which exists.

        Raises:
            PrepareError: another process has.
        """
        if self._lock is not None:
            return
        self._lock = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise PrepareError(
                f"{self.directory}: another `prepare` is working there; wait until it"
                " ends, or choose another OUTPUT"
            ) from None
        except OSError as error:  # some network file systems lock no directories
            logger.debug("%s cannot be locked (%s)", self.directory, error)

    def _read_results(self) -> None:
        path = self.directory / RESULTS
        if not path.exists():
            return
        *lines, torn = path.read_text(encoding="utf-8").split("\n")
        for line in lines:
            try:
                entry = json.loads(line)
                self._results[Key(entry["stage"], entry["item"])] = entry["value"]
            except (ValueError, KeyError, TypeError):
                torn = line
                break
        if torn:  # the run was killed while it wrote
            whole = "".join(_line(*item) for item in self._results.items())
            replace_text(path, whole)


def _line(key: Key, value: Any) -> str:
    return json.dumps({"stage": key.stage, "item": key.item, "value": value}) + "\n"


def _differences(earlier: str, now: str) -> str:
    """Keys in which two identities differ, for messages."""
    try:
        old, new = json.loads(earlier), json.loads(now)
        keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    except (ValueError, AttributeError):
        keys = []
    return ", ".join(keys) or "its settings"
