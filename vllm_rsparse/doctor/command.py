# SPDX-License-Identifier: Apache-2.0
"""The command: runs the checks in order, prints a line for each, sets the status."""

import argparse
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from vllm_rsparse.doctor import installation, model
from vllm_rsparse.doctor.finding import Finding, Level
from vllm_rsparse.errors import RSparseError

_LEVEL = "VLLM_LOGGING_LEVEL"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        type=Path,
        nargs="?",
        help="check this too: what `prepare` wrote, or the artifact inside it",
    )
    parser.epilog = (
        "Exit status: 0 when nothing failed (warnings allowed), 1 otherwise."
    )


def run(args: argparse.Namespace) -> int:
    """Print the findings, one line each; 1 when one of them failed."""
    with _quiet_vllm():
        return _report(args)


@contextmanager
def _quiet_vllm() -> Iterator[None]:
    """vLLM logs while it is imported; the findings should fit on one screen.

    Both settings are undone: the process, and servers that it starts, may go on.
    """
    logger, unset = logging.getLogger("vllm"), _LEVEL not in os.environ
    level = logger.level
    os.environ.setdefault(_LEVEL, "ERROR")
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if unset:
            os.environ.pop(_LEVEL, None)


def _report(args: argparse.Namespace) -> int:
    failed = warned = 0
    for finding in check(args.directory):
        print(finding.line(), flush=True)
        failed += finding.level is Level.FAIL
        warned += finding.level is Level.WARN
    print(
        f"{failed} failed, {warned} warnings"
        if failed or warned
        else "all checks passed"
    )
    return 1 if failed else 0


def check(directory: Path | None) -> Iterator[Finding]:
    """All findings; an exception becomes the check's finding, and the others run."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", installation.versions),
        ("plug-in", installation.plugin),
        ("device", installation.device),
        ("backend", partial(installation.backend, directory)),
    ]
    if directory is None:
        checks += [
            ("tuned shapes", installation.tuned_shapes),
            ("one layer", model.synthetic_layer),
        ]
    else:
        checks += [
            ("artifact", partial(model.artifact, directory)),
            ("base model", partial(model.base, directory)),
            ("tuned shapes", partial(model.tuned_shapes, directory)),
            ("one layer", partial(model.first_layer, directory)),
        ]
    for name, function in checks:
        try:
            yield from function()
        # Whatever is wrong with the installation must become a line, not a traceback.
        except Exception as error:
            # Ours say themselves what is wrong and what to do.
            ours = isinstance(error, RSparseError)
            kind = "" if ours else f"{type(error).__name__}: "
            yield Finding(Level.FAIL, name, f"{kind}{error}")
