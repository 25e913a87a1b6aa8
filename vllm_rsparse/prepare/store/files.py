# SPDX-License-Identifier: Apache-2.0
"""Writing files so that they are on disk, and errors that say what to do if not."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_rsparse.errors import PrepareError


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turn the operating system's refusal to write into an error for the user.

    Args:
        what: the file, or the parameter with its value.

    Raises:
        PrepareError: the disk is full, or the file system does not allow it.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(what, error) from error


def unwritable(what: Path | str, error: Exception) -> PrepareError:
    """The error of a file, or of a parameter with its value, and its cause."""
    return PrepareError(
        f"{what}: cannot be written ({error}); free space there, or choose an OUTPUT on"
        " another disk"
    )


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
    with writing(path):
        partial.replace(path)


def _write(path: Path, mode: str, text: str) -> None:
    with writing(path), path.open(mode, encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
