# SPDX-License-Identifier: Apache-2.0
"""Links of a model directory that lead nowhere.

A prepared directory links to its base, a snapshot of the Hub's cache to its blobs.
Whatever opens such a directory later would blame something else: transformers a missing
tokenizer library, others a wrong file format.
"""

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from vllm_rsparse.errors import CheckpointError


def refuse_broken_links(
    directory: Path, remedy: str, patterns: Iterable[str] = ("*",)
) -> None:
    """Refuse a directory of which a file is gone.

    Args:
        directory: of the model; what is no directory is left to others.
        remedy: what to do about it.
        patterns: names of files that matter.

    Raises:
        CheckpointError: names the link and what it points to.
    """
    if directory.is_symlink() and not directory.exists():
        raise _gone(directory, remedy)
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        matters = any(fnmatch(path.name, pattern) for pattern in patterns)
        if matters and path.is_symlink() and not path.exists():
            raise _gone(path, remedy)


def _gone(link: Path, remedy: str) -> CheckpointError:
    # The last of a chain of links is what has to be put back.
    target = os.path.realpath(link)
    return CheckpointError(f"{link}: is a link to {target}, which is gone; {remedy}")
