# SPDX-License-Identifier: Apache-2.0
"""``SparseOperands``: construction from shards, the one check, the one byte model."""

from dataclasses import replace

import pytest
import torch

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.errors import RSparseError
from vllm_rsparse.formats.int4 import store_int4
from vllm_rsparse.formats.int8_planes import encode_planes
from vllm_rsparse.formats.plain import store_float
from vllm_rsparse.op import ops
from vllm_rsparse.op.backends import Backend, routes_of
from vllm_rsparse.op.operands import OperandError, SparseOperands
from vllm_rsparse.testing.cases import make_case

K = 20


def shard(n, rank, correction):
    """Tensors of one linear, all different."""
    return LinearTensors(
        thresholds=torch.rand(K),
        u=torch.randn(n, rank) if rank else None,
        v=torch.randn(rank, K) if rank else None,
        correction=torch.randn(n) if correction else None,
    )


class TestFromShards:
    def test_layout_of_three_shards(self):
        shards = [shard(6, 5, True), shard(4, 0, False), shard(3, 17, False)]
        weight = store_float(torch.randn(13, K))
        made = SparseOperands.from_shards(weight, shards, [6, 4, 3], torch.bfloat16)
        assert made.ranks == (16, 0, 32)
        assert made.u.dtype == made.v.dtype == torch.bfloat16
        # An input channel of V and a rank of U are contiguous rows.
        assert made.u.stride(0) == made.v.stride(0) == 1
        assert torch.equal(made.thresholds, torch.stack([s.thresholds for s in shards]))
        u, v = made.u.float(), made.v.float()
        first, last = shards[0], shards[2]
        assert torch.equal(u[:6, :5], first.u.bfloat16().float())
        assert torch.equal(v[:5], first.v.bfloat16().float())
        assert torch.equal(u[10:, :17], last.u.bfloat16().float())
        assert torch.equal(v[16:33], last.v.bfloat16().float())
        # The padding adds nothing.
        assert u[:6, 5:].count_nonzero() == v[5:16].count_nonzero() == 0
        assert torch.equal(made.correction[:6], first.correction)
        assert made.correction[6:].count_nonzero() == 0

    def test_no_correction_where_no_shard_has_one_or_another_rank_adds_it(self):
        weight = store_float(torch.randn(6, K))
        plain, corrected = shard(6, 0, False), shard(6, 0, True)
        build = SparseOperands.from_shards
        assert build(weight, [plain], [6], torch.float32).correction is None
        later = build(weight, [corrected], [6], torch.float32, with_correction=False)
        assert later.correction is None

    def test_schema_arguments_come_back_as_the_same_operands(self):
        case = make_case(2)
        arguments = case.operands.schema_args(case.bias)
        out = ops.linear(case.x, *arguments, 16, int(Backend.REFERENCE))
        assert torch.equal(out, case.expected())


