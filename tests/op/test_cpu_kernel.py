# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernel: its bits, its edges, and how it is built.

What it has in common with other backends is in ``test_linear_op.py``.
"""

import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.errors import BuildError
from vllm_rsparse.formats.int4 import store_int4
from vllm_rsparse.formats.plain import FLOAT, store_float
from vllm_rsparse.op import cpu, cpu_build
from vllm_rsparse.op.backends import Backend, resolve_backend
from vllm_rsparse.op.operands import SparseOperands
from vllm_rsparse.testing.cases import make_case, relative_error, same_bits
from vllm_rsparse.testing.tolerances import SUMS, tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Before a fixture poisons it: pages that nobody writes take no memory.
untouched = torch.empty

# (tokens, K, shard sizes, ranks): more than a block of channels, more bytes than one
# thread does alone, columns that fill no cache line, more shards than threads.
CASES = [
    pytest.param(1, 1000, [700, 301, 299], [16, 0, 32], id="unaligned"),
    pytest.param(1, 2048, [2048, 512, 512], [0, 0, 0], id="qkv-no-factors"),
    pytest.param(2, 700, [1025], [48], id="one-shard"),
    pytest.param(7, 513, [64] * 9, [16] * 9, id="many-shards-7-tokens"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "sizes", "ranks"), CASES)
def test_matches_the_definition(tokens, k, sizes, ranks, dtype):
    case = make_case(tokens, k, sizes, ranks, dtype)
    shards = cpu.rsparse_linear(*case.args()).split(sizes, 1)
    # Per shard: one that is wrong must not hide behind the others.
    for found, right in zip(shards, case.exact().split(sizes, 1), strict=True):
        assert relative_error(found, right) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "sizes", "ranks"), CASES)
def test_same_bits_for_any_number_of_threads(threads, tokens, k, sizes, ranks, dtype):
    case = make_case(tokens, k, sizes, ranks, dtype)
    threads(1)
    alone = cpu.rsparse_linear(*case.args())
    for count in (2, 2, 3, 5):
        threads(count)
        assert same_bits(cpu.rsparse_linear(*case.args()), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "sizes", "ranks"), CASES)
def test_a_token_does_not_depend_on_the_others(tokens, k, sizes, ranks, dtype):
    case = make_case(tokens, k, sizes, ranks, dtype)
    together = cpu.rsparse_linear(*case.args())
    for m in range(tokens):
        alone = replace(case, x=case.x[m : m + 1])
        assert same_bits(cpu.rsparse_linear(*alone.args())[0], together[m])


def all_kept(weight):
    """Output for x = 1 and a weight [N, K]: the sums of its rows."""
    n, k = weight.shape
    case = make_case(1, k, (n,), (0,), weight.dtype, constants=False)
    case.x.fill_(1)
    case.operands.thresholds.fill_(-1)
    return cpu.rsparse_linear(*case.with_weight(weight).args())[0]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_value_of_a_half_type_survives(dtype):
    """x = 1 and one channel: the output is the weight, bit for bit."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = values.view(dtype)
    out = all_kept(values[None].t())
    assert torch.equal(out.isnan(), values.isnan())
    kept = ~values.isnan()
    # The sum starts at +0, which swallows the sign of -0.
    assert same_bits(out[kept], values[kept] + 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_rounded_to_nearest_even(dtype):
    """Two channels of x = 1: the exact float32 sum, rounded as torch rounds."""
    n = 100_000
    exponents = torch.randint(-30, 17, (2, n))
    weight = (torch.randn(2, n) * 2.0**exponents).to(dtype)
    expected = (weight[0].float() + weight[1].float()).to(dtype)
    out = all_kept(weight.t())
    # Infinities of float16 may cancel; the NaN that results is not defined.
    number = ~expected.isnan()
    assert torch.equal(out.isnan(), ~number)
    # The sum starts at +0: it is never -0.
    assert same_bits(out[number], expected[number] + 0)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 255, 256, 257, 599, 600])
def test_counts_of_kept_channels_around_a_group_and_a_block(kept):
    case = make_case(1, 600, [130, 62], [16, 0])
    thresholds = case.operands.thresholds.fill_(float("inf"))
    thresholds[0, torch.randperm(600)[:kept]] = -1.0
    thresholds[1, torch.randperm(600)[: 600 - kept]] = -1.0
    assert relative_error(cpu.rsparse_linear(*case.args()), case.expected()) < SUMS


def test_dropped_channels_are_not_read():
    """NaN in every weight of a dropped channel, and in V of a kept one."""
    case = make_case(1, 600, [130, 62], [16, 16], torch.bfloat16)
    case.operands.thresholds[1] = case.operands.thresholds[0]
    kept = case.x[0].float().abs() > case.operands.thresholds[0]
    case.operands.weight.data[:, ~kept] = float("nan")
    case.operands.v[:, kept] = float("nan")
    assert cpu.rsparse_linear(*case.args()).isfinite().all()


def test_memory_of_an_earlier_call_does_not_show():
    """Scratch memory is kept: a call of NaN must not reach the next, smaller one."""
    case = make_case(3, 600, [130, 62], [16, 16])
    case.x.fill_(float("nan"))
    assert cpu.rsparse_linear(*case.args()).isnan().all()
    case = make_case(2, 300, [45, 3], [16, 0])
    assert cpu.rsparse_linear(*case.args()).isfinite().all()


