# SPDX-License-Identifier: Apache-2.0
"""Writing files so that they are on disk, and errors that say what to do if not."""

import os
from contextlib import AbstractContextManager
from pathlib import Path

from vllm_rsparse.arguments import writing
from vllm_rsparse.errors import PrepareError

_ELSEWHERE = "an OUTPUT on another disk"


def writing_output(what: Path | str) -> AbstractContextManager[None]:
    """``writing`` for OUTPUT and the files that a run keeps next to it.

    Raises:
        PrepareError: the disk is full, or the file system does not allow it.
    """
    return writing(what, PrepareError, _ELSEWHERE)


def write_text(path: Path, text: str) -> None:
    """Write a new file, which is on disk when this returns.

    Raises:
        PrepareError: it cannot be written.
    """
    _write(path, "x", text)


def append_text(path: Path, text: str) -> None:
    """Append to a file; the text is on disk when this returns.

    Raises:
        PrepareError: it cannot be written.
    """
    _write(path, "a", text)


def replace_text(path: Path, text: str) -> None:
    """Write a file that is complete or absent, and on disk when this returns.

    Raises:
        PrepareError: it cannot be written.
    """
    partial = path.with_suffix(".partial")
    _write(partial, "w", text)
    with writing_output(path):
        partial.replace(path)


def _write(path: Path, mode: str, text: str) -> None:
    with writing_output(path), path.open(mode, encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
