# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel for dense products of a few tokens, and when the op takes it."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from vllm_rsparse.errors import RSparseError
from vllm_rsparse.formats.plain import store_float
from vllm_rsparse.op import backends, cpu
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.testing.cases import make_case, relative_error, same_bits
from vllm_rsparse.testing.tolerances import tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
linear = functional.linear

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
    case = make_case(tokens, k, (n,), (0,), dtype)
    return case.x, case.operands.weight, case.bias


def exact(x, weight, bias):
    bias = None if bias is None else bias.double()
    return linear(x.double(), weight.data.double(), bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("tokens", "k", "n"), CASES)
def test_is_the_product(tokens, k, n, with_bias, dtype):
    x, weight, bias = make_inputs(tokens, k, n, dtype)
    bias = bias if with_bias else None
    out = cpu.dense_linear(x, weight, bias)
    right = exact(x, weight, bias)
    assert out.dtype == dtype
    # The output is rounded once. Column by column too: one that is wrong must not hide
    # behind the others.
    assert relative_error(out, right) < tolerance(dtype)
    assert ((out - right).abs() <= 8 * tolerance(dtype) * (1 + right.abs())).all()


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
    weight.data[257, 130] = float("nan")
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
        "from vllm_rsparse.formats.plain import store_float;"
        "f = lambda t: cpu.dense_linear("
        "x.to(t), store_float(w.to(t).t()), None).double();"
        "right = {t: x.to(t).double() @ w.to(t).double()"
        " for t in (torch.float32, torch.bfloat16)};"
        "print(*((f(t) - y).norm() / y.norm() < 4e-3 for t, y in right.items()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["tensor(True)", "tensor(True)"]


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 9), None, r"x must be \[M, 8\]"),
        (torch.zeros(2, 8).double(), None, "x must be float32"),
        (torch.zeros(2, 8), torch.zeros(5), r"bias must be \[4\], got \[5\]"),
        (torch.zeros(2, 8), torch.zeros(4).half(), "bias must be float32"),
    ],
    ids=["k", "dtype", "bias-size", "bias-dtype"],
)
def test_refuses_tensors_that_do_not_fit(x, bias, message):
    with pytest.raises(RSparseError, match=message):
        cpu.dense_linear(x, store_float(torch.zeros(8, 4).t()), bias)


def test_refuses_rows_with_gaps():
    with pytest.raises(RSparseError, match="storage without gaps"):
        cpu.dense_linear(
            torch.zeros(2, 8), store_float(torch.zeros(8, 5)[:, :4].t()), None
        )


def test_the_op_takes_it_for_a_few_tokens_of_its_backend(monkeypatch):
    calls = []
    real = cpu.dense_linear
    monkeypatch.setattr(
        cpu, "dense_linear", lambda *args: calls.append(len(args[0])) or real(*args)
    )
    limit = cpu.MAX_DENSE_TOKENS
    for tokens in (2, 3, limit, limit + 1):
        case = make_case(tokens, 24, (16,), (0,), constants=False)
        case.operands.thresholds.fill_(-1.0)
        for backend in (Backend.CPU, Backend.CPU_TORCH):
            out = case.through_op(backend, max_sparse_tokens=2)
            right = exact(case.x, case.operands.weight, None)
            assert relative_error(out, right) < tolerance(torch.float32)
    assert calls == [3, limit]


@pytest.mark.parametrize("tokens", [3, cpu.MAX_DENSE_TOKENS + 1])
def test_float16_where_the_processor_has_none(monkeypatch, tokens):
    """torch's product of float16 on [K, N] storage is a scalar loop there."""
    dtypes = []
    monkeypatch.setattr(backends, "_float16_is_emulated", lambda device_type: True)
    monkeypatch.setattr(
        functional,
        "linear",
        lambda *args: dtypes.append(args[0].dtype) or linear(*args),
    )
    x, weight, bias = make_inputs(tokens, 77, 33, torch.float16)
    right = exact(x, weight, bias)
    dtypes.clear()
    for backend in (Backend.CPU, Backend.CPU_TORCH):
        out = backends.routes_of(backend, weight.format).dense(x, weight, bias)
        assert out.dtype == torch.float16
        assert relative_error(out, right) < tolerance(torch.float16)
    calls = 1 if tokens <= cpu.MAX_DENSE_TOKENS else 2
    assert dtypes == [torch.float32] * calls
