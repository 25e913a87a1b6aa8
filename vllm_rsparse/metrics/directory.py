# SPDX-License-Identifier: Apache-2.0
"""The directory in which an engine's ranks count: created, and removed by later starts.

A server that is killed cannot remove its directory, which would stay in shared memory
until the machine restarts. The owner therefore holds a lock on a file in it, which the
kernel releases with the process. This also works for another container that shares the
memory, where a process id means nothing. Forked workers hold the lock too.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

# Memory, not a disk: nothing is written back, and Linux lets a GPU write to it (since
# 6.5, pages of a disk-backed file cannot be pinned for long).
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "vllm-rsparse-"
_LOCK = "owner.lock"


class CountsDirectory:
    """A directory of this process, removed when the process ends.

    Args:
        parent: where to make it; shared memory where that can be written, else the
            directory for temporary files.

    Raises:
        OSError: it cannot be made, or has no room.
    """

    def __init__(self, parent: Path | None = None) -> None:
        if parent is None:
            shared = os.access(_SHARED_MEMORY, os.W_OK)
            parent = _SHARED_MEMORY if shared else Path(tempfile.gettempdir())
        sweep(parent)
        self._directory = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent)
        self.path = Path(self._directory.name)
        # Renamed only once it is locked: a sweep may run in between.
        partial = self.path / f"{_LOCK}.partial"
        self._lock = partial.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        partial.rename(self.path / _LOCK)


def sweep(parent: Path) -> list[Path]:
    """Remove directories whose owner is gone; returns the removed ones.

    Directories of other users, and those that cannot be removed, stay.
    """
    removed = []
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            with (path / _LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            removed.append(path)
    return removed
