# SPDX-License-Identifier: Apache-2.0
"""What the subcommands' arguments share: files that are written at the end of a run."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_rsparse.errors import RSparseError, SettingError


def output_file(text: str) -> Path:
    """An argument's ``type``: a file to write, checked before any work is done.

    Raises:
        argparse.ArgumentTypeError: it could not be written.
    """
    path = Path(text)
    problem = output_problem(path)
    if problem is not None:
        raise argparse.ArgumentTypeError(f"{text}: {problem}")
    return path


def output_problem(path: Path) -> str | None:
    """Why a file could not be written, and what to do; None if it could be."""
    folder = path.absolute().parent
    if path.is_dir():
        return "is a folder; give the name of a file in it"
    if not folder.is_dir():
        return f"there is no folder {folder}; make it, or choose another"
    if not os.access(path if path.exists() else folder, os.W_OK):
        return "is not writable; choose another file"
    return None


@contextmanager
def writing(
    what: Path | str,
    kind: type[RSparseError] = SettingError,
    elsewhere: str = "another path",
) -> Iterator[None]:
    """Turn the operating system's refusal to write into an error for the user.

    Not everything shows before any work is done: a disk fills up, and some file systems
    (/proc) hold no files although their folders are writable.

    Args:
        what: is written: a path, after the option that gives it.
        kind: class of the error.
        elsewhere: what to choose instead.

    Raises:
        RSparseError: of this kind; it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(what, error, kind, elsewhere) from error


def unwritable(
    what: Path | str, cause: Exception, kind: type[RSparseError], elsewhere: str
) -> RSparseError:
    """The error that ``writing`` raises, for exceptions other than ``OSError``."""
    return kind(
        f"{what}: cannot be written ({cause}); free space there, or choose {elsewhere}"
    )


def check_picture(path: Path) -> None:
    """Refuse, before any work is done, an image that ``--plot`` could not draw.

    Raises:
        SettingError: matplotlib is not installed, or does not write this format.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise SettingError(
            f"--plot {path}: needs matplotlib, which is not installed; install it with"
            " `pip install matplotlib`, or leave --plot out"
        ) from error
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise SettingError(
            f"--plot {path}: the name must end in one of"
            f" {', '.join('.' + name for name in sorted(formats))}"
        )
