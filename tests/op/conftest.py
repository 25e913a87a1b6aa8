# SPDX-License-Identifier: Apache-2.0
"""Where the test files of this folder find the modules that they share; fixtures."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Importlib mode does not put it there: for bits.py and triton_case.py.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads, for this test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
