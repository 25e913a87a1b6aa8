# SPDX-License-Identifier: Apache-2.0
"""The switch point that is chosen where the user names none."""

from functools import partial

import pytest

from vllm_rsparse import envs
from vllm_rsparse.errors import RSparseError
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.serving.route import (
    DenseWeights,
    RouteRequest,
    choose_route,
    default_max_sparse_tokens,
)


@pytest.mark.parametrize(
    ("read_fraction", "expected"),
    [(0.3, 2), (0.5, 2), (0.68, 2), (0.7, 1), (0.9, 1), (0.95, 0), (1.0, 0)],
)
def test_triton_reads_no_more_than_pays(read_fraction: float, expected: int) -> None:
    # Two tokens that read 0.7 each read 0.91 together.
    assert default_max_sparse_tokens(Backend.TRITON, read_fraction) == expected


def test_formats_gain_differently_from_a_second_token() -> None:
    at = partial(default_max_sparse_tokens, Backend.TRITON)
    assert [at(0.5, "fp8"), at(0.61, "fp8"), at(0.65, "fp8")] == [2, 2, 1]
    assert [at(0.65, "int4"), at(0.65, "fp8-block")] == [2, 1]
    assert [at(0.75, "int4"), at(0.78, "int4"), at(0.75, "int8-planes")] == [2, 1, 2]


def test_what_covers_the_definition_does_not_depend_on_the_masks() -> None:
    assert default_max_sparse_tokens(Backend.REFERENCE, 1.0) == 16


def requested(dense_weights: str | None) -> RouteRequest:
    return RouteRequest.of_config("rsparse", "reference", 2, dense_weights)


def test_dense_weights_by_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_route([requested(None)], "cpu").dense_weights is DenseWeights.SHARED
    requests = [requested("auto"), requested("separate")]
    assert choose_route(requests, "cpu").dense_weights is DenseWeights.SEPARATE
    monkeypatch.setenv(envs.DENSE_WEIGHTS, "shared")
    assert choose_route(requests, "cpu").dense_weights is DenseWeights.SHARED


def test_unknown_dense_weights_name_their_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RSparseError, match=r"rsparse\.dense_weights is 'both'.*shared"):
        choose_route([requested("both")], "cpu")
    monkeypatch.setenv(envs.DENSE_WEIGHTS, "both")
    with pytest.raises(RSparseError, match="VLLM_RSPARSE_DENSE_WEIGHTS is 'both'"):
        choose_route([requested(None)], "cpu")
