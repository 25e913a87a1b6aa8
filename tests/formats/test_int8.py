# SPDX-License-Identifier: Apache-2.0
"""The format int8, which checkpoints have: its definition and its checks."""

from dataclasses import replace

import pytest
import torch

from vllm_rsparse.formats.base import WeightFormatError
from vllm_rsparse.formats.int8 import store_int8
from vllm_rsparse.formats.stored_bytes import stored_bytes


@pytest.mark.parametrize(("k", "group"), [(256, 128), (192, 192), (128, 128)])
def test_is_its_definition(k: int, group: int) -> None:
    codes = torch.randint(-128, 128, (6, k)).to(torch.int8)
    scales = torch.rand(6, k // group).half()
    weight = store_int8(codes, scales)
    assert weight.group == group
    expected = codes.float() * scales.float().repeat_interleave(group, 1)
    assert torch.equal(weight.dequantise(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 64}, "groups of 64 input channels; the format int8 takes 128 if"),
        ({"k": 192, "group": 128}, r"\[6, 192\]: groups of 128 input channels"),
        ({"data": torch.zeros(6, 256)}, "weight must be contiguous int8"),
        ({"data": torch.zeros(256, 6, dtype=torch.int8).t()}, "got strides"),
        ({"scales": torch.ones(2, 6).half()}, "scales must be contiguous float32"),
        ({"scales": None}, "there are none"),
        ({"zeros": torch.zeros(2, 6)}, "int8 has no zeros"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_malformed(change: dict[str, object], message: str) -> None:
    weight = store_int8(torch.zeros(6, 256, dtype=torch.int8), torch.ones(6, 2))
    with pytest.raises(WeightFormatError, match=message):
        replace(weight, **change)


def test_a_format_of_which_nobody_knows_the_bytes() -> None:
    with pytest.raises(ValueError, match="the bytes of the format 'nf4' are not known"):
        stored_bytes("nf4", 8, 64, 2)
