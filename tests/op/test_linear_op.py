# SPDX-License-Identifier: Apache-2.0
"""Every backend that runs here against the definition, and the op's routing.

The Triton backend and the kernel of ``cpu`` have their own files, which also cover
details of theirs; what is common to all backends is here for those that run on a CPU.
"""

import math
from dataclasses import replace

import pytest
import torch

from vllm_rsparse.errors import RSparseError
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.op import layers, ops
from vllm_rsparse.op.backends import Backend, resolve_backend, routes_of
from vllm_rsparse.op.cpu_torch import _MAX_CHUNK, _MIN_CHUNK, _chunk_width
from vllm_rsparse.op.operands import OperandError
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


@pytest.mark.parametrize("backend", BACKENDS[1:], ids=lambda b: b.label)
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


def test_a_format_that_a_backend_cannot_read_is_refused():
    with pytest.raises(RSparseError, match=r"cpu-torch cannot .* fp8; .*reference"):
        routes_of(Backend.CPU_TORCH, FP8)


@pytest.mark.parametrize(
    "sizes",
    [(8192, 8192), (2048, 512, 512), (14336, 14336), (7919,), (33,), (5, 10), (1, 1)],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_chunks_are_the_widest_that_balance(sizes, threads):
    """The promises of ``_chunk_width``, against a search over every divisor."""
    width = _chunk_width(sizes, threads)
    assert all(size % width == 0 for size in sizes)
    common = math.gcd(*sizes)
    good = [
        w
        for w in range(1, common + 1)
        if common % w == 0 and min(_MIN_CHUNK, common) <= w <= _MAX_CHUNK
    ]
    if not good:  # 7919 is prime: a shard is one chunk
        assert width == common
        return
    assert min(_MIN_CHUNK, common) <= width <= _MAX_CHUNK
    chunks = {w: sum(sizes) // w for w in good}
    busy = [w for w in good if chunks[w] >= threads]
    even = [w for w in good if chunks[w] % threads == 0]
    if even:
        assert width == max(even)
    elif busy:
        assert width == max(busy)
    else:
        assert width == min(good)


def test_chunks_of_a_known_layer():
    # gate_up of 2048 x 16384: four chunks of 4096 columns, two a thread.
    assert _chunk_width((8192, 8192), 2) == 4096
    # Three threads: no count of chunks divides by 3, and more, never fewer, are taken.
    assert 16384 // _chunk_width((8192, 8192), 3) == 4
    assert _chunk_width((2048, 512, 512), 2) == 512


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


class TestNumberedLayers:
    """Operands of a numbered layer are kept between calls, and never stale."""

    @pytest.fixture
    def layer(self):
        number = layers.next_layer()
        yield number
        layers.forget_layer(number)

    def test_values_that_change_in_place_count(self, layer):
        case = make_case(2)
        layers.set_layer(case.operands.thresholds, layer)
        before = case.through_op(Backend.CPU)
        case.operands.weight.data.mul_(2)
        assert not torch.equal(case.through_op(Backend.CPU), before)
        assert relative_error(case.through_op(Backend.CPU), case.exact()) < SUMS

    def test_other_tensors_of_the_same_number_count(self, layer):
        for seed in range(3):
            case = make_case(2, shard_sizes=(30 + seed,), ranks=(seed,), seed=seed)
            layers.set_layer(case.operands.thresholds, layer)
            for _ in range(2):
                out = case.through_op(Backend.CPU)
                assert relative_error(out, case.exact()) < SUMS

    @pytest.mark.parametrize("name", ["u", "v", "correction"])
    def test_one_other_tensor_is_noticed(self, layer, name):
        case = make_case(2)
        layers.set_layer(case.operands.thresholds, layer)
        case.through_op(Backend.CPU)
        other = case.with_operands(**{name: getattr(case.operands, name) * 2})
        out = other.through_op(Backend.CPU)
        assert relative_error(out, other.exact()) < SUMS

    def test_forgotten_tensors_are_released(self, layer):
        case = make_case()
        layers.set_layer(case.operands.thresholds, layer)
        case.through_op(Backend.CPU)
        kept = layers._operands[layer]
        assert kept.weight.data is case.operands.weight.data
        layers.forget_layer(layer)
        assert layer not in layers._operands


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", "cuda", Backend.TRITON),
        ("auto", "cpu", Backend.CPU),
        ("reference", "cpu", Backend.REFERENCE),
        ("reference", "cuda", Backend.REFERENCE),
        ("triton", "cuda", Backend.TRITON),
        ("cpu", "cpu", Backend.CPU),
        ("cpu-torch", "cpu", Backend.CPU_TORCH),
    ],
)
def test_backend_choice(name, device, expected):
    assert resolve_backend(name, device) is expected


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("cpu", "cuda", "SETTING is 'cpu', but the model runs on cuda"),
        ("cpu-torch", "cuda", "SETTING is 'cpu-torch', but the model runs on cuda"),
        ("triton", "cpu", "SETTING is 'triton', but the model runs on cpu"),
        (
            "fast",
            "cpu",
            "SETTING is 'fast'; allowed are auto, reference, cpu, triton, cpu-torch",
        ),
        ("auto", "xpu", "no kernels for device 'xpu'"),
    ],
)
def test_named_backend_runs_or_raises(monkeypatch, name, device, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        resolve_backend(name, device, "SETTING")


def test_reference_takes_any_float_input():
    case = make_case(2)
    out = rsparse_linear(case.x.double(), case.operands, case.bias)
    assert out.dtype == torch.float64
