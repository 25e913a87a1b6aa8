# SPDX-License-Identifier: Apache-2.0
"""int4 and fp8 weights through the Triton backend, against their definition.

Interpreted on a machine without CUDA; with CUDA the same tests run on the device.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from vllm_rsparse.errors import RSparseError
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.kernels import packed_linear
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.kernels.scratch_linear import dequantise
from vllm_rsparse.kernels.stored_rows import codes_per_word
from vllm_rsparse.kernels.wide_linear import takes_wide
from vllm_rsparse.op import triton_backend
from vllm_rsparse.op.dense_defaults import scaled_tiles_config
from vllm_rsparse.op.reference import dense_linear as dense_reference
from vllm_rsparse.op.triton_backend import dense_linear, rsparse_linear
from vllm_rsparse.op.tuning import device_of
from vllm_rsparse.testing.cases import Case, make_case, relative_error, same_bits
from vllm_rsparse.testing.tolerances import tolerance

from .weights import WEIGHTS, store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Words of a thread, channels of a block, splits, steps in flight: each at least twice.
SHAPES = [(1, 128, 1, 1), (2, 64, 3, 4), (4, 32, 2, 2), (4, 128, 5, 1)]
# The formats that differ most: for cases in which formats have little of their own.
DIFFERENT = ["int4-asym-g32", "fp8-block", "int8-planes"]
# Operands in half precision on a device; the interpreter multiplies in float32.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def case_of(name: str, *args, dtype: torch.dtype = DTYPE, **options) -> Case:
    return make_case(*args, dtype=dtype, device=DEVICE, store=store(name), **options)


def packed(case: Case, words: int, block_k: int, split_k: int, stages: int):
    columns = 8 * words * codes_per_word(case.operands.weight)
    return LaunchConfig(columns, block_k, split_k, 1, stages, False, packed=True)


def every_pair(tokens: list[int]) -> list[tuple[str, tuple[int, ...], int]]:
    """Each weight with each shape, and each of both with each number of tokens.

    All three together would be as many cases again for each number of tokens.
    """
    return [
        (weight, shape, tokens[(i + j) % len(tokens)])
        for i, weight in enumerate(WEIGHTS)
        for j, shape in enumerate(SHAPES)
    ]


def check_shards(out: Tensor, case: Case) -> None:
    """Per shard: one that is wrong must not hide behind the others."""
    sizes = list(case.operands.shard_sizes)
    right = case.exact().split(sizes, 1)
    for one, expected in zip(out.split(sizes, 1), right, strict=True):
        assert relative_error(one, expected) < tolerance(case.x.dtype)


class TestSparse:
    @pytest.mark.parametrize(("weight", "shape", "tokens"), every_pair([1, 3]), ids=str)
    def test_fused_shards_with_factors(self, weight, shape, tokens):
        case = case_of(weight, tokens, 256, [128, 128, 40], [16, 0, 7])
        config = packed(case, *shape)
        check_shards(rsparse_linear(*case.args(), config), case)

    @pytest.mark.parametrize(
        ("weight", "tokens"),
        [*product(WEIGHTS, [0, 4, 9]), *product(DIFFERENT, [2, 5, 16])],
    )
    def test_tokens(self, weight, tokens):
        case = case_of(weight, tokens, 128, [72], [0])
        out = rsparse_linear(*case.args(), packed(case, 2, 64, 2, 2))
        assert out.shape == (tokens, 72)
        if tokens:
            check_shards(out, case)

    @pytest.mark.parametrize(
        ("weight", "kept"),
        [*product(WEIGHTS, [0, 17]), *product(DIFFERENT, [1, 16, 127, 256])],
    )
    def test_counts_of_kept_channels(self, weight, kept):
        case = case_of(weight, 1, 256, [128, 64], [16, 0])
        thresholds = case.operands.thresholds.fill_(float("inf"))
        thresholds[0, torch.randperm(256)[:kept]] = -1.0
        thresholds[1, torch.randperm(256)[: 256 - kept]] = -1.0
        out = rsparse_linear(*case.args(), packed(case, 4, 128, 2, 4))
        check_shards(out, case)

    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_ties_are_dropped_and_nan_is_kept(self, weight):
        case = case_of(weight, 2, 128, [64], [0], constants=False)
        case.operands.thresholds.fill_(1.0)
        case.x.fill_(1.0)
        config = packed(case, 2, 64, 2, 1)
        assert rsparse_linear(*case.args(), config).count_nonzero() == 0
        case.x[0, 5] = float("nan")
        out = rsparse_linear(*case.args(), config)
        assert out[0].isnan().all()
        assert out[1].count_nonzero() == 0

    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_dropped_infinity_leaves_no_trace(self, weight):
        case = case_of(weight, 2, 128, [64], [0])
        case.operands.thresholds[:, 3] = float("inf")
        expected = case.exact()
        case.x[0, 3] = float("inf")
        out = rsparse_linear(*case.args(), packed(case, 2, 64, 2, 1))
        assert relative_error(out, expected) < tolerance(case.x.dtype)

    @pytest.mark.parametrize("weight", WEIGHTS)
    def test_same_bits_every_time(self, weight):
        case = case_of(weight, 3, 256, [128, 64], [16, 0])
        config = packed(case, 4, 64, 3, 2)
        first = rsparse_linear(*case.args(), config)
        # The interpreter runs programs one after the other: there is little to repeat.
        for _ in range(1 if DEVICE == "cpu" else 50):
            assert same_bits(rsparse_linear(*case.args(), config), first)

    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.usefixtures("overflow_checked")
    def test_its_own_configuration(self, weight):
        case = case_of(weight, 1, 256, [128, 128], [0, 0])
        check_shards(rsparse_linear(*case.args()), case)


class TestDense:
    @pytest.mark.parametrize(
        ("weight", "shape", "tokens"), every_pair([1, 5, 17]), ids=str
    )
    def test_packed(self, weight, shape, tokens):
        self.check(case_of(weight, tokens, 256, [168], [0]), shape)

    @pytest.mark.parametrize(
        ("weight", "tokens"), [*product(WEIGHTS, [70]), *product(DIFFERENT, [1, 17])]
    )
    def test_tiles(self, weight, tokens):
        case = case_of(weight, tokens, 256, [168], [0])
        self.check(case, LaunchConfig(64, 32, 3, 4, 2, use_dot=True))

    @pytest.mark.parametrize(
        ("weight", "tokens", "columns", "splits", "stages"),
        [
            ("int4-g128", 17, 128, 1, 4),
            ("int4-g128", 33, 64, 3, 2),
            ("int4-asym-g32", 31, 64, 2, 4),
            ("int4-asym-g32", 63, 128, 1, 4),
            ("int4-channel", 32, 128, 2, 4),
            ("fp8", 31, 32, 1, 2),
            ("fp8", 64, 64, 3, 4),
            ("fp8", 70, 128, 2, 4),
        ],
    )
    def test_wide(self, weight, tokens, columns, splits, stages):
        case = case_of(weight, tokens, 256, [168], [0])
        # Rows that lie apart.
        padded = torch.full((tokens, 300), float("inf"), device=DEVICE).to(DTYPE)
        padded[:, :256] = case.x
        case = replace(case, x=padded[:, :256])
        config = LaunchConfig(columns, 128, splits, 1, stages, False, packed=True)
        assert takes_wide(case.x, case.operands.weight)
        self.check(case, config)

    @pytest.mark.parametrize(
        "weight", ["int4-asym-g32", "int4-channel", "fp8", "fp8-block", "int8-planes"]
    )
    @pytest.mark.parametrize(
        ("tokens", "columns", "channels", "splits"),
        [(33, 64, 128, 5), (63, 128, 128, 1), (5, 256, 64, 2)],
    )
    def test_large_tiles(self, weight, tokens, columns, channels, splits):
        case = case_of(weight, tokens, 256, [168], [0])
        self.check(case, LaunchConfig(columns, channels, splits, 4, 3, use_dot=True))

    @pytest.mark.parametrize("tokens", [32, 33])
    def test_scales_of_another_type_take_smaller_tiles(self, tokens):
        # In bfloat16 also where it is interpreted: there AWQ's scales are in float16.
        case = case_of("int4-awq", tokens, 128, [72], [0], dtype=torch.bfloat16)
        stored = case.operands.weight
        assert not takes_wide(case.x, stored)
        config = triton_backend._dense_config(case.x, stored)
        assert config == scaled_tiles_config(
            72, 128, stored.kind, device_of(case.x.device).processors
        )
        out = dense_linear(case.x, stored, case.bias)
        exact = dense_reference(case.x.float(), stored, case.bias.float())
        assert relative_error(out, exact) < tolerance(case.x.dtype, roundings=4)

    @pytest.mark.parametrize("weight", WEIGHTS)
    @pytest.mark.parametrize("tokens", [1, 16, 17, 33, 65])
    def test_its_own_way(self, tokens, weight):
        self.check(case_of(weight, tokens, 128, [72], [0]), None)

    @staticmethod
    def check(case: Case, shape) -> None:
        config = packed(case, *shape) if isinstance(shape, tuple) else shape
        weight, bias = case.operands.weight, case.bias
        out = dense_linear(case.x, weight, bias, config)
        exact = dense_reference(case.x.float(), weight, bias.float())
        # Tiles are widened to x's dtype, which rounds the weight.
        assert relative_error(out, exact) < tolerance(case.x.dtype, roundings=2)


class TestOddWeights:
    """What fp8 allows and words of 32 bits do not divide."""

    @pytest.mark.parametrize(("k", "sizes"), [(77, [36, 44]), (2, [4]), (300, [40])])
    @pytest.mark.parametrize("tokens", [1, 3, 17])
    def test_channels(self, tokens, k, sizes):
        case = case_of("fp8", tokens, k, sizes, [0] * len(sizes))
        for shape in SHAPES:
            check_shards(rsparse_linear(*case.args(), packed(case, *shape)), case)
            out = dense_linear(
                case.x, case.operands.weight, case.bias, packed(case, *shape)
            )
            exact = dense_reference(
                case.x.float(), case.operands.weight, case.bias.float()
            )
            assert relative_error(out, exact) < tolerance(case.x.dtype)

    @pytest.mark.parametrize("tokens", [1, 3, 5, 70])
    def test_columns(self, tokens):
        case = case_of("fp8", tokens, 77, [33, 5], [0, 4])
        check_shards(rsparse_linear(*case.args()), case)
        out = dense_linear(case.x, case.operands.weight, case.bias)
        exact = dense_reference(case.x.float(), case.operands.weight, case.bias.float())
        assert relative_error(out, exact) < tolerance(case.x.dtype, roundings=2)

    def test_vector_units(self):
        case = case_of("fp8", 2, 150, [40, 24], [16, 0])
        for config in (
            LaunchConfig(32, 64, 1, 2, 1, use_dot=False),
            LaunchConfig(32, 64, 3, 2, 1, use_dot=False),
            LaunchConfig(32, 16, 2, 1, 1, use_dot=False, listed=True),
            LaunchConfig(32, 32, 2, 2, 2, use_dot=True),
        ):
            check_shards(rsparse_linear(*case.args(), config), case)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_dequantise_is_the_definition(weight):
    stored = case_of(weight, 1, 256, [168], [0]).operands.weight
    wide = dequantise(stored, torch.float32).t()
    torch.testing.assert_close(wide, stored.dequantise(), rtol=1e-6, atol=0)


def weight_of_bytes() -> StoredWeight:
    """fp8 [256, 2], scales 1: column i is the byte i for either channel."""
    values = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    weight = case_of("fp8", 1, 2, [256], [0]).operands.weight
    data = values.view(torch.float8_e4m3fn).t().to(DEVICE)
    return replace(weight, data=data, scales=torch.ones(256, device=DEVICE))


WIDE = LaunchConfig(64, 128, 1, 1, 2, False, packed=True)
TILES = LaunchConfig(64, 32, 1, 4, 2, use_dot=True)


def test_every_fp8_value_survives():
    # All 256 bytes but NaN, against a single channel of x: exact in float32.
    weight = weight_of_bytes()
    case = case_of("fp8", 1, 2, [256], [0], constants=False)
    case = case.with_operands(weight=weight)
    case.operands.thresholds.fill_(-1.0)
    case.x.copy_(torch.tensor([[1.0, 0.0]]))
    values = weight.data[:, 0].float()
    finite = values.isfinite()
    assert finite.sum() == 254
    few = rsparse_linear(*case.args(), packed(case, 2, 32, 1, 1))
    x = case.x.expand(17, -1)
    assert takes_wide(x, weight)
    for out in (few, *(dense_linear(x, weight, None, how) for how in (WIDE, TILES))):
        assert torch.equal(out[-1].float()[finite], values[finite])


def test_nan_of_fp8_is_read_as_480_but_kept_by_dequantise():
    weight = weight_of_bytes()
    x = torch.tensor([[1.0, 0.0]], dtype=DTYPE, device=DEVICE).expand(17, -1)
    codes = [0x7F, 0xFF]
    for config in (WIDE, TILES):
        out = dense_linear(x, weight, None, config)
        assert out[3, codes].tolist() == [480.0, -480.0]
    # The interpreter does not know the code of NaN; the instruction that does is in
    # test_triton_packed_compile.py.
    if DEVICE == "cuda":
        assert dequantise(weight, DTYPE)[:, codes].isnan().all()


def test_long_inputs_are_split_until_the_lists_are_short(monkeypatch):
    monkeypatch.setattr(packed_linear, "MOST_LISTED", 128)
    case = case_of("int4-g64", 2, 512, [64], [0])
    check_shards(rsparse_linear(*case.args(), packed(case, 2, 64, 1, 2)), case)


def test_refuses_shards_that_share_a_word():
    case = case_of("int4-g64", 1, 128, [12, 4], [0, 0])
    with pytest.raises(RSparseError, match="multiple"):
        rsparse_linear(*case.args())


@pytest.mark.parametrize(
    "wrong", [{"use_dot": True}, {"listed": True}, {"block_k": 16}], ids=str
)
def test_refuses_configurations(wrong):
    right = LaunchConfig(128, 64, 1, 1, 1, False, packed=True)
    with pytest.raises(ValueError, match="packed"):
        replace(right, **wrong)
