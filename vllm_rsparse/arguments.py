# SPDX-License-Identifier: Apache-2.0
"""What the subcommands' arguments share: options given twice or for nothing, files."""

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_rsparse.errors import RSparseError, SettingError


class Once(argparse.Action):
    """Store a value, and refuse the option if it comes again.

    argparse keeps the last one: with ``--data a.txt --data b.txt``, the first file
    would be left out without a word.
    """

    _given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value."""
        if self._given and option_string is not None:
            values_too = ", with all its values" if self.nargs == "+" else ""
            raise argparse.ArgumentError(
                self, f"is given twice; give it once{values_too}"
            )
        self._given = True
        setattr(namespace, self.dest, values)


def settle(
    args: argparse.Namespace, defaults: Mapping[str, Any], applies: bool, goes: str
) -> None:
    """Give options that were left out their defaults; refuse those without effect.

    Args:
        args: changed in place; the options' own default is None.
        defaults: of the options, by attribute.
        applies: whether the options have an effect in this run.
        goes: what to say if not: "goes with --chat".

    Raises:
        SettingError: an option was given that would be ignored.
    """
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not applies:
            option = f"--{name.replace('_', '-')}"
            raise SettingError(f"{option} {goes}; leave it out here")


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
        raise kind(
            f"{what}: cannot be written ({error}); free space there, or choose"
            f" {elsewhere}"
        ) from error


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
