# SPDX-License-Identifier: Apache-2.0
"""Counts and sizes as a reader writes them."""

import pytest

from vllm_rsparse.text_table import counted, size_of


def test_a_single_thing_has_no_plural() -> None:
    assert [counted(n, "minute") for n in (0, 1, 2)] == [
        "0 minutes",
        "1 minute",
        "2 minutes",
    ]


@pytest.mark.parametrize(
    ("size", "words"),
    [(3 * 2**19, "1.5 MiB"), (2**30, "1.0 GiB"), (5 * 2**29, "2.5 GiB")],
)
def test_a_size_has_the_unit_that_suits_it(size: int, words: str) -> None:
    assert size_of(size) == words
