# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernel: its bits, its edges, and how it is built.

What it has in common with other backends is in ``test_linear_op.py``.
"""

import logging
import subprocess
import sys

import pytest
import torch
from bits import same_bits

from vllm_rsparse.errors import BuildError
from vllm_rsparse.op import cpu, cpu_build
from vllm_rsparse.op.ops import Backend, resolve_backend
from vllm_rsparse.op.packing import pack_factors
from vllm_rsparse.op.reference import rsparse_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# As in test_linear_op.py; z is not rounded here, which only helps.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}

# (tokens, K, shard sizes, ranks): more than a block of channels, more bytes than one
# thread does alone, columns that fill no cache line, more shards than threads.
CASES = [
    pytest.param(1, 1000, [700, 301, 299], [16, 0, 32], id="unaligned"),
    pytest.param(1, 2048, [2048, 512, 512], [0, 0, 0], id="qkv-no-factors"),
    pytest.param(2, 700, [1025], [48], id="one-shard"),
    pytest.param(7, 513, [64] * 9, [16] * 9, id="many-shards-7-tokens"),
]


def make_inputs(tokens, k, sizes, ranks, dtype, scale=1.5):
    """Tensors laid out as the engine holds them; about 45% of the channels are kept."""
    factors = [
        (torch.randn(n, r), torch.randn(r, k) / k**0.5) if r else None
        for n, r in zip(sizes, ranks, strict=True)
    ]
    u, v, ranks = pack_factors(factors, sizes, k, dtype, "cpu")
    return {
        "x": torch.randn(tokens, k).to(dtype),
        "weight": (torch.randn(k, sum(sizes)) / k**0.5).to(dtype).t(),
        "thresholds": torch.rand(len(sizes), k) * scale,
        "u": u,
        "v": v,
        "correction": torch.randn(sum(sizes)),
        "bias": torch.randn(sum(sizes)).to(dtype),
        "shard_sizes": sizes,
        "ranks": ranks,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "sizes", "ranks"), CASES)
def test_matches_the_definition(tokens, k, sizes, ranks, dtype):
    inputs = make_inputs(tokens, k, sizes, ranks, dtype)
    out = cpu.rsparse_linear(**inputs)
    wide = {key: t.float() if torch.is_tensor(t) else t for key, t in inputs.items()}
    expected = rsparse_linear(**wide)
    # Per shard: one that is wrong must not hide behind the others.
    for found, right in zip(out.split(sizes, 1), expected.split(sizes, 1), strict=True):
        assert (found - right).norm() < TOLERANCE[dtype] * right.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "sizes", "ranks"), CASES)
def test_same_bits_for_any_number_of_threads(threads, tokens, k, sizes, ranks, dtype):
    inputs = make_inputs(tokens, k, sizes, ranks, dtype)
    threads(1)
    alone = cpu.rsparse_linear(**inputs)
    for count in (2, 2, 3, 5):
        threads(count)
        assert same_bits(cpu.rsparse_linear(**inputs), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "sizes", "ranks"), CASES)
def test_a_token_does_not_depend_on_the_others(tokens, k, sizes, ranks, dtype):
    inputs = make_inputs(tokens, k, sizes, ranks, dtype)
    together = cpu.rsparse_linear(**inputs)
    x = inputs.pop("x")
    for m in range(tokens):
        assert same_bits(cpu.rsparse_linear(x[m : m + 1], **inputs)[0], together[m])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_value_of_a_half_type_survives(dtype):
    """x = 1 and one channel: the output is the weight, bit for bit."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = values.view(dtype)
    inputs = make_inputs(1, 1, [2**16], [0], dtype)
    inputs |= {"correction": None, "bias": None}
    inputs["x"].fill_(1)
    inputs["thresholds"].fill_(-1)
    inputs["weight"] = values[None].t()
    out = cpu.rsparse_linear(**inputs)[0]
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
    inputs = make_inputs(1, 2, [n], [0], dtype)
    inputs |= {"correction": None, "bias": None, "weight": weight.t()}
    inputs["x"].fill_(1)
    inputs["thresholds"].fill_(-1)
    expected = (weight[0].float() + weight[1].float()).to(dtype)
    out = cpu.rsparse_linear(**inputs)[0]
    # Infinities of float16 may cancel; which NaN comes out is nobody's business.
    number = ~expected.isnan()
    assert torch.equal(out.isnan(), ~number)
    # The sum starts at +0: it is never -0.
    assert same_bits(out[number], expected[number] + 0)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 255, 256, 257, 599, 600])
def test_counts_of_kept_channels_around_a_group_and_a_block(kept):
    inputs = make_inputs(1, 600, [130, 62], [16, 0], torch.float32)
    inputs["thresholds"].fill_(float("inf"))
    inputs["thresholds"][0, torch.randperm(600)[:kept]] = -1.0
    inputs["thresholds"][1, torch.randperm(600)[: 600 - kept]] = -1.0
    found, right = cpu.rsparse_linear(**inputs), rsparse_linear(**inputs)
    assert (found - right).norm() < 1e-5 * right.norm()


def test_dropped_channels_are_not_read():
    """NaN in every weight of a dropped channel, and in V of a kept one."""
    inputs = make_inputs(1, 600, [130, 62], [16, 16], torch.bfloat16)
    inputs["thresholds"][1] = inputs["thresholds"][0]
    kept = inputs["x"][0].float().abs() > inputs["thresholds"][0]
    inputs["weight"][:, ~kept] = float("nan")
    inputs["v"][:, kept] = float("nan")
    assert cpu.rsparse_linear(**inputs).isfinite().all()


def test_weight_of_more_than_2_31_elements():
    """The last row starts beyond that; the others are never touched, and not held."""
    k, n = 9000, 2**18
    inputs = make_inputs(1, k, [64], [0], torch.bfloat16)
    inputs["thresholds"].fill_(float("inf"))
    inputs["thresholds"][0, -1] = -1.0
    weight = torch.empty(k, n, dtype=torch.bfloat16)  # pages are not touched
    weight[-1] = 2.0
    inputs |= {
        "weight": weight.t(),
        "u": torch.zeros(0, n, dtype=torch.bfloat16).t(),
        "correction": None,
        "bias": None,
        "shard_sizes": [n],
    }
    assert (cpu.rsparse_linear(**inputs) == inputs["x"][0, -1] * 2).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 9)}, "do not fit"),
        ({"ranks": [16, 16]}, "do not fit"),
        ({"shard_sizes": [4, 5]}, "do not fit"),
        ({"thresholds": torch.zeros(1, 8)}, "do not fit"),
        ({"thresholds": torch.zeros(2, 8).double()}, "thresholds and correction be"),
        ({"x": torch.zeros(1, 8).bfloat16()}, "must share float32"),
        ({"bias": torch.zeros(8).half()}, "must share float32"),
    ],
    ids=str,
)
def test_refuses_tensors_that_do_not_fit(changes, message):
    inputs = make_inputs(1, 8, [4, 4], [16, 0], torch.float32) | changes
    with pytest.raises(ValueError, match=message):
        cpu.rsparse_linear(**inputs)


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
    with pytest.raises(BuildError, match="Make room, or set TMPDIR") as raised:
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
