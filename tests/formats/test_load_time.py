# SPDX-License-Identifier: Apache-2.0
"""Weights that are quantized while they load: the definition of FP8 per channel."""

import pytest
import torch

from vllm_rsparse.errors import SettingError
from vllm_rsparse.formats import fp8
from vllm_rsparse.formats.base import WeightFormatError
from vllm_rsparse.formats.fp8 import FP8, FP8_WHILE_LOADING, channel_scales
from vllm_rsparse.formats.registry import LOAD_TIME, load_time_format


@pytest.mark.parametrize("one", LOAD_TIME, ids=lambda one: one.name)
def test_what_is_encoded_is_in_the_format(one):
    weight = torch.randn(256, 128).bfloat16()
    stored = one.encode(weight)
    assert stored.format is one.format
    assert stored.shape == (256, 128)
    assert torch.equal(one.round_trip(weight), stored.dequantise())
    # Far more than either rounding: what comes back is the weight.
    assert (one.round_trip(weight) - weight.float()).abs().max() < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_is_the_nearest_element_of_each_row(dtype):
    weight = (torch.randn(33, 48) * torch.logspace(-4, 1, 33)[:, None]).to(dtype)
    stored = FP8_WHILE_LOADING.encode(weight)
    assert stored.format is FP8
    elements = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    elements = elements[elements.isfinite()]
    scaled = weight.float() / channel_scales(weight)[:, None]
    nearest = (scaled[..., None] - elements).abs().amin(-1)
    taken = (scaled - stored.data.float()).abs()
    assert torch.equal(taken, nearest)
    # The largest element of a row is FP8's largest number.
    assert torch.equal(stored.data.float().abs().amax(1), torch.full((33,), 448.0))


def test_rows_of_zeros_and_rows_in_pieces(monkeypatch):
    weight = torch.randn(10, 16)
    weight[3] = 0
    whole = FP8_WHILE_LOADING.encode(weight)
    assert whole.scales[3] == 1
    assert not whole.data[3].float().any()
    monkeypatch.setattr(fp8, "_PIECE", 48)
    pieces = FP8_WHILE_LOADING.encode(weight)
    assert torch.equal(pieces.data.float(), whole.data.float())
    assert torch.equal(pieces.scales, whole.scales)


def test_a_slice_of_the_inputs_with_the_rows_scales_is_a_slice_of_the_whole():
    weight = torch.randn(24, 64)
    scales = FP8_WHILE_LOADING.scales(weight)
    whole = FP8_WHILE_LOADING.round_trip(weight, scales)
    parts = [FP8_WHILE_LOADING.round_trip(w, scales) for w in weight.chunk(4, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    alone = [FP8_WHILE_LOADING.round_trip(w) for w in weight.chunk(4, dim=1)]
    assert not torch.equal(torch.cat(alone, dim=1), whole)


def test_elements_beyond_the_scale_become_the_largest_number():
    weight = torch.tensor([[1.0, -1.01, 0.5]])
    stored = FP8_WHILE_LOADING.encode(weight, torch.tensor([1 / 448]))
    assert stored.data.float().tolist() == [[448.0, -448.0, 224.0]]
    with pytest.raises(WeightFormatError, match=r"scales must be contiguous float32"):
        FP8_WHILE_LOADING.encode(weight, torch.ones(2))


def test_unknown_names_and_bases_are_refused():
    with pytest.raises(SettingError, match=r"--weights must be one of as-stored, fp8"):
        load_time_format("fp4", "--weights")
    with pytest.raises(SettingError, match=r"weights fp8 are made from float.*int4"):
        FP8_WHILE_LOADING.check_base("int4", "MODEL")