def test_weight_of_more_than_2_31_elements():
    """The last row starts beyond that; the others are never touched, and not held."""
    k, n = 9000, 2**18
    small = make_case(1, k, [8], [0], torch.bfloat16, constants=False)
    small.operands.thresholds.fill_(float("inf"))
    small.operands.thresholds[0, -1] = -1.0
    weight = untouched(k, n, dtype=torch.bfloat16)
    weight[-1] = 2.0
    case = small.with_operands(
        weight=store_float(weight.t()),
        u=torch.zeros(0, n, dtype=torch.bfloat16).t(),
        shard_sizes=(n,),
    )
    assert (cpu.rsparse_linear(*case.args()) == case.x[0, -1] * 2).all()


def test_a_number_that_the_kernel_does_not_know_is_no_result(monkeypatch):
    monkeypatch.setitem(cpu._ELEMENTS, torch.float32, 7)
    case = make_case()
    for call in (
        lambda: cpu.rsparse_linear(*case.args()),
        lambda: cpu.dense_linear(case.x, case.operands.weight, case.bias),
    ):
        with pytest.raises(BuildError, match=r"does not know torch\.float32 with"):
            call()


def test_a_format_that_the_kernel_does_not_know_is_no_result(monkeypatch):
    monkeypatch.setattr(type(FLOAT), "code", 99)
    with pytest.raises(BuildError, match="of the format float"):
        cpu.rsparse_linear(*make_case().args())


# How it is built.

TINY = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """``cpu_build.load`` of a tiny source, without a memory, on an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "tiny.cpp"
    source.write_text(TINY)
    monkeypatch.setattr(cpu_build, "_SOURCES", [source])
    return cpu_build.load.__wrapped__


@pytest.fixture
def forgetful(monkeypatch):
    """A process that has not loaded the kernel yet; restored afterwards."""
    for cached in (cpu_build.load, cpu._kernels):
        cached.cache_clear()
    yield
    for cached in (cpu_build.load, cpu._kernels):
        cached.cache_clear()


def test_built_once_and_found_again(fresh, tmp_path, monkeypatch):
    assert fresh().answer() == 42
    (built,) = (tmp_path / "vllm_rsparse").iterdir()
    monkeypatch.setattr(cpu_build, "_compile", lambda *_: pytest.fail("built again"))
    assert fresh().answer() == 42
    assert [built] == list((tmp_path / "vllm_rsparse").iterdir())


def test_another_source_is_another_build(fresh, tmp_path):
    assert fresh().answer() == 42
    (tmp_path / "tiny.cpp").write_text(TINY.replace("42", "43"))
    assert fresh().answer() == 43


def test_processes_may_build_at_the_same_time(fresh, tmp_path):
    code = (
        "import pathlib, sys; from vllm_rsparse.op import cpu_build;"
        "cpu_build._SOURCES = [pathlib.Path(sys.argv[1])]; cpu_build.load()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tiny.cpp")]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list((tmp_path / "vllm_rsparse").iterdir())) == 1


def test_serves_without_a_place_for_the_cache(fresh, tmp_path):
    (tmp_path / "vllm_rsparse").write_text("a file where the directory would be")
    assert fresh().answer() == 42


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", r"'no-such-compiler' does not run .* install g\+\+"),
        ("false", "Name another compiler in CXX"),
    ],
)
def test_named_backend_says_how_to_get_a_compiler(
    forgetful, monkeypatch, compiler, message
):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BuildError, match=message):
        resolve_backend("cpu", "cpu")


def test_a_full_disk_is_told_from_a_bad_compiler(forgetful, monkeypatch, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'x.s: No space left on device' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match="Free space, or set TMPDIR") as raised:
        resolve_backend("cpu", "cpu")
    assert "Name another compiler" not in str(raised.value)


def test_auto_does_without_a_compiler_and_says_so(forgetful, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, logger="vllm_rsparse"):
        assert resolve_backend("auto", "cpu") is Backend.CPU_TORCH
    assert "cpu-torch" in caplog.text
    assert "no-such-compiler" in caplog.text


def test_a_failed_build_leaves_nothing(fresh, tmp_path):
    (tmp_path / "tiny.cpp").write_text("this is not C++")
    with pytest.raises(BuildError, match=r"tiny\.cpp.*\n.*failed"):
        fresh()
    assert list((tmp_path / "vllm_rsparse").iterdir()) == []


@pytest.mark.parametrize("group", [128, 4096])
def test_int4_loses_no_digits_to_the_mean_of_x(group):
    """Codes and zero points times the sum of x are ten times the result here."""
    codes = torch.randint(0, 16, (4096, 64), dtype=torch.uint8)
    stored = store_int4(codes, torch.rand(4096 // group, 64), None)
    x = torch.randn(1, 4096) + 1
    shard = LinearTensors(torch.full((4096,), -1.0))
    operands = SparseOperands.from_shards(stored, [shard], [64], torch.float32)
    exact = x.double() @ stored.dequantise().double().T
    error = cpu.rsparse_linear(x, operands, None).double() - exact
    # Measured 1e-7; with codes of 0 to 15, 1e-6.
    assert error.norm() < 4e-7 * exact.norm()
