# SPDX-License-Identifier: Apache-2.0
"""What thresholds drop, against the whole mask at once."""

import pytest
import torch
from torch import Tensor

from vllm_rsparse.prepare.calibration import thresholds as chunks
from vllm_rsparse.prepare.calibration.dropped import count_dropped

TOKENS, K = 50, 7


@pytest.fixture(params=[3 * K, 1 << 20], ids=["chunks of 3 tokens", "one chunk"])
def inputs(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Inputs [tokens, K] and thresholds [K], some of which an input meets."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", request.param)
    x, thresholds = torch.randn(TOKENS, K), torch.rand(K)
    x[3] = thresholds
    return x, thresholds


@pytest.mark.parametrize("centred", [True, False])
def test_sums(inputs: tuple[Tensor, Tensor], centred: bool) -> None:
    x, thresholds = inputs
    mask = x.abs() > thresholds
    d = x.masked_fill(mask, 0).double()
    dropped = count_dropped(x, thresholds, outer=True)
    assert dropped.kept_fraction == mask.double().mean().item()
    # Sums of float32 values in float64, but for the products within a chunk.
    torch.testing.assert_close(dropped.mean, d.mean(0))
    expected = torch.cov(d.T, correction=0) if centred else d.T @ d / TOKENS
    torch.testing.assert_close(
        dropped.covariance(centred), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("leading", [1, 3, 10, TOKENS, 2 * TOKENS])
def test_leading_tokens(inputs: tuple[Tensor, Tensor], leading: int) -> None:
    x, thresholds = inputs
    rows, d = zip(*count_dropped(x, thresholds, leading=leading).leading(), strict=True)
    assert torch.equal(torch.cat(rows), x[:leading])
    expected = torch.where(x.abs() > thresholds, 0.0, x)[:leading]
    assert torch.equal(torch.cat(d), expected)


def test_what_was_not_summed_is_not_zero(inputs: tuple[Tensor, Tensor]) -> None:
    dropped = count_dropped(*inputs)
    assert list(dropped.leading()) == []
    with pytest.raises(ValueError, match="not summed"):
        _ = dropped.mean
    with pytest.raises(ValueError, match="not summed"):
        dropped.covariance(centred=False)
