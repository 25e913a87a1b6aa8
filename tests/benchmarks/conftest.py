# SPDX-License-Identifier: Apache-2.0
"""Scripts of ``benchmarks/`` are imported as they are run: from their own folder."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def import_script(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], ModuleType]]:
    """Call with the name of a script; what it imports next to it is forgotten too."""
    folder = repository / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    loaded = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in folder.glob("*.py")} - loaded:
        sys.modules.pop(name, None)
