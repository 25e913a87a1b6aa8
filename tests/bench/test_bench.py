# SPDX-License-Identifier: Apache-2.0
"""``vllm-rsparse bench``: layers of a model, inputs, the gate, and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_rsparse import cli
from vllm_rsparse.artifact.schema import ArtifactInfo, BaseWeights, LinearEntry
from vllm_rsparse.bench import inputs as bench_inputs
from vllm_rsparse.bench import timing
from vllm_rsparse.bench.gate import check, exact_dense
from vllm_rsparse.bench.inputs import bytes_read, kept_fractions, make_inputs
from vllm_rsparse.bench.layers import SHAPES, Layer, layers_of
from vllm_rsparse.formats.names import SERVED_FORMATS
from vllm_rsparse.op import reference

SMALL = Layer("qkv", (64, 32, 32), 96, kept=0.5, ranks=(0, 7, 0))


def info_of(layers: int = 2) -> ArtifactInfo:
    """A decoder whose layers differ in what they keep and in rank."""
    shapes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }
    linears = {
        f"model.layers.{index}.{name}": LinearEntry(
            shape, 0.5, 1.0, 4 * index, 0.4 + 0.2 * index
        )
        for index in range(layers)
        for name, shape in shapes.items()
    }
    base = BaseWeights("float", "bfloat16")
    return ArtifactInfo(0.5, linears, "bfloat16", "0" * 64, base)


def test_layers_are_fused_and_counted_as_the_engine_sees_them() -> None:
    layers = {layer.name: layer for layer in layers_of(info_of(), 1)}
    assert {n: (la.shard_sizes, la.k) for n, la in layers.items()} == {
        "qkv": ((64, 32, 32), 64),
        "o": ((64,), 64),
        "gate_up": ((128, 128), 64),
        "down": ((64,), 128),
    }
    for layer in layers.values():
        assert layer.count == 2
        assert layer.kept == pytest.approx(0.5)
        assert set(layer.ranks) == {2}


def test_a_sparse_output_layer_is_one_of_them() -> None:
    head = LinearEntry((1000, 64), 0.4, 1.0, 0, 0.625)
    info = replace(info_of(), sparse_head=head, head="fp8")
    # Padded to 1024 rows.
    assert layers_of(info, 2)[-1] == Layer("lm_head", (512,), 64, 0.625, format="fp8")


@pytest.mark.parametrize(
    ("base", "weights", "stored"),
    [
        (BaseWeights("int4", "bfloat16", 32), "as-stored", ("int4", 32)),
        (BaseWeights("int4", "bfloat16"), "as-stored", ("int4", 64)),
        (BaseWeights("float", "bfloat16"), "fp8", ("fp8", 0)),
        (BaseWeights("fp8", "bfloat16"), "int8-planes", ("int8-planes", 64)),
    ],
)
def test_layers_have_the_format_that_is_served(
    base: BaseWeights, weights: str, stored: tuple[str, int]
) -> None:
    info = replace(info_of(), base=base, weights=weights)
    layer = next(one for one in layers_of(info, 1) if one.name == "qkv")
    assert (layer.format, layer.group) == stored


def test_tensor_parallel_halves_rows_or_columns() -> None:
    layers = {layer.name: layer for layer in layers_of(info_of(), 2)}
    assert layers["qkv"].shard_sizes == (32, 16, 16)
    assert (layers["down"].n, layers["down"].k) == (64, 64)
    with pytest.raises(ValueError, match="--tensor-parallel-size 3 does not divide"):
        layers_of(info_of(), 3)


@pytest.mark.parametrize("kept", [0.0, 0.25, 1.0])
def test_inputs_keep_what_the_layer_says(kept: float) -> None:
    layer = Layer("o", (16,), 4096, kept)
    made = [make_inputs(layer, 1, torch.bfloat16, "cpu", seed) for seed in range(4)]
    # A fraction of 16384 draws: its standard deviation is at most 0.004.
    counted = kept_fractions(made)
    assert counted == pytest.approx([kept], abs=0.02)
    weights = counted[0] * layer.n * layer.k * 2
    small = 4 * layer.k + 2 * layer.k
    assert bytes_read(made, counted) == pytest.approx(weights + small)


def test_planes_are_kept_each_by_its_own_thresholds() -> None:
    layer = Layer("o", (16, 8), 4096).stored_as("int8-planes", 128)
    made = [make_inputs(layer.with_budget(0.5, 1.0), 1, torch.bfloat16, "cpu", 0)]
    counted = kept_fractions(made)
    # 4096 draws: a standard deviation below 0.008.
    assert counted == pytest.approx([0.5, 0.05], abs=0.04)
    # Four bits and, in the first plane, a scale and a zero point of 128 channels.
    first, second = (part * layer.n * layer.k / 2 for part in counted)
    first *= 1 + (16 + 4) / 128 / 4
    small = 2 * 2 * 4 * layer.k + 2 * layer.k
    assert bytes_read(made, counted) == pytest.approx(first + second + small)


@pytest.mark.parametrize("name", SERVED_FORMATS)
@pytest.mark.parametrize("group", [128, 32])
def test_random_weights_have_outputs_like_their_inputs(name: str, group: int) -> None:
    layer = Layer("o", (128, 64), 256).stored_as(name, group)
    one = make_inputs(layer, 3, torch.float32, "cpu", 0)
    assert one.operands.weight.format.name == name
    # Channels' scales up to 1.5, scales of the weight up to 1.5, codes a little off 0.
    assert 0.5 < exact_dense(one).std() < 3


@pytest.mark.parametrize(
    ("name", "group", "stored"),
    [("int4", 64, 64), ("int4", 0, 96), ("fp8", 64, 0), ("fp8-block", 64, 128)],
)
def test_groups_are_those_of_the_format(name: str, group: int, stored: int) -> None:
    layer = Layer("o", (64,), 96 if group == 0 else 128)
    assert layer.stored_as(name, group).group == stored


def test_inputs_carry_the_factors() -> None:
    one = make_inputs(SMALL, 2, torch.float32, "cpu", 0)
    assert one.operands.ranks == (0, 16, 0)
    assert one.call(reference.rsparse_linear).shape == (2, 128)


def test_inputs_of_another_budget_share_the_weight() -> None:
    layer = Layer("o", (16,), 4096, 0.25)
    one = make_inputs(layer, 1, torch.bfloat16, "cpu", 0)
    other = one.with_budget(replace(layer, kept=0.75))
    assert other.operands.weight is one.operands.weight
    assert torch.equal(other.x, one.x)
    # 4096 draws: a standard deviation below 0.008.
    assert kept_fractions([other]) == pytest.approx([0.75], abs=0.04)


def test_wrong_results_are_not_timed() -> None:
    good = torch.randn(4, 64)
    check(good, good, "op")
    with pytest.raises(RuntimeError, match="op: relative error"):
        check(good * 1.01, good, "op")
    with pytest.raises(RuntimeError, match="relative error nan"):
        check(good * float("nan"), good, "op")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few inputs and replays: what is printed is tested here, not how fast it is."""
    monkeypatch.setitem(bench_inputs.ROTATED_BYTES, "cpu", 1)
    monkeypatch.setattr("vllm_rsparse.bench.bandwidth._BYTES", 2**20)
    monkeypatch.setattr(timing.time_rounds, "__defaults__", (1,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="times on the CPU")
@pytest.mark.usefixtures("quick")
def test_command_prints_a_table_and_writes_rows(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(SHAPES, "llama-3-8b", (SMALL, Layer("o", (64,), 96)))
    output = tmp_path / "rows.json"
    command = ["bench", "--shapes", "llama-3-8b", "--tokens", "1", "3", "--rho", "0.9"]
    command += ["--sparsity", "0.5", "0.25", "--output", str(output)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "1 x qkv" in printed
    assert printed.count("all") == 4
    rows = json.loads(output.read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "rsparse", "rsparse"] * 4
    # A token keeps 0.9 of half and of three quarters of 96 channels.
    for half, most in zip(rows[1::3], rows[2::3], strict=True):
        assert 0 < half["kept"] < most["kept"] <= 1
        assert min(half["ranks"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="times on the CPU")
@pytest.mark.usefixtures("quick")
def test_a_linear_in_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.json"
    command = ["bench", "--n", "128", "64", "--k", "256", "--tokens", "1"]
    command += ["--weights", "bf16", *SERVED_FORMATS, "--output", str(output)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.count("unquantized: ") == len(SERVED_FORMATS) - 1
    assert "weights int4, groups of 128" in printed
    rows = json.loads(output.read_text())["rows"]
    assert list(dict.fromkeys(row["format"] for row in rows)) == list(SERVED_FORMATS)
    for name in SERVED_FORMATS[1:]:
        dense, wide, sparse = (row for row in rows if row["format"] == name)
        assert dense["baseline"] == "vllm-rsparse's dense route, backend cpu"
        assert "bfloat16 weights" in wide["baseline"]
        assert sparse["speedup"] == pytest.approx(dense["us"] / sparse["us"], abs=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a device to tune for")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--sparsity", "1"], r"--sparsity must lie in \[0, 1\)"),
        (["--rho", "0"], r"--rho must lie in \(0, 1\], got 0.0"),
        (["--tune"], "needs a CUDA device"),
        (["--k", "64"], "give one of: a prepared directory, --shapes, or"),
        (["--weights", "bf16", "--dtype", "float16"], "contradicts --dtype"),
        (["--output", "/none/rows.json"], "there is no folder /none"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_command_refuses(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["bench", "--shapes", "llama-3-8b", *options]) == 1
    assert re.search(f"vllm-rsparse bench: error: .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "64"], "--n and --k go together"),
        (["--n", "60", "--k", "128", "--weights", "int4"], "multiple of 8"),
        (["--n", "64", "--k", "96", "--weights", "int4"], "--group 128 does not"),
        (
            ["--n", "64", "--k", "96", "--weights", "int8-planes", "--group", "0"],
            "32, 64",
        ),
        (
            ["--n", "64", "0", "--k", "64"],
            "must be at least 1, got --n 64 0 and --k 64",
        ),
        (["DIR", "--weights", "fp8"], "--weights is for --shapes, or --n and --k: DIR"),
        (["DIR", "--rho", "1"], "--rho is for --shapes"),
        (["DIR", "--sparsity", "0.3"], "--sparsity is for --shapes"),
        (["DIR", "--group", "64"], "--group goes with --weights int4"),
        (["DIR", "-tp", "0"], "--tensor-parallel-size must be at least 1, got 0"),
        (["DIR", "--tune-seconds", "3"], "--tune-seconds goes with --tune; leave"),
        (["--n", "64", "--k", "64", "--group", "64"], "--group goes with --weights"),
        (["--n", "64", "--k", "64", "-tp", "2"], "-size goes with a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_refuses_a_linear(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("fast", "VLLM_RSPARSE_BACKEND is 'fast'; allowed are auto"),
        ("cpu-torch", "cpu-torch"),
    ],
)
def test_the_backend_that_is_asked_for_is_measured_or_refused(
    backend: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_rsparse.bench.bandwidth._BYTES", 2**20)
    monkeypatch.setenv("VLLM_RSPARSE_BACKEND", backend)
    command = ["bench", "--n", "64", "--k", "128", "--weights", "int4"]
    assert cli.main(command) == 1
    assert message in capsys.readouterr().err
