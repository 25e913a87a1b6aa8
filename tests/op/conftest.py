# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests of the op and its backends."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from .interpreter import integer_overflow_checked, patched_once


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory comes filled with NaN, so that what nobody writes shows."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **options: Any) -> Tensor:
            made = allocate(*args, **options)
            if made.is_floating_point():
                made.detach().fill_(float("nan"))
            elif made.itemsize >= 4:
                # Channels that nobody listed: far outside every matrix.
                made.fill_(2**30)
            return made

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads, for this test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _fast_interpreter() -> Iterator[None]:
    """Where kernels are interpreted: see ``interpreter.py``."""
    try:
        import triton
    except ImportError:
        yield
        return
    if not triton.knobs.runtime.interpret:
        yield
        return
    with patched_once(), integer_overflow_checked(False):
        yield


@pytest.fixture
def overflow_checked(_fast_interpreter: None) -> Iterator[None]:
    """The interpreter refuses sums and products that int32 does not hold."""
    with integer_overflow_checked(True):
        yield
