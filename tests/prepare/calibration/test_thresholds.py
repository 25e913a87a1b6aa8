# SPDX-License-Identifier: Apache-2.0
"""The exact order statistic and what is made of it."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vllm_rsparse.errors import NotFiniteError
from vllm_rsparse.prepare.calibration import thresholds
from vllm_rsparse.prepare.calibration.dropped import count_dropped
from vllm_rsparse.prepare.calibration.order import around_ranks, kth_smallest
from vllm_rsparse.prepare.calibration.thresholds import (
    KEEP_ALL,
    channel_thresholds,
    column_norms,
    score_threshold,
    score_thresholds,
)

DISTRIBUTIONS = {
    "normal": lambda: torch.randn(10_007).abs(),
    "heavy tails": lambda: torch.randn(10_007).abs().exp2().pow(8),
    "one bucket": lambda: 1 + torch.rand(10_007) * 1e-3,
    "ties": lambda: torch.randint(0, 3, (10_007,)).float(),
    "zeros": lambda: torch.zeros(10_007),
    "denormal": lambda: torch.rand(10_007) * 1e-40,
    "largest": lambda: torch.full((3,), torch.finfo(torch.float32).max),
    "single": lambda: torch.tensor([0.25]),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_kth_smallest_is_the_sorted_element(name: str) -> None:
    values = DISTRIBUTIONS[name]()
    ordered = values.sort().values
    for k in {1, 2, len(values) // 3, len(values) // 2, len(values) - 1, len(values)}:
        if 1 <= k <= len(values):
            assert kth_smallest(lambda: iter([values]), k) == ordered[k - 1].item()


def test_kth_smallest_does_not_depend_on_the_chunks() -> None:
    values = torch.randn(5000).abs()

    def chunks() -> Iterator[Tensor]:
        yield from values.split(617)
        yield values[:0]

    assert kth_smallest(chunks, 1234) == values.sort().values[1233].item()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("sampled", ["some", "misleading", "none"])
def test_around_ranks_does_not_depend_on_the_sample(name: str, sampled: str) -> None:
    values = DISTRIBUTIONS[name]()
    sample = {"some": values[::7], "misleading": values.max().repeat(5000) * 2}
    given = sample.get(sampled, values[:0])
    ordered = values.sort().values
    n = len(values)
    ranks = [k for k in (1, 2, n // 3, n // 2, n // 2, n - 1, n) if 1 <= k <= n]
    found = around_ranks(lambda: iter(values.split(617)), given, ranks, n)
    for k, pair in zip(ranks, found, strict=True):
        expected = ordered[k - 1]
        above = ordered[ordered > expected]
        following = above[0] if len(above) else expected
        assert pair == (expected.item(), following.item())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.nan])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.ones(4, 8)
    x[2, 3] = bad
    with pytest.raises(NotFiniteError, match=r"NaN or infinity.*--dtype"):
        score_threshold(x, torch.ones(8), 0.5)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.475, 0.5, 0.999])
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_the_wanted_fraction_lies_strictly_above(
    keep: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thresholds, "CHUNK_ELEMENTS", chunk)
    x, norms = torch.randn(97, 61), torch.rand(61)
    score = score_threshold(x, norms, keep)
    scores = x.abs() * norms
    assert (scores > score).sum() == round(keep * scores.numel())


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_no_score_is_met_by_its_own_threshold(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding would decide about it, each time that the token comes."""
    monkeypatch.setattr(thresholds, "CHUNK_ELEMENTS", chunk)
    tokens = torch.randn(7, 61)
    x, norms = tokens[torch.randint(0, 7, (400,))], torch.rand(61)
    scores = (x.abs() * norms).flatten().sort().values
    below = scores[scores.numel() // 2 - 1].item()
    above = scores[scores > below][0].item()
    score = score_threshold(x, norms, 0.5)
    assert score == pytest.approx((below + above) / 2, rel=1e-6)
    assert (scores > below * (1 + 1e-6)).sum() == (scores > score).sum()


@pytest.mark.parametrize(
    ("below", "above"),
    [(1.0, 1.0 + 2**-23), (1.0 + 2**-23, 1.0 + 2**-22), (0.0, 1e-45), (3e38, 3.4e38)],
)
def test_neighbouring_numbers_are_told_apart(below: float, above: float) -> None:
    x = torch.tensor([[below, above]])
    score = score_threshold(x, torch.ones(2), 0.5)
    assert (x > score).tolist() == [[False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_inputs_are_left_as_they_are(dtype: torch.dtype) -> None:
    x = torch.randn(50, 7).to(dtype)
    before = x.clone()
    score_threshold(x, torch.rand(7), 0.5)
    assert torch.equal(x, before)


def test_several_fractions_have_the_thresholds_of_each_alone() -> None:
    x, norms = torch.randn(200, 61), torch.rand(61)
    keeps = [0.3, 1.0, 0.5, 0.0, 0.3]
    alone = [score_threshold(x, norms, keep) for keep in keeps]
    assert score_thresholds(x, norms, keeps) == alone


def test_keeping_everything_keeps_zeros_too() -> None:
    x = torch.zeros(5, 3)
    score = score_threshold(x, torch.ones(3), 1.0)
    assert score == KEEP_ALL
    limits = channel_thresholds(score, torch.ones(3))
    assert count_dropped(x, limits).kept_fraction == 1.0


def test_the_sample_spreads_over_tokens_and_channels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the shape; a sample of few channels would make the search slow."""
    monkeypatch.setattr(thresholds, "SAMPLE", 64)
    for tokens, channels in ((64, 8), (48, 12), (100, 7), (5, 4)):
        x = torch.arange(1.0, 1 + tokens * channels).view(tokens, channels)
        norms = torch.rand(channels) + 0.5
        found = thresholds._sample(x, norms)
        scores = (x * norms).flatten()
        where = torch.isin(scores, found).nonzero()[:, 0]
        # Each once, and about as many as are wanted.
        assert len(where) == len(found)
        assert min(x.numel(), 32) <= len(found) <= 128
        assert set((where % channels).tolist()) == set(range(channels))
        assert int(where[-1]) // channels >= tokens * 3 // 4


def test_chunks_are_whole_rows_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thresholds, "CHUNK_ELEMENTS", 100)
    for tokens, channels, rows in ((7, 30, [3, 3, 1]), (3, 300, [1, 1, 1])):
        x = torch.randn(tokens, channels)
        chunks = list(thresholds.row_chunks(x))
        assert [len(chunk) for chunk in chunks] == rows
        assert torch.equal(torch.cat(chunks), x)


def test_half_precision_inputs_are_scored_in_float32() -> None:
    x = torch.randn(200, 33).bfloat16()
    norms = torch.rand(33) + 0.1
    scores = (x.float().abs() * norms).flatten().sort().values
    below, above = scores[scores.numel() * 3 // 4 - 1 :][:2].tolist()
    assert below <= score_threshold(x, norms, 0.25) < above


def test_column_norms_match_float64() -> None:
    weight = torch.randn(300, 40).bfloat16()
    expected = weight.double().norm(dim=0)
    # Summed in float64, rounded once.
    torch.testing.assert_close(
        column_norms(weight).double(), expected, rtol=2**-24, atol=0
    )


def test_a_zero_column_is_never_kept() -> None:
    norms = torch.tensor([2.0, 0.0, 0.5])
    expected = torch.tensor([0.5, math.inf, 2.0])
    assert torch.equal(channel_thresholds(1.0, norms), expected)
    assert channel_thresholds(0.0, norms)[1] == math.inf
    assert channel_thresholds(KEEP_ALL, norms)[1] == math.inf
    assert channel_thresholds(1.0, norms).dtype == torch.float32
