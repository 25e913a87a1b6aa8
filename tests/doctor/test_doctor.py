# SPDX-License-Identifier: Apache-2.0
"""``doctor``: passes on a sound installation, and names each thing that is not."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from vllm_rsparse.artifact.tensors import TENSORS_NAME, file_sha256
from vllm_rsparse.cli import main
from vllm_rsparse.doctor import installation
from vllm_rsparse.op.backends import BACKENDS, Backend

# name -> (N, K, rank, has bias): one layer of a model with every fused group, a layer
# that must be left alone, factors in some shards, a correction in one.
SHAPES = {
    "self_attn.q_proj": (48, 32, 4, False),
    "self_attn.k_proj": (16, 32, 0, False),
    "self_attn.v_proj": (16, 32, 0, True),
    "self_attn.o_proj": (32, 48, 0, False),
    "mlp.gate_proj": (64, 32, 0, False),
    "mlp.up_proj": (64, 32, 8, False),
    "mlp.down_proj": (32, 64, 0, False),
}
LINEARS = {f"model.layers.{i}.{n}": s for i in range(2) for n, s in SHAPES.items()}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("VLLM_RSPARSE_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # doctor would set it


@pytest.fixture
def prepared(write_artifact: Any, tmp_path: Path) -> Path:
    """A prepared directory with the weights of a small random model."""
    write_artifact(tmp_path / "rsparse", LINEARS)
    digest = file_sha256(tmp_path / "rsparse" / TENSORS_NAME)
    config = {"quant_method": "rsparse", "artifact": "rsparse"}
    config["artifact_sha256"] = digest
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    weights = {f"{n}.weight": torch.randn(s[0], s[1]) for n, s in LINEARS.items()}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Any:
    """Call with arguments: exit status, and the findings as name -> line."""

    def run(*arguments: str | Path) -> tuple[int, dict[str, str]]:
        status = main(["doctor", *map(str, arguments)])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 24  # one screen
        return status, {line[5:19].strip(): line for line in lines[:-1]}

    return run


def test_sound_installation(doctor: Any) -> None:
    status, lines = doctor()
    assert status == 0
    assert all(line.startswith(("ok", "warn")) for line in lines.values())
    assert {"versions", "vllm", "plug-in", "device", "backend"} < set(lines)
    assert "equals the definition" in lines["one layer"]


def test_prepared_directory_with_its_weights(doctor: Any, prepared: Path) -> None:
    status, lines = doctor(prepared)
    assert status == 0
    assert "14 linears" in lines["artifact"]
    assert "1 file with 14 tensors; all 14 linears are there" in lines["base model"]
    assert "model.layers.0, checkpoint's weights" in lines["one layer"]


def test_settings_of_the_prepared_directory(
    doctor: Any, prepared: Path, edit_json: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_json(
        prepared / "config.json",
        lambda raw: raw["quantization_config"].update(
            backend="reference", max_sparse_tokens=3
        ),
    )
    monkeypatch.setenv("VLLM_RSPARSE_MAX_SPARSE_TOKENS", "5")
    _, lines = doctor(prepared)
    assert "reference, sparse up to 5 tokens" in lines["backend"]
    assert "backend: quantization_config.backend" in lines["backend"]
    assert "tokens: VLLM_RSPARSE_MAX_SPARSE_TOKENS" in lines["backend"]


def test_bare_artifact(doctor: Any, prepared: Path) -> None:
    status, lines = doctor(prepared / "rsparse")
    assert status == 0
    assert "random weights" in lines["one layer"]
    assert "base model" not in lines


def test_weights_in_two_planes(
    doctor: Any, write_artifact: Any, tmp_path: Path
) -> None:
    kinds = ("gate_proj", "up_proj", "down_proj")
    linears = {f"model.layers.0.mlp.{kind}": (64, 64, 0, False) for kind in kinds}
    write_artifact(tmp_path, linears, planes=2, weights="int8-planes")
    status, lines = doctor(tmp_path)
    assert status == 0
    assert "equals the definition" in lines["one layer"]


def test_changed_tensors(doctor: Any, prepared: Path) -> None:
    path = prepared / "rsparse" / TENSORS_NAME
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    status, lines = doctor(prepared)
    assert status == 1
    assert lines["artifact"].startswith("FAIL")
    assert "sha256" in lines["artifact"]
    # The fault is told once; the others cannot be checked.
    for name in ("backend", "base model", "one layer"):
        assert lines[name].startswith("skip")
        assert "reason of 'artifact'" in lines[name]


def test_infinite_factor(doctor: Any, prepared: Path, edit_json: Any) -> None:
    path = prepared / "rsparse" / TENSORS_NAME
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.u"][0, 0] = float("inf")
    save_file(tensors, path)
    digest = file_sha256(path)
    edit_json(
        prepared / "rsparse" / "rsparse.json",
        lambda raw: raw.update(tensors_sha256=digest),
    )
    status, lines = doctor(prepared / "rsparse")
    assert status == 1
    assert "model.layers.1.mlp.up_proj.u contains NaN or infinity" in lines["artifact"]


def test_weights_of_another_model(doctor: Any, prepared: Path) -> None:
    weights = load_file(prepared / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] = torch.randn(16, 64)
    save_file(weights, prepared / "model.safetensors")
    status, lines = doctor(prepared)
    assert status == 1
    assert "prepared from another model" in lines["one layer"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (torch.randn(16, 64), "down_proj [32, 64] is [16, 64] in the"),
        (None, "down_proj [32, 64] is missing in the"),
    ],
)
def test_a_linear_of_the_last_layer(
    doctor: Any, prepared: Path, change: torch.Tensor | None, words: str
) -> None:
    """The layer that is run is the first one."""
    weights = load_file(prepared / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    if change is None:
        del weights[name]
    else:
        weights[name] = change
    save_file(weights, prepared / "model.safetensors")
    status, lines = doctor(prepared)
    assert status == 1
    assert lines["base model"].startswith("FAIL")
    assert words in lines["base model"]
    assert lines["one layer"].startswith("ok")


@pytest.mark.parametrize("fault", ["gone", "short", "another"])
def test_a_file_of_the_base(doctor: Any, prepared: Path, fault: str) -> None:
    """Of two, the one that does not hold the layer that is run."""
    weights = load_file(prepared / "model.safetensors")
    (prepared / "model.safetensors").unlink()
    parts: dict[str, dict[str, torch.Tensor]] = {"a": {}, "b": {}}
    for name, weight in weights.items():
        parts["a" if ".layers.0." in name else "b"][name] = weight
    parts["b"]["model.norm.weight"] = torch.ones(32)
    where = {}
    for part, tensors in parts.items():
        save_file(tensors, prepared / f"{part}.safetensors")
        where |= dict.fromkeys(tensors, f"{part}.safetensors")
    index = json.dumps({"weight_map": where})
    (prepared / "model.safetensors.index.json").write_text(index)
    status, lines = doctor(prepared)
    assert status == 0
    assert "2 files with 15 tensors" in lines["base model"]
    path = prepared / "b.safetensors"
    if fault == "gone":
        path.unlink()
    elif fault == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        del parts["b"]["model.norm.weight"]
        save_file(parts["b"], path)
    status, lines = doctor(prepared)
    assert status == 1
    words = {
        "gone": "lists b.safetensors, which is missing",
        "short": "b.safetensors: cannot be read",
        "another": "lists model.norm.weight, which no file has (1 missing",
    }
    assert words[fault] in lines["base model"]


@pytest.mark.parametrize("fault", [2.0, float("nan")])
def test_wrong_backend(
    doctor: Any, prepared: Path, monkeypatch: pytest.MonkeyPatch, fault: float
) -> None:
    routes = BACKENDS[Backend.CPU].routes
    right = routes["float"]
    wrong = replace(right, sparse=lambda *args: right.sparse(*args) * fault)
    monkeypatch.setitem(routes, "float", wrong)
    monkeypatch.setenv("VLLM_RSPARSE_BACKEND", "cpu")
    status, lines = doctor(prepared)
    assert status == 1
    assert "cpu differs from the definition" in lines["one layer"]


def test_no_artifact(doctor: Any, tmp_path: Path) -> None:
    status, lines = doctor(tmp_path)
    assert status == 1
    assert "vllm-rsparse prepare" in lines["artifact"]


@pytest.mark.parametrize(
    ("name", "value", "status", "line", "words"),
    [
        ("VLLM_PLUGINS", "other", 1, "plug-in", "excludes it"),
        ("VLLM_RSPARSE_BACKEND", "fast", 1, "backend", "allowed are auto"),
        ("VLLM_RSPARSE_BACKEND", "fast", 1, "one layer", "reason of 'backend'"),
        ("VLLM_RSPARSE_MAX_SPARSE_TOKENS", "-1", 1, "backend", "integer >= 0"),
        ("VLLM_RSPARSE_METRICS_INTERVAL", "x", 1, "backend", "integer >= 0"),
        ("VLLM_RSPARSE_MAX_SPARSE_TOKENS", "0", 0, "backend", "served dense"),
    ],
)
def test_settings(
    doctor: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    status: int,
    line: str,
    words: str,
) -> None:
    monkeypatch.setenv(name, value)
    found, lines = doctor()
    assert found == status
    assert words in lines[line]


@pytest.mark.parametrize(
    ("found", "level", "words"),
    [
        ("0.25.1", "warn", "was written for"),
        ("0.34.0", "warn", "was written for"),
        (None, "FAIL", "pip install"),
    ],
)
def test_vllm_release(
    monkeypatch: pytest.MonkeyPatch, found: str | None, level: str, words: str
) -> None:
    real = installation.installed
    monkeypatch.setattr(
        installation, "installed", lambda name: found if name == "vllm" else real(name)
    )
    line = [finding.line() for finding in installation.versions()][-1]
    assert line.startswith(level)
    assert words in line


def test_not_installed(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "entry_points", lambda **kwargs: ())
    status, lines = doctor()
    assert status == 1
    assert "pip install" in lines["plug-in"]


def test_leaves_the_log_level_of_its_process_alone(
    doctor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers that the same process starts later would inherit it."""
    monkeypatch.delenv("VLLM_LOGGING_LEVEL")
    before = logging.getLogger("vllm").level
    doctor()
    assert "VLLM_LOGGING_LEVEL" not in os.environ
    assert logging.getLogger("vllm").level == before