# What the kernels would read wrongly, and what the one check says of it.
MISFITS = [
    ("x", torch.zeros(1, 76), r"x must be \[M, 77\] to fit the weight"),
    ("x", torch.zeros(1, 77, dtype=torch.int32), "x must be float32 to fit"),
    ("x", torch.zeros(1, 77, dtype=torch.bfloat16), "x must be float32 to fit"),
    ("x", torch.zeros(77), r"x must be \[M, 77\]"),
    ("bias", torch.zeros(65), r"bias must be \[66\], got \[65\]"),
    ("bias", torch.zeros(66).half(), "bias must be float32, got float16"),
    ("bias", torch.zeros(132)[::2], "bias must be contiguous"),
    ("thresholds", torch.zeros(2, 77), r"thresholds must be \[3, 77\]"),
    ("thresholds", torch.zeros(3, 77).bfloat16(), "thresholds must be float32"),
    ("thresholds", torch.zeros(77, 3).t(), "thresholds must be contiguous"),
    ("v", torch.zeros(3, 77), r"v must be \[48, 77\]"),
    ("u", torch.zeros(66, 3), r"u must be \[66, 32\]"),
    ("u", torch.zeros(66, 32).half(), "must be float16, got float32"),
    ("correction", torch.zeros(65), r"correction must be \[66\]"),
    ("thresholds", torch.zeros(3, 77, device="meta"), "thresholds must be on cpu, got"),
    ("x", torch.zeros(5, 77, device="meta"), "weight must be on meta, got cpu"),
    ("shard_sizes", [40, 17, 8], r"\[40, 17, 8\] must add up to N = 66"),
    ("ranks", [16, 32], "with one rank each"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"), MISFITS, ids=[f"{m[0]}-{m[2]}" for m in MISFITS]
)
@pytest.mark.parametrize("backend", [Backend.CPU, Backend.TRITON, Backend.CPU_TORCH])
def test_tensors_that_do_not_fit_are_named(backend, name, value, message):
    if backend is Backend.TRITON:
        pytest.importorskip("triton")
    case = make_case()
    if name in ("x", "bias"):
        case = replace(case, **{name: value})
    else:
        case = case.with_operands(**{name: value})
    with pytest.raises(OperandError, match=message):
        routes_of(backend, case.operands.weight.format).sparse(*case.args())


def test_factors_of_another_dtype_than_x():
    case = make_case()
    u, v = case.operands.u.half(), case.operands.v.half()
    with pytest.raises(OperandError, match="u and v must be float32 like x"):
        case.with_operands(u=u, v=v).through_op(Backend.CPU)


@pytest.mark.parametrize(
    "backend", [Backend.CPU, Backend.CPU_TORCH], ids=lambda b: b.label
)
def test_cpu_refuses_another_storage(backend):
    case = make_case(1, 32, [8], [0])
    with pytest.raises(RSparseError, match=r"must be stored \[K, N\]"):
        ops.linear(
            case.x,
            case.operands.weight.data.contiguous(),
            *case.operands.schema_args()[1:],
            1,
            backend,
        )
    gaps = torch.zeros(32, 9)[:, :8].t()
    with pytest.raises(OperandError, match="storage without gaps"):
        case.with_weight(gaps).through_op(backend)


class TestBytes:
    """Counted here element by element."""

    @pytest.mark.parametrize("tokens", [1, 3])
    def test_of_a_float_layer(self, tokens):
        case = make_case(tokens, 40, (24, 8), (16, 0), torch.bfloat16)
        kept = (10, 30)
        rows_of_v = 30 if tokens == 1 else 40  # of several tokens any may drop one
        weights = kept[0] * 24 + kept[1] * 8
        factors = 16 * (rows_of_v + 24)
        expected = 2 * (weights + factors) + 4 * 2 * 40 + 2 * tokens * 40
        assert case.operands.bytes_read(kept, tokens) == expected

    def test_of_int4(self):
        k, n, group = 64, 16, 32
        codes = torch.randint(0, 16, (k, n), dtype=torch.uint8)
        weight = store_int4(codes, torch.rand(k // group, n).half(), None)
        tensors = LinearTensors(torch.rand(k), None, None, None)
        made = SparseOperands.from_shards(weight, [tensors], [n], torch.bfloat16)
        everything = weight.nbytes + 4 * k + 2 * k  # thresholds and x
        assert made.bytes_read([k], 1) == everything
        assert made.bytes_read([k // 2], 1) == everything - weight.nbytes / 2

    @pytest.mark.parametrize("tokens", [1, 2])
    def test_of_planes(self, tokens):
        """Each plane by what it keeps; scales, factors and x once, with the first."""
        k, sizes, group = 64, (16, 8), 32
        weight = encode_planes(torch.randn(sum(sizes), k), group, torch.bfloat16)
        tensors = [LinearTensors(torch.rand(2, k)) for _ in sizes]
        made = SparseOperands.from_shards(weight, tensors, sizes, torch.bfloat16)
        # The first plane of both shards, then the second of both.
        kept = (40, 20, 10, 4)
        bits = sum(4 * n * c for n, c in zip((*sizes, *sizes), kept, strict=True))
        shared = sum(
            n * c / group * (16 + 4) for n, c in zip(sizes, kept[:2], strict=True)
        )
        small = 4 * 2 * 2 * k + 2 * tokens * k  # thresholds and x
        assert made.bytes_read(kept, tokens) == (bits + shared) / 8 + small

    def test_at_rest(self):
        operands = make_case(1, 40, (24, 8), (16, 0), torch.bfloat16).operands
        assert operands.artifact_nbytes == 4 * 2 * 40 + 2 * 16 * (32 + 40) + 4 * 32
