# SPDX-License-Identifier: Apache-2.0
"""fp8 weights times x rounded to fp8: the parts that are ours, and on a GPU the whole.

The product itself is the library's, and needs a GPU with matrix units for fp8.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.fp8 import channel_scales, quantise_fp8
from vllm_rsparse.kernels import fp8_product
from vllm_rsparse.kernels.fp8_product import round_and_turn, round_rows
from vllm_rsparse.op import reference, triton_backend
from vllm_rsparse.op.dense_defaults import DENSE_TOKENS, ROUNDED_TOKENS
from vllm_rsparse.testing.cases import relative_error
from vllm_rsparse.testing.tolerances import tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weight_of(n: int, k: int) -> StoredWeight:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(DEVICE)
    return quantise_fp8(weight, channel_scales(weight))


def inputs(tokens: int, k: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(k)).to(DEVICE)
    return x.to(dtype)


def rounded_by_torch(x: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
    assert turned
    scales = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    rounded = (x / scales).to(torch.float8_e4m3fn)
    return turn(rounded), scales


def turn(rounded: Tensor) -> Tensor:
    """Channels [i, q, j] of sixteen as [q, i, j]."""
    codes = rounded.view(torch.uint8).unflatten(1, (-1, 2, 4, 2)).transpose(2, 3)
    return codes.flatten(1).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("shape", [(16, 16), (130, 67), (40, 256)], ids=str)
def test_a_launch_rounds_the_input_and_turns_the_weight(shape, tokens, monkeypatch):
    monkeypatch.setattr(fp8_product, "_PART_K", 64)
    weight = weight_of(*shape)
    x = inputs(tokens, 2 * shape[1], torch.float32)[:, : shape[1]]
    rounded, scales, turned = round_and_turn(x, weight)
    assert turned.is_contiguous()
    assert torch.equal(turned.view(torch.uint8), weight.data.view(torch.uint8))
    alone, expected = round_rows(x)
    assert torch.equal(scales, expected)
    assert torch.equal(rounded.view(torch.uint8), alone.view(torch.uint8))


@pytest.mark.parametrize("k", [8, 48, 67])
def test_rounded_rows(k):
    x = inputs(3, k, torch.float32)
    x[1] = 0
    x[2] *= 1e4
    rounded, scales = round_rows(x)
    assert torch.equal(scales[:, 0], x.abs().amax(1).clamp(min=1e-12) / 448)
    expected = (x / scales).to(torch.float8_e4m3fn).float()
    # Triton's interpreter loses the carry where rounding reaches the next power of two.
    carried = torch.frexp(expected).mantissa.abs() == 0.5
    compared = torch.ones_like(carried) if DEVICE == "cuda" else ~carried
    assert torch.equal(rounded.float()[compared], expected[compared])
    assert compared.sum() > compared.numel() // 2
    assert (rounded[1].float() == 0).all()


def test_rounded_rows_that_lie_apart():
    x = inputs(4, 64, torch.bfloat16)
    rounded, scales = round_rows(x[::2, :32])
    again, same = round_rows(x[::2, :32].contiguous())
    assert torch.equal(scales, same)
    assert torch.equal(rounded.view(torch.uint8), again.view(torch.uint8))


def test_rounded_channels_that_lie_apart():
    x = inputs(32, 6, torch.float32).t()
    weight = weight_of(16, 32)
    expected, scales = round_rows(x.contiguous())
    for rounded, found in (round_rows(x), round_and_turn(x, weight)[:2]):
        assert torch.equal(found, scales)
        assert torch.equal(rounded.view(torch.uint8), expected.view(torch.uint8))


def test_rounded_rows_in_the_order_of_the_matrix_units():
    x = inputs(5, 2048 + 48, torch.bfloat16)
    rounded, scales = round_rows(x)
    turned, same = round_rows(x, turned=True)
    assert torch.equal(scales, same)
    assert torch.equal(turned.view(torch.uint8), turn(rounded).view(torch.uint8))


@pytest.mark.parametrize("channel", [0, 66, 130])
def test_a_scale_shows_what_is_not_a_number(channel, monkeypatch):
    monkeypatch.setattr(fp8_product, "_PART_K", 64)
    x = inputs(3, 131, torch.float32)
    x[1, channel] = float("nan")
    weight = weight_of(16, 131)
    for scales in (round_rows(x)[1], round_and_turn(x, weight)[1]):
        assert scales[:, 0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("tokens", [0, 3, 70])
def test_up_to_hundreds_of_tokens_meet_the_stored_weight(tokens, monkeypatch):
    monkeypatch.setattr(triton_backend, "multiplies_fp8", lambda x, weight: True)
    monkeypatch.setattr(triton_backend, "fp8_product", None)
    if DEVICE == "cpu":
        # The interpreter loses carries where it rounds to fp8.
        monkeypatch.setattr(triton_backend, "round_rows", rounded_by_torch)
    weight = weight_of(144, 256)
    x = inputs(tokens, 256, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    out = triton_backend.dense_quantised_linear(x, weight, None)
    expected = reference.dense_quantised_linear(x.float(), weight, None)
    # The interpreter cuts bfloat16 off where a device rounds.
    assert relative_error(out, expected) < tolerance(torch.bfloat16, roundings=2)


def test_a_few_tokens_where_no_boxes_are_copied(monkeypatch):
    monkeypatch.setattr(triton_backend, "multiplies_fp8", lambda x, weight: True)
    monkeypatch.setattr(triton_backend, "copies_boxes", lambda device: False)
    weight = weight_of(48, 256)
    x = inputs(5, 256, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    out = triton_backend.dense_quantised_linear(x, weight, None)
    expected = reference.dense_linear(x.float(), weight, None)
    assert relative_error(out, expected) < tolerance(x.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [3, 64, 200, ROUNDED_TOKENS + 1])
def test_product_on_a_gpu(tokens, bias):
    weight = weight_of(256, 512)
    x = inputs(tokens, 512, torch.bfloat16)
    added = torch.randn(256, device=DEVICE, dtype=torch.bfloat16) if bias else None
    out = triton_backend.dense_quantised_linear(x, weight, added)
    expected = reference.dense_quantised_linear(x.float(), weight, added)
    assert relative_error(out, expected) < tolerance(torch.bfloat16)
    # It is another function than the one with x as it is.
    plain = reference.dense_linear(
        x.float(), weight, None if added is None else added.float()
    )
    assert relative_error(out, plain) > 2 * tolerance(torch.bfloat16)


@pytest.mark.parametrize(
    ("tokens", "shape", "dtype"),
    [
        (DENSE_TOKENS, (72, 32), torch.bfloat16),
        (DENSE_TOKENS + 1, (72, 32), torch.bfloat16),
        (DENSE_TOKENS + 1, (64, 32), torch.float32),
    ],
    ids=["few-tokens-not-aligned", "not-aligned", "float32"],
)
def test_other_calls_leave_the_input_as_it_is(tokens, shape, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        dtype = torch.float32  # the interpreter multiplies in float32
    weight = weight_of(*shape)
    x = inputs(tokens, shape[1], dtype)
    out = triton_backend.dense_quantised_linear(x, weight, None)
    expected = reference.dense_linear(x.float(), weight, None)
    assert relative_error(out, expected) < tolerance(dtype)
