# SPDX-License-Identifier: Apache-2.0
"""Planes and int4 times x in bytes: rounding x, and the product of what was rounded.

Interpreted on a machine without CUDA; with CUDA the same tests run on the device.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from vllm_rsparse.formats.int8_planes import encode_planes
from vllm_rsparse.kernels.byte_linear import byte_linear
from vllm_rsparse.kernels.launch_config import LaunchConfig, Rounding
from vllm_rsparse.kernels.rounded_blocks import ByteRows, round_blocks
from vllm_rsparse.op import triton_backend
from vllm_rsparse.op.dense_defaults import BYTE_TOKENS, byte_config, takes_bytes
from vllm_rsparse.op.reference import dense_bytes_linear, round_to_bytes
from vllm_rsparse.op.reference import dense_linear as reference
from vllm_rsparse.testing.cases import Case, make_case, relative_error, same_bits
from vllm_rsparse.testing.tolerances import tolerance

from .weights import store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies in float32.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LARGEST = {1: 127, 2: 32639}


def case_of(
    tokens: int, group: int, k: int = 256, n: int = 160, *, symmetric: bool = False
) -> Case:
    """Rows of x that lie apart, and what must not be read between them."""
    encode = partial(encode_planes, group=group, dtype=DTYPE, symmetric=symmetric)
    case = make_case(tokens, k, [n], [0], DTYPE, device=DEVICE, store=encode)
    padded = torch.full((tokens, k + 44), float("inf"), device=DEVICE).to(DTYPE)
    padded[:, :k] = case.x
    return Case(padded[:, :k], case.operands, case.bias)


def numbers(rows: ByteRows) -> Tensor:
    """What the bytes stand for: float32 [M, K], channels in their own order."""
    tokens, digits, k = rows.digits.shape
    weights = torch.tensor([1.0, 256.0], device=DEVICE)[:digits, None]
    values = (rows.digits.float() * weights).sum(1)
    # [i, q, j] of the channel, stored as [q, i, j].
    values = values.view(tokens, -1, 4, 2, 2).transpose(2, 3).reshape(tokens, k)
    units = 16 * rows.units[:, :tokens, 0].t()
    return (values.unflatten(1, (-1, rows.rounding.block)) * units[..., None]).flatten(
        1
    )


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize(("k", "block"), [(64, 32), (2048 + 192, 64), (384, 128)])
def test_bytes_stand_for_what_was_rounded(k, block, digits):
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(k)).to(DEVICE)
    x[1] *= torch.logspace(-30, 30, k, device=DEVICE)
    x[2, :block] = 0
    rows = round_blocks(x, Rounding(block, digits))
    largest = x.unflatten(1, (-1, block)).abs().amax(2)
    assert relative_error(numbers(rows), round_to_bytes(x, rows.rounding)) < 1e-6
    half_units = (largest / LARGEST[digits] / 2).repeat_interleave(block, 1)
    # A unit of 22 bits; what is below 2^-100 counts as nothing.
    bound = half_units * (1 + 2.0**-20) + 2.0**-106
    assert ((numbers(rows) - x).abs() <= bound).all()
    totals = numbers(rows).unflatten(1, (-1, block)).double().sum(2) / 16
    assert torch.allclose(rows.units[:, :3, 1].t().double(), totals, rtol=1e-5)


def test_channels_that_lie_apart():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE).t()
    ours, expected = (round_blocks(one, Rounding(32, 2)) for one in (x, x.contiguous()))
    assert torch.equal(ours.digits, expected.digits)
    assert torch.equal(ours.units[:, :6], expected.units[:, :6])


# Group; x's block and digits; tokens; columns, channels, splits, warps and stages.
@pytest.mark.parametrize(
    ("group", "rounding", "tokens", "config"),
    [
        (128, (128, 2), 9, (128, 128, 1, 4, 3)),
        (128, (64, 1), 70, (128, 128, 2, 4, 2)),
        (128, (32, 2), 1, (256, 64, 3, 4, 1)),
        (64, (128, 2), 33, (256, 128, 2, 8, 3)),
        (32, (128, 1), 17, (128, 128, 8, 4, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_product(group, rounding, tokens, config, symmetric):
    case = case_of(tokens, group, symmetric=symmetric)
    launch = LaunchConfig(*config, False, packed=True)
    rounding = Rounding(*rounding)
    weight, bias = case.operands.weight, case.bias
    out = byte_linear(case.x, weight, bias, launch, rounding)
    taken = rounding._replace(block=min(rounding.block, group, config[1]))
    defined = dense_bytes_linear(case.x.float(), weight, bias, taken)
    assert relative_error(out, defined) < tolerance(DTYPE)
    # Two bytes are x itself, as far as an output in half precision shows.
    exact = reference(case.x.float(), weight, bias.float())
    loss = 4e-5 if rounding.digits == 2 else 1e-2
    assert relative_error(out, exact) < loss + tolerance(DTYPE)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("int4-g128", 128),
        ("int4-asym-g32", 256),
        ("int4-channel", 128),
        ("int4-awq", 256),
    ],
)
def test_product_of_one_plane(name, columns):
    case = make_case(19, 256, [160], [0], DTYPE, device=DEVICE, store=store(name))
    weight, bias = case.operands.weight, case.bias
    config = LaunchConfig(columns, 128, 2, 4, 3, False, packed=True)
    out = byte_linear(case.x, weight, bias, config, Rounding(128, 2))
    exact = reference(case.x.float(), weight, bias.float())
    assert relative_error(out, exact) < 4e-5 + tolerance(DTYPE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("digits", [1, 2])
def test_what_is_not_a_number_reaches_its_own_token_only(value, digits):
    case = case_of(5, 64)
    case.x[3, 200] = value
    config = LaunchConfig(128, 64, 2, 4, 2, False, packed=True)
    rounding = Rounding(64, digits)
    out = byte_linear(case.x, case.operands.weight, case.bias, config, rounding)
    assert out.isnan().all(1).tolist() == [False, False, False, True, False]
    assert out[[0, 1, 2, 4]].isfinite().all()


def test_same_bits_every_time():
    case = case_of(20, 128)
    config = LaunchConfig(128, 128, 2, 4, 3, False, packed=True)
    args = case.x, case.operands.weight, case.bias, config, Rounding(128, 2)
    first = byte_linear(*args)
    for _ in range(1 if DEVICE == "cpu" else 50):
        assert same_bits(byte_linear(*args), first)


def test_no_tokens():
    case = case_of(3, 64)
    config = LaunchConfig(128, 64, 2, 4, 2, False, packed=True)
    weight, rounding = case.operands.weight, Rounding(64, 2)
    out = byte_linear(case.x[:0], weight, case.bias, config, rounding)
    assert out.shape == (0, weight.n)


@pytest.mark.parametrize(("columns", "warps"), [(64, 4), (512, 4), (64, 2)])
def test_columns_that_no_warp_could_take(columns, warps):
    case = case_of(5, 64)
    config = LaunchConfig(columns, 64, 1, warps, 2, False, packed=True)
    with pytest.raises(ValueError, match=f"block_n is {columns} and num_warps {warps}"):
        byte_linear(case.x, case.operands.weight, None, config, Rounding(64, 2))


@pytest.mark.parametrize("tokens", [9, 32, 33, 70])
def test_dense_steps_of_a_hopper_take_it(tokens, monkeypatch):
    called: list[int] = []

    def multiply(x: Tensor, *args) -> Tensor:
        # The interpreter does not multiply bfloat16.
        called.append(x.shape[0])
        return byte_linear(x.float(), *args)

    monkeypatch.setattr(triton_backend, "has_integer_warpgroups", lambda device: True)
    monkeypatch.setattr(triton_backend, "byte_linear", multiply)
    case = case_of(tokens, 64)
    x, weight = case.x.bfloat16(), case.operands.weight
    out = triton_backend.dense_linear(x, weight, None)
    assert called == [tokens]
    exact = reference(x.float(), weight, None)
    rounding = triton_backend.dense_rounding(x, weight)
    if tokens <= 32:
        assert rounding is None
        assert relative_error(out, exact) < 4e-5 + tolerance(out.dtype)
        return
    assert rounding == Rounding(64, 1)
    defined = dense_bytes_linear(x.float(), weight, None, rounding)
    assert relative_error(out, defined) < tolerance(out.dtype)
    assert 1e-3 < relative_error(out, exact) < 1e-2


def test_others_leave_the_input_as_it_is(monkeypatch):
    weight = case_of(1, 128).operands.weight
    x = torch.zeros(16, weight.k, dtype=torch.bfloat16, device=DEVICE)
    monkeypatch.setattr(triton_backend, "has_integer_warpgroups", lambda device: True)
    takes = triton_backend.multiplies_bytes
    assert takes(x, weight)
    assert not takes(x.float(), weight)
    assert not takes(x[:2], weight)
    assert not takes(x, case_of(1, 128, n=168).operands.weight)
    for name, k, taken in (
        ("int4-g128", 256, True),
        ("int4-channel", 256, True),
        ("int4-channel", 160, False),
        ("fp8", 256, False),
    ):
        made = make_case(1, k, [160], [0], DTYPE, device=DEVICE, store=store(name))
        assert takes(x[:, :k], made.operands.weight) == taken
    monkeypatch.undo()
    if DEVICE == "cpu":
        assert not takes(x, weight)


@pytest.mark.parametrize(
    ("n", "k"), [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (24, 32)]
)
@pytest.mark.parametrize("tokens", [1, 9, 16, 32, 64, 200])
@pytest.mark.parametrize("kind", ["int4", "int8-planes"])
def test_all_programs_run_at_once(n, k, tokens, kind):
    config = byte_config(n, k, kind, tokens, 132)
    tiles = -(-n // config.block_n) * -(-tokens // 64)
    assert config.split_k == 1 or tiles * config.split_k <= 3 * 132
    assert config.split_k <= max(1, k // 128)
    assert config.block_n in (128, 256)


def test_few_tokens():
    for n, kind, tokens, taken in (
        (128256, "int8-planes", 1, True),
        (4096, "int8-planes", 2, False),
        (4096, "int8-planes", 3, True),
        (4096, "int8-planes", 33, True),
        (4096, "int8-planes", BYTE_TOKENS["int8-planes"] + 1, False),
        (28672, "int4", 8, False),
        (4096, "int4", 9, True),
        (4096, "int4", 33, False),
    ):
        assert takes_bytes(n, 4096, kind, tokens) == taken
