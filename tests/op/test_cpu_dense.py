# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel for dense products of a few tokens, and when the op takes it."""

import subprocess
import sys

import pytest
import torch
from bits import same_bits
from torch.nn.functional import linear

from vllm_rsparse.op import cpu, ops
from vllm_rsparse.op.ops import Backend

# Inputs are exact and sums are float32; the output is rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = list(TOLERANCE)

# (tokens, K, N): around passes of 16 rows and 512 columns, strips of 32 columns and
# groups of 8 tokens; narrow layers, whose K is cut into parts; wide ones.
CASES = [
    pytest.param(1, 1, 1, id="one-by-one"),
    pytest.param(3, 77, 33, id="odd"),
    pytest.param(8, 16, 512, id="one-pass"),
    pytest.param(9, 17, 513, id="pass-and-a-bit"),
    pytest.param(4, 1000, 515, id="parts-unaligned"),
    pytest.param(17, 2047, 2048, id="odd-rows-17-tokens"),
    pytest.param(64, 300, 9001, id="wide-64-tokens"),
    pytest.param(2, 640, 31, id="less-than-a-strip"),
]


def make_inputs(tokens, k, n, dtype):
    weight = (torch.randn(k, n) / k**0.5).to(dtype).t()
    return torch.randn(tokens, k).to(dtype), weight, torch.randn(n).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("tokens", "k", "n"), CASES)
def test_is_the_product(tokens, k, n, with_bias, dtype):
    x, weight, bias = make_inputs(tokens, k, n, dtype)
    bias = bias if with_bias else None
    out = cpu.dense_linear(x, weight, bias)
    right = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert out.dtype == dtype
    # Column by column too: one that is wrong must not hide behind the others.
    assert (out - right).norm() < TOLERANCE[dtype] * right.norm()
    assert ((out - right).abs() <= 8 * TOLERANCE[dtype] * (1 + right.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "n"), CASES)
def test_same_bits_for_any_number_of_threads(threads, tokens, k, n, dtype):
    inputs = make_inputs(tokens, k, n, dtype)
    threads(1)
    alone = cpu.dense_linear(*inputs)
    for count in (2, 2, 3, 5):
        threads(count)
        assert same_bits(cpu.dense_linear(*inputs), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "n"), CASES)
def test_a_token_does_not_depend_on_the_others(tokens, k, n, dtype):
    x, weight, bias = make_inputs(tokens, k, n, dtype)
    together = cpu.dense_linear(x, weight, bias)
    for m in range(tokens):
        alone = cpu.dense_linear(x[m : m + 1], weight, bias)[0]
        assert same_bits(alone, together[m])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_an_earlier_call_does_not_show(dtype):
    """Scratch memory is kept: a call of NaN must not reach the next, smaller one."""
    x, weight, bias = make_inputs(9, 300, 600, dtype)
    assert cpu.dense_linear(x * float("nan"), weight, bias).isnan().all()
    x, weight, bias = make_inputs(5, 131, 45, dtype)
    assert cpu.dense_linear(x, weight, bias).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_nan_weight_reaches_its_column_alone(dtype):
    x, weight, bias = make_inputs(5, 131, 300, dtype)
    weight[257, 130] = float("nan")
    nan = cpu.dense_linear(x, weight, bias).isnan()
    assert nan[:, 257].all()
    assert nan.sum() == 5


def test_strided_and_empty_inputs():
    x, weight, bias = make_inputs(6, 64, 40, torch.float32)
    right = cpu.dense_linear(x, weight, bias)
    wide = torch.full((6, 200), float("nan"))
    wide[:, 3:67] = x
    assert same_bits(cpu.dense_linear(wide[:, 3:67], weight, bias), right)
    assert same_bits(cpu.dense_linear(x.t().contiguous().t(), weight, bias), right)
    assert same_bits(cpu.dense_linear(x[::2], weight, bias), right[::2])
    assert cpu.dense_linear(x[:0], weight, bias).shape == (0, 40)


def test_needs_no_instructions_of_this_processor(tmp_path, monkeypatch):
    """The code for processors without AVX, and without pairs of bfloat16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = (
        "import torch; from vllm_rsparse.op import cpu, cpu_build;"
        "cpu_build._NATIVE = {};"
        "x, w = torch.randn(6, 301), torch.randn(301, 77);"
        "f = lambda t: cpu.dense_linear(x.to(t), w.to(t).t(), None).double();"
        "right = {t: x.to(t).double() @ w.to(t).double()"
        " for t in (torch.float32, torch.bfloat16)};"
        "print(*((f(t) - y).norm() / y.norm() < 4e-3 for t, y in right.items()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["tensor(True)", "tensor(True)"]


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((2, 9), torch.zeros(8, 4).t(), None, "do not fit"),
        ((2, 8), torch.zeros(8, 4).t().double(), None, "do not fit"),
        ((2, 8), torch.zeros(8, 4).t(), torch.zeros(5), "do not fit"),
        ((2, 8), torch.zeros(8, 4).t(), torch.zeros(4).half(), "do not fit"),
        ((2, 8), torch.zeros(4, 8), None, r"needs \[K, N\] storage"),
    ],
    ids=["k", "dtype", "bias-size", "bias-dtype", "storage"],
)
def test_refuses_tensors_that_do_not_fit(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        cpu.dense_linear(torch.zeros(x), weight, bias)


def test_the_op_takes_it_for_a_few_tokens_of_its_backend(monkeypatch):
    calls = []
    real = cpu.dense_linear
    monkeypatch.setattr(
        cpu, "dense_linear", lambda *args: calls.append(len(args[0])) or real(*args)
    )
    limit = cpu.MAX_DENSE_TOKENS
    for tokens in (2, 3, limit, limit + 1):
        x, weight, bias = make_inputs(tokens, 24, 16, torch.float32)
        for backend in (Backend.CPU, Backend.CPU_TORCH):
            out = ops.linear(
                x,
                weight,
                torch.full((1, 24), -1.0),
                torch.zeros(16, 0),
                torch.zeros(0, 24),
                None,
                bias,
                [16],
                [0],
                2,
                backend,
            )
            assert (out - linear(x, weight, bias)).abs().max() < 1e-5
    assert calls == [3, limit]


@pytest.mark.parametrize("tokens", [3, cpu.MAX_DENSE_TOKENS + 1])
def test_float16_where_the_processor_has_none(monkeypatch, tokens):
    """torch's product of float16 on [K, N] storage is a scalar loop there."""
    dtypes = []
    monkeypatch.setattr(ops, "_float16_is_emulated", lambda device_type: True)
    monkeypatch.setattr(
        ops, "torch_linear", lambda *args: dtypes.append(args[0].dtype) or linear(*args)
    )
    x, weight, bias = make_inputs(tokens, 77, 33, torch.float16)
    right = linear(x.double(), weight.double(), bias.double())
    for backend in (Backend.CPU, Backend.CPU_TORCH):
        out = ops.dense_linear(x, weight, bias, backend)
        assert out.dtype == torch.float16
        assert (out - right).norm() < TOLERANCE[torch.float16] * right.norm()
    calls = 1 if tokens <= cpu.MAX_DENSE_TOKENS else 2
    assert dtypes == [torch.float32] * calls
