# SPDX-License-Identifier: Apache-2.0
"""Every backend that runs here against the definition, and the op's routing.

The Triton backend and the kernel of ``cpu`` have their own files, which also cover
details of theirs; what is common to all backends is here for those that run on a CPU.
"""

from dataclasses import replace

import pytest
import torch

from vllm_rsparse.op import ops
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.op.reference import kept_mask, rsparse_linear
from vllm_rsparse.testing.cases import make_case, relative_error
from vllm_rsparse.testing.tolerances import SUMS, tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [Backend.REFERENCE, Backend.CPU, Backend.CPU_TORCH]
# The output is rounded once; in cpu-torch z = V x is too.
ROUNDINGS = 2

CASES = [
    pytest.param(1, 384, [384, 128, 128], [4, 2, 2], id="qkv"),
    pytest.param(1, 384, [1024, 1024], [3, 0], id="gate_up-one-without-factors"),
    pytest.param(1, 1024, [384], [0], id="down-no-factors"),
    pytest.param(3, 77, [33], [5], id="odd"),
    pytest.param(16, 100, [12, 20, 7], [0, 3, 1], id="odd-shards-16-tokens"),
    pytest.param(2, 1, [1], [1], id="one-by-one"),
    pytest.param(5, 13, [1, 1], [0, 0], id="shards-of-one-row"),
    pytest.param(0, 64, [32, 16], [2, 1], id="no-tokens"),
]


def naive(case):
    """The formula of the paper in float64, channel by channel."""
    x, operands, bias = case.args()
    weight, u, v = operands.weight.data, operands.u, operands.v
    tokens, k = x.shape
    out = torch.zeros(tokens, weight.shape[0], dtype=torch.float64)
    for m in range(tokens):
        row = rank_row = 0
        for s, size in enumerate(operands.shard_sizes):
            rank = operands.ranks[s]
            z = torch.zeros(rank, dtype=torch.float64)
            for j in range(k):
                value = x[m, j].double()
                if abs(float(x[m, j])) > float(operands.thresholds[s, j]):
                    out[m, row : row + size] += weight[row : row + size, j] * value
                else:
                    z += v[rank_row : rank_row + rank, j].double() * value
            out[m, row : row + size] += u[row : row + size, :rank].double() @ z
            row, rank_row = row + size, rank_row + rank
    return out + operands.correction.double() + bias.double()


@pytest.mark.parametrize(
    ("tokens", "k", "sizes", "ranks"),
    [(2, 17, [5, 3], [2, 0]), (1, 9, [4], [3]), (3, 6, [2, 2, 2], [1, 1, 2])],
)
def test_reference_is_the_formula(tokens, k, sizes, ranks):
    case = make_case(tokens, k, sizes, ranks)
    assert relative_error(case.expected(), naive(case)) < SUMS


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "sizes", "ranks"), CASES)
def test_backend_matches_reference(tokens, k, sizes, ranks, dtype, backend):
    case = make_case(tokens, k, sizes, ranks, dtype)
    out = case.through_op(backend)
    assert out.shape == (tokens, sum(sizes))
    assert out.dtype == dtype
    assert relative_error(out, case.exact()) < tolerance(dtype, ROUNDINGS)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
@pytest.mark.parametrize("rows", [5, 3])
def test_factors_without_padding(backend, rows):
    """Ranks that are no multiple of 16, and a u with columns that nobody reads."""
    case = make_case(2, 40, [24, 8], [3, 2])
    u, v = case.operands.u, case.operands.v
    case = case.with_operands(
        u=u[:, :rows], v=torch.cat([v[:3], v[16:18]]), ranks=(3, 2)
    )
    out = case.through_op(backend)
    assert relative_error(out, naive(case)) < SUMS


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
@pytest.mark.parametrize("kept", [0, 1, 2, 15, 31, 32])
def test_every_count_of_kept_channels(backend, kept):
    case = make_case(1, 32, [24, 8], [3, 2])
    thresholds = case.operands.thresholds.fill_(float("inf"))
    thresholds[0, torch.randperm(32)[:kept]] = -1.0
    thresholds[1, torch.randperm(32)[: 32 - kept]] = -1.0
    assert relative_error(case.through_op(backend), naive(case)) < SUMS


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
def test_all_kept_is_the_dense_layer(backend):
    case = make_case(2, 64, [32], [4])
    case.operands.thresholds.fill_(-1.0)
    case.operands.correction.zero_()
    dense = torch.nn.functional.linear(case.x, case.operands.weight.data, case.bias)
    assert relative_error(case.through_op(backend), dense) < SUMS


def test_ties_and_zeros_are_dropped():
    x = torch.tensor([[1.0, -1.0, 0.0, -0.0, 2.0]])
    thresholds = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]])
    assert kept_mask(x, thresholds).tolist() == [[[False] * 4 + [True]]]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
def test_nan_reaches_the_output(backend):
    case = make_case(2, 32, [8], [0])
    case.x[0, 3] = float("nan")
    case.operands.thresholds.fill_(float("inf"))
    out = case.through_op(backend)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
def test_strided_tokens(backend):
    case = make_case(3, 40, [16], [2])
    wide = torch.randn(3, 100)
    wide[:, 30:70] = case.x
    strided = replace(case, x=wide[:, 30:70])
    assert relative_error(strided.through_op(backend), case.expected()) < SUMS


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
def test_without_bias_and_correction(backend):
    case = make_case(2, 32, [8], [2], constants=False)
    assert relative_error(case.through_op(backend), case.expected()) < SUMS


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_route_by_number_of_tokens(limit):
    for tokens in (1, 2, 3, 4):
        case = make_case(tokens, 64, [32], [2])
        out = case.through_op(Backend.REFERENCE, limit)
        dense = torch.nn.functional.linear(case.x, case.operands.weight.data, case.bias)
        # The dense route is the base model's very call: equal bit for bit.
        assert torch.equal(out, dense) == (tokens > limit)


def test_op_is_well_formed_for_the_compiler():
    case = make_case(2, 64, [32, 8], [2, 1])
    arguments = case.operands.schema_args(case.bias)
    torch.library.opcheck(ops.linear, (case.x, *arguments, 16, Backend.CPU))


def test_compiled_equals_eager():
    case = make_case(1, 64, [32, 8], [2, 1])
    args = (case.x, *case.operands.schema_args(case.bias), 2, int(Backend.CPU))
    compiled = torch.compile(lambda *a: ops.linear(*a) * 2, fullgraph=True)
    assert torch.equal(compiled(*args), ops.linear(*args) * 2)


def test_reference_takes_any_float_input():
    case = make_case(2)
    out = rsparse_linear(case.x.double(), case.operands, case.bias)
    assert out.dtype == torch.float64
