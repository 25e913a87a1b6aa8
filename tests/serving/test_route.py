# SPDX-License-Identifier: Apache-2.0
"""The switch point that is chosen where the user names none."""

import pytest

from vllm_rsparse.op.backends import Backend
from vllm_rsparse.serving.route import default_max_sparse_tokens


@pytest.mark.parametrize(
    ("read_fraction", "expected"),
    [(0.3, 2), (0.5, 2), (0.68, 2), (0.7, 1), (0.9, 1), (0.95, 0), (1.0, 0)],
)
def test_triton_reads_no_more_than_pays(read_fraction: float, expected: int) -> None:
    # Two tokens that read 0.7 each read 0.91 together.
    assert default_max_sparse_tokens(Backend.TRITON, read_fraction) == expected


def test_what_covers_the_definition_does_not_depend_on_the_masks() -> None:
    assert default_max_sparse_tokens(Backend.REFERENCE, 1.0) == 16
