# SPDX-License-Identifier: Apache-2.0
"""What ``drafters.py`` says of answers that differ, and its rows."""

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def drafters(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("drafters")


# Two answers of three tokens; at every position 7 follows the chosen token by 0.1 nats.
TOKENS = [[1, 2, 3], [4, 5, 6]]
LIKELY = [[{str(i): -0.2, "7": -0.3} for i in ids] for ids in TOKENS]
REFERENCE = {"tokens": TOKENS, "likely": LIKELY, "rates": [50.0, 60.0, 10.0]}


@pytest.mark.parametrize(
    ("tokens", "equal", "prefix", "unexplained"),
    [
        (TOKENS, 2, 6, 0),
        ([[1, 2, 3], [4, 7, 8]], 1, 4, 0),  # a near tie; what follows does not count
        ([[1, 2, 3], [9, 5, 6]], 1, 3, 1),  # 9 was not among the likely tokens
        ([[1, 2], [4, 5, 6]], 1, 5, 1),  # ends early
    ],
)
def test_answers_that_differ_are_explained_by_near_ties_only(
    drafters, tokens, equal, prefix, unexplained
) -> None:
    found = drafters.agreement(tokens, REFERENCE)
    assert (found["answers"], found["tokens"]) == (equal, prefix)
    row = {"answers": 2, "must_equal": "dense", "equal_to": {"dense": found}}
    assert drafters.unexplained(row, {"dense": 0.2}) == unexplained
    # Some tokens of a sparse model with dense verification are the dense model's.
    assert drafters.unexplained({**row, "must_equal": None}, {"dense": 0.2}) == 0


def test_ties_of_a_sparse_engine_have_a_width_of_their_own(drafters) -> None:
    found = {"answers": 0, "tokens": 9, "gaps": [0.3, 1.2, 2.1, None]}
    row = {"answers": 4, "equal_to": {"dense": found, "sparse": found}}
    ties = {"dense": 0.5, "sparse": 2.0}
    assert drafters.unexplained({**row, "must_equal": "dense"}, ties) == 3
    assert drafters.unexplained({**row, "must_equal": "sparse"}, ties) == 2


def test_a_row_has_the_median_and_the_accepted_length(drafters) -> None:
    # Two repeats of two answers: 2 steps of a prompt each, and 3 that verify.
    result = {
        "rates": [90.0, 110.0],
        "tokens": TOKENS,
        "repeatable": True,
        "counts": {"steps": 2 * (2 + 3), "drafts": 4, "proposed": 12, "accepted": 3},
    }
    row = drafters.row_of("all-sparse+ngram-3", result, {"dense": REFERENCE})
    assert (row["tokens_per_s"], row["relative"]) == (100, 2)
    assert row["acceptance_rate"] == 0.25
    assert row["mean_accepted_length"] == 1.75
    assert row["tokens_per_step"] == pytest.approx(4 / 3)
    assert row["must_equal"] == "sparse"
    assert "equal_to" not in drafters.row_of(
        "dense", REFERENCE | result, {"dense": REFERENCE}
    )
