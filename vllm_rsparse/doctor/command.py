# SPDX-License-Identifier: Apache-2.0
"""The command: runs the checks in order, prints a line for each, sets the status."""

import argparse
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from vllm_rsparse.doctor import installation, model
from vllm_rsparse.doctor.finding import Finding, Level
from vllm_rsparse.errors import RSparseError
from vllm_rsparse.text_table import counted

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
    count: Counter[Level] = Counter()
    for finding in check(args.directory):
        print(finding.line(), flush=True)
        count[finding.level] += 1
    told = [
        (Level.FAIL, f"{count[Level.FAIL]} failed"),
        (Level.WARN, counted(count[Level.WARN], "warning")),
        (Level.SKIP, f"{count[Level.SKIP]} skipped"),
    ]
    found = [words for level, words in told if count[level]]
    print(", ".join(found) or "all checks passed")
    return 1 if count[Level.FAIL] else 0


def check(directory: Path | None) -> Iterator[Finding]:
    """All findings; an exception becomes the check's finding, and the others run.

    What several checks trip over, such as a damaged artifact, is told once.
    """
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", installation.versions),
        ("plug-in", installation.plugin),
        ("device", installation.device),
    ]
    if directory is None:
        checks += [
            ("backend", partial(installation.backend, directory)),
            ("tuned shapes", installation.tuned_shapes),
            ("one layer", model.synthetic_layer),
        ]
    else:
        checks += [
            ("artifact", partial(model.artifact, directory)),
            ("backend", partial(installation.backend, directory)),
            ("base model", partial(model.base, directory)),
            ("tuned shapes", partial(model.tuned_shapes, directory)),
            ("one layer", partial(model.first_layer, directory)),
        ]
    told: dict[str, str] = {}
    for name, function in checks:
        try:
            yield from function()
        # Whatever is wrong with the installation must become a line, not a traceback.
        except Exception as error:
            # Ours say themselves what is wrong and what to do.
            ours = isinstance(error, RSparseError)
            kind = "" if ours else f"{type(error).__name__}: "
            detail = f"{kind}{error}"
            if detail in told:
                yield Finding(Level.SKIP, name, f"for the reason of {told[detail]!r}")
            else:
                told[detail] = name
                yield Finding(Level.FAIL, name, detail)
