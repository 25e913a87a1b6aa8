# SPDX-License-Identifier: Apache-2.0
"""Every backend that runs here against the definition, and the op's routing.

The Triton backend and the kernel of ``cpu`` have their own files, which also cover
details of theirs; what is common to all backends is here for those that run on a CPU.
"""

import pytest
import torch

from vllm_rsparse.op import ops
from vllm_rsparse.op.cpu_torch import _chunk_width
from vllm_rsparse.op.ops import Backend, resolve_backend
from vllm_rsparse.op.reference import kept_mask, rsparse_linear

# RMS error relative to RMS output. float32: rounding of sums of up to 1000 terms. Half
# types: inputs are exact, the output is rounded once (2^-9 and 2^-12 relative at most),
# and z = V x is rounded once more before U.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = list(TOLERANCE)
BACKENDS = [Backend.REFERENCE, Backend.CPU, Backend.CPU_TORCH]

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


def make_inputs(tokens, k, sizes, ranks, dtype):
    n = sum(sizes)
    return {
        "x": torch.randn(tokens, k).to(dtype),
        "weight": (torch.randn(k, n) / k**0.5).to(dtype).t(),
        "thresholds": torch.rand(len(sizes), k) * 1.5,
        "u": torch.randn(max(ranks), n).to(dtype).t(),
        "v": (torch.randn(sum(ranks), k) / k**0.5).to(dtype),
        "correction": torch.randn(n),
        "bias": torch.randn(n).to(dtype),
        "shard_sizes": sizes,
        "ranks": ranks,
    }


def naive(x, weight, thresholds, u, v, correction, bias, shard_sizes, ranks):
    """The formula of the paper in float64, channel by channel."""
    tokens, k = x.shape
    out = torch.zeros(tokens, weight.shape[0], dtype=torch.float64)
    for m in range(tokens):
        row = rank_row = 0
        for s, (size, rank) in enumerate(zip(shard_sizes, ranks, strict=True)):
            z = torch.zeros(rank, dtype=torch.float64)
            for j in range(k):
                value = x[m, j].double()
                if abs(float(x[m, j])) > float(thresholds[s, j]):
                    out[m, row : row + size] += weight[row : row + size, j] * value
                else:
                    z += v[rank_row : rank_row + rank, j].double() * value
            out[m, row : row + size] += u[row : row + size, :rank].double() @ z
            row, rank_row = row + size, rank_row + rank
    return out + correction.double() + bias.double()


def rms_error(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(
    ("tokens", "k", "sizes", "ranks"),
    [(2, 17, [5, 3], [2, 0]), (1, 9, [4], [3]), (3, 6, [2, 2, 2], [1, 1, 2])],
)
def test_reference_is_the_formula(tokens, k, sizes, ranks):
    inputs = make_inputs(tokens, k, sizes, ranks, torch.float32)
    assert rms_error(rsparse_linear(**inputs), naive(**inputs)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "sizes", "ranks"), CASES)
def test_backend_matches_reference(tokens, k, sizes, ranks, dtype, backend):
    inputs = make_inputs(tokens, k, sizes, ranks, dtype)
    out = ops.linear(*inputs.values(), 16, backend)
    wide = {key: t.float() if torch.is_tensor(t) else t for key, t in inputs.items()}
    assert out.shape == (tokens, sum(sizes))
    assert out.dtype == dtype
    assert rms_error(out, rsparse_linear(**wide)) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
@pytest.mark.parametrize("kept", [0, 1, 2, 15, 31, 32])
def test_every_count_of_kept_channels(backend, kept):
    inputs = make_inputs(1, 32, [24, 8], [3, 2], torch.float32)
    inputs["thresholds"].fill_(float("inf"))
    inputs["thresholds"][0, torch.randperm(32)[:kept]] = -1.0
    inputs["thresholds"][1, torch.randperm(32)[: 32 - kept]] = -1.0
    out = ops.linear(*inputs.values(), 16, backend)
    assert rms_error(out, naive(**inputs)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
def test_all_kept_is_the_dense_layer(backend):
    inputs = make_inputs(2, 64, [32], [4], torch.float32)
    inputs["thresholds"].fill_(-1.0)
    inputs["correction"].zero_()
    dense = torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"])
    assert rms_error(ops.linear(*inputs.values(), 16, backend), dense) < 1e-5


def test_ties_and_zeros_are_dropped():
    x = torch.tensor([[1.0, -1.0, 0.0, -0.0, 2.0]])
    thresholds = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]])
    assert kept_mask(x, thresholds).tolist() == [[[False] * 4 + [True]]]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
def test_nan_reaches_the_output(backend):
    inputs = make_inputs(2, 32, [8], [0], torch.float32)
    inputs["x"][0, 3] = float("nan")
    inputs["thresholds"].fill_(float("inf"))
    out = ops.linear(*inputs.values(), 16, backend)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
def test_strided_tokens(backend):
    inputs = make_inputs(3, 40, [16], [2], torch.float32)
    wide = torch.randn(3, 100)
    wide[:, 30:70] = inputs["x"]
    expected = rsparse_linear(**inputs)
    inputs["x"] = wide[:, 30:70]
    assert rms_error(ops.linear(*inputs.values(), 16, backend), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.label)
def test_without_bias_and_correction(backend):
    inputs = make_inputs(2, 32, [8], [2], torch.float32)
    inputs["bias"] = inputs["correction"] = None
    expected = rsparse_linear(**inputs)
    assert rms_error(ops.linear(*inputs.values(), 16, backend), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS[1:], ids=lambda b: b.label)
def test_cpu_refuses_another_storage(backend):
    inputs = make_inputs(1, 32, [8], [0], torch.float32)
    inputs["weight"] = inputs["weight"].contiguous()
    with pytest.raises(ValueError, match=r"needs \[K, N\] storage"):
        ops.linear(*inputs.values(), 16, backend)


@pytest.mark.parametrize(
    "sizes", [(8192, 8192), (2048, 512, 512), (7919,), (33,), (5, 10), (1, 1)], ids=str
)
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_chunks_cover_every_shard_exactly(sizes, threads):
    width = _chunk_width(sizes, threads)
    assert all(size % width == 0 for size in sizes)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_route_by_number_of_tokens(limit):
    for tokens in (1, 2, 3, 4):
        inputs = make_inputs(tokens, 64, [32], [2], torch.float32)
        out = ops.linear(*inputs.values(), limit, Backend.REFERENCE)
        dense = torch.nn.functional.linear(
            inputs["x"], inputs["weight"], inputs["bias"]
        )
        # The dense route is the base model's very call: equal bit for bit.
        assert torch.equal(out, dense) == (tokens > limit)


def test_op_is_well_formed_for_the_compiler():
    inputs = make_inputs(2, 64, [32, 8], [2, 1], torch.float32)
    torch.library.opcheck(ops.linear, (*inputs.values(), 16, Backend.CPU))


def test_compiled_equals_eager():
    inputs = make_inputs(1, 64, [32, 8], [2, 1], torch.float32)
    args = (*inputs.values(), 2, int(Backend.CPU))
    compiled = torch.compile(lambda *a: ops.linear(*a) * 2, fullgraph=True)
    assert torch.equal(compiled(*args), ops.linear(*args) * 2)


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
