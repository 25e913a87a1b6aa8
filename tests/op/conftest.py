# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests of the op and its backends."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


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
