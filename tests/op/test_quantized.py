# SPDX-License-Identifier: Apache-2.0
"""Quantized weights through the compiled CPU kernel, against their definition."""

from dataclasses import replace

import pytest
import torch

from vllm_rsparse.formats.base import WeightFormatError
from vllm_rsparse.formats.fp8 import store_fp8
from vllm_rsparse.formats.int4 import store_int4
from vllm_rsparse.op import cpu
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.op.reference import dense_linear
from vllm_rsparse.testing.cases import make_case, relative_error, same_bits
from vllm_rsparse.testing.tolerances import SUMS, tolerance

from .weights import WEIGHTS as KINDS
from .weights import store

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = (*KINDS, "int8-planes-sym-g32")
# (tokens, K, shard sizes, ranks): more than a block of channels, columns that fill no
# cache line, shards of one word, more bytes than one thread does alone.
CASES = [
    pytest.param(1, 1024, [896, 256, 264], [16, 0, 32], id="fused"),
    pytest.param(2, 384, [8], [0], id="one-word"),
    pytest.param(3, 640, [128, 1032], [0, 48], id="3-tokens"),
    pytest.param(7, 512, [128] * 5, [16] * 5, id="many-shards"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("tokens", "k", "sizes", "ranks"), CASES)
def test_matches_the_definition(tokens, k, sizes, ranks, weight, dtype):
    case = make_case(tokens, k, sizes, ranks, dtype, store=store(weight))
    found = case.through_op(Backend.CPU).split(sizes, 1)
    # Per shard: one that is wrong must not hide behind the others.
    for shard, right in zip(found, case.exact().split(sizes, 1), strict=True):
        assert relative_error(shard, right) < tolerance(dtype)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("tokens", "k", "sizes", "ranks"), CASES)
def test_same_bits_for_any_threads_and_company(
    threads, tokens, k, sizes, ranks, weight
):
    case = make_case(tokens, k, sizes, ranks, store=store(weight))
    threads(1)
    together = cpu.rsparse_linear(*case.args())
    for count in (2, 3, 5):
        threads(count)
        assert same_bits(cpu.rsparse_linear(*case.args()), together)
    for m in range(tokens):
        alone = replace(case, x=case.x[m : m + 1])
        assert same_bits(cpu.rsparse_linear(*alone.args())[0], together[m])


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 7, 8, 9, 127, 128, 129, 511, 512])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_counts_of_kept_channels(weight, kept):
    case = make_case(1, 512, [128, 64], [16, 0], store=store(weight))
    thresholds = case.operands.thresholds.fill_(float("inf"))
    thresholds[0, torch.randperm(512)[:kept]] = -1.0
    thresholds[1, torch.randperm(512)[: 512 - kept]] = -1.0
    out = cpu.rsparse_linear(*case.args())
    assert relative_error(out, case.expected()) < SUMS


@pytest.mark.parametrize("weight", WEIGHTS)
def test_ties_are_dropped_and_nan_is_kept(weight):
    case = make_case(2, 384, [128], [0], store=store(weight))
    case.operands.thresholds.fill_(1.0)
    case.x.fill_(1.0)
    assert (cpu.rsparse_linear(*case.args()) == case.expected()).all()
    case.x[0, 5] = float("nan")
    out = cpu.rsparse_linear(*case.args())
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("tokens", [1, 5, cpu.MAX_DENSE_TOKENS + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_steps(weight, tokens, dtype):
    case = make_case(tokens, 384, [256, 72], [4, 0], dtype, store=store(weight))
    out = case.through_op(Backend.CPU, max_sparse_tokens=0)
    bias = case.bias.float()
    exact = dense_linear(case.x.float(), case.operands.weight, bias)
    # Large steps multiply with weights that were rounded to x's dtype.
    assert relative_error(out, exact) < tolerance(dtype, roundings=2)


def test_every_fp8_value_survives():
    """x = 1 and one channel: the output is the weight, bit for bit."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    case = make_case(1, 1, [len(values)], [0], constants=False)
    stored = store_fp8(values[:, None], torch.ones(len(values)))
    case = replace(case, x=torch.ones(1, 1)).with_operands(weight=stored)
    case.operands.thresholds.fill_(-1)
    # The sum starts at +0, which swallows the sign of -0.
    assert same_bits(cpu.rsparse_linear(*case.args())[0], values.float() + 0)


@pytest.mark.parametrize("zeros", [True, False])
def test_every_int4_code_survives(zeros):
    """One channel of 32 kept: the output is (q - z) s, bit for bit."""
    codes = torch.arange(256, dtype=torch.uint8)
    q, z = codes % 16, codes // 16 if zeros else torch.full_like(codes, 8)
    scales = torch.rand(1, 256)
    weight = torch.zeros(32, 256, dtype=torch.uint8)
    weight[7] = q
    stored = store_int4(weight, scales, z[None] if zeros else None)
    case = make_case(1, 32, [256], [0], constants=False).with_operands(weight=stored)
    case.operands.thresholds.fill_(float("inf"))
    case.operands.thresholds[0, 7] = -1
    case.x[0, 7] = 1
    expected = (q.float() - z.float()) * scales[0]
    assert torch.equal(cpu.rsparse_linear(*case.args())[0], expected)


def test_scales_of_a_dropped_group_are_not_read():
    case = make_case(1, 256, [64], [0], store=store("int4-g128"))
    case.operands.thresholds[0, :128] = float("inf")
    case.operands.weight.scales[0] = float("nan")
    assert cpu.rsparse_linear(*case.args()).isfinite().all()


@pytest.mark.parametrize(
    ("weight", "sizes", "message"),
    [
        ("int4-g128", (12, 4), "each needs a multiple of 8"),
        ("fp8-block", (100, 156), "needs a multiple of 128"),
    ],
)
def test_shards_that_the_format_cannot_cut(weight, sizes, message):
    case = make_case(1, 128, [sum(sizes)], [0], store=store(weight))
    case = case.with_operands(
        shard_sizes=sizes, ranks=(0, 0), thresholds=torch.zeros(2, 128)
    )
    with pytest.raises(WeightFormatError, match=message):
        case.through_op(Backend.CPU)
