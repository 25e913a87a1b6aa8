# SPDX-License-Identifier: Apache-2.0
"""``bench --tune``: candidates, what is compiled in time, and the table."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from vllm_rsparse import cli, envs
from vllm_rsparse.bench import inputs as bench_inputs
from vllm_rsparse.bench import timing, tuner
from vllm_rsparse.bench.candidates import candidates, dense_candidates, kind_of_layer
from vllm_rsparse.bench.layers import SHAPES, Layer
from vllm_rsparse.formats.names import SERVED_FORMATS
from vllm_rsparse.op import tables, tuning
from vllm_rsparse.op.dense_defaults import dense_config
from vllm_rsparse.op.sparse_defaults import sparse_default
from vllm_rsparse.op.tables import SPARSE, Problem


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("name", SERVED_FORMATS)
@pytest.mark.parametrize("layer", SHAPES["qwen3-32b"], ids=lambda layer: layer.name)
def test_candidates_are_distinct_and_fit(layer: Layer, name: str, tokens: int) -> None:
    layer = layer.stored_as(name, 128)
    configs = candidates(layer, tokens, processors=132)
    assert len(set(configs)) == len(configs) > 4
    kind = kind_of_layer(layer)
    assert configs[0] == sparse_default(layer.n, layer.k, kind, tokens, 132)
    if name in ("float", "fp8"):
        others = [config for config in configs if not config.packed]
        assert all(config.use_dot == (tokens > 2) for config in others)
        assert len(others) > 4
    else:
        assert all(config.packed for config in configs)
    assert (len({config.packed for config in configs}) == 2) == (name == "fp8")


@pytest.mark.parametrize("tokens", [1, 8, 32, 64])
@pytest.mark.parametrize("name", SERVED_FORMATS)
def test_candidates_of_the_dense_route(name: str, tokens: int) -> None:
    for layer in (one.stored_as(name, 128) for one in SHAPES["qwen3-32b"]):
        configs = dense_candidates(layer, tokens, processors=132)
        if name == "float":
            assert configs == []
            continue
        kind = kind_of_layer(layer)
        assert configs[0] == dense_config(layer.n, layer.k, kind, tokens, 132)
        assert len(set(configs)) == len(configs) > 4
        assert all(config.packed != config.use_dot for config in configs)
        most = 32 if name == "int4" else 16
        packed = [config.num_warps for config in configs if config.packed]
        assert (1 in packed) == (tokens <= most)
        # The kernels of warpgroups.
        assert (4 in packed) == (tokens > 1)
        assert any(config.use_dot for config in configs) == (tokens > 1)


def test_what_is_not_compiled_in_time_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = Layer("o", (4096,), 4096).stored_as("int4", 128)
    jobs = [
        tuner._Job(layer, count, SPARSE, candidates(layer, count, 132))
        for count in (1, 2)
    ]
    broken = jobs[0].configs[1]

    def compiled(layer, tokens, route, config, dtype) -> str:
        if len(started) > 5:
            time.sleep(0.2)
        started.append((tokens, config))
        return "does not fit" if config == broken else ""

    started: list = []
    monkeypatch.setattr(tuner, "_compile", compiled)
    monkeypatch.setattr(
        tuner, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1)
    )
    tuner._compile_all(jobs, torch.bfloat16, time.monotonic() + 0.3)
    assert "left out: does not fit" in capsys.readouterr().err
    for job in jobs:
        assert job.configs[0] == job.default
        assert broken not in job.configs
        assert 1 < len(job.configs) < job.total - 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets, on the CPU")
def test_a_table_is_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench_inputs.ROTATED_BYTES, "cpu", 1)
    monkeypatch.setattr("vllm_rsparse.bench.bandwidth._BYTES", 2**20)
    monkeypatch.setattr(timing.time_rounds, "__defaults__", (1,))
    monkeypatch.setattr(timing.time_calls, "__defaults__", (1, 1))
    monkeypatch.setattr(tuner, "_LEAST_SECONDS", 0.0)
    monkeypatch.setenv(envs.TUNING_DIR, "")
    folder = tmp_path / "tables"
    command = ["bench", "--n", "64", "--k", "64", "--weights", "int4", "--group", "32"]
    command += ["--tokens", "1", "--tune", "--tune-seconds", "0"]
    command += ["--tune-routes", "sparse", "dense"]
    assert cli.main([*command, "--output", str(folder)]) == 0
    error = capsys.readouterr().err
    assert "1 of" in error
    assert f"{envs.TUNING_DIR}={folder}" in error
    assert json.loads((folder / "bench.json").read_text())["rows"]
    dense, sparse = tables.read_table(folder / "interpreter.json")
    assert [dense.route, sparse.route] == ["dense", "sparse"]
    assert dense.problem == sparse.problem == Problem(64, 64, "int4", 32)
    device = tuning.device_of(torch.device("cpu"))
    assert tuning.launch_config(device, sparse.problem, 1) == sparse.config
    assert tuning.dense_launch_config(device, dense.problem, 1) == dense.config
    tuning.forget_tables()
