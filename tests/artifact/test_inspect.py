# SPDX-License-Identifier: Apache-2.0
"""``inspect``: the figures it prints are those of the artifact."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_rsparse.cli import main

# name -> (N, K, rank, has bias); conftest's entries say kept fraction 0.5.
LINEARS = {
    "model.layers.0.self_attn.q_proj": (8, 16, 2, False),
    "model.layers.0.mlp.down_proj": (16, 24, 0, True),
    "model.layers.1.self_attn.q_proj": (8, 16, 0, False),
}


def rows(output: str, title: str) -> dict[str, list[str]]:
    """A table of the output: first word of each line -> the others."""
    block = next(part for part in output.split("\n\n") if part.startswith(title))
    return {line.split()[0]: line.split()[1:] for line in block.splitlines()[1:]}


def test_tables(
    write_artifact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_artifact(tmp_path, LINEARS, provenance={"base_model": "somewhere/small"})
    assert main(["inspect", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    sparsity = rows(output, "sparsity")
    assert sparsity["layer"] == ["q_proj", "down_proj"]
    # 1 - 0.5 - 2 (8 + 16) / (8 * 16) = 0.125
    assert sparsity["0"] == ["0.125", "0.500"]
    assert sparsity["1"] == ["0.500", "-"]
    assert rows(output, "rank")["0"] == ["2", "0"]
    # The entries have no relative error: no table of dashes.
    assert "relative error" not in output
    assert "base_model: somewhere/small" in output


def test_a_sparse_output_layer(
    write_artifact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = {"shape": [64, 16], "rho": 1.0, "rank": 0}
    head |= {"sparsity": 0.4, "kept_fraction": 0.625}
    more = {"lm_head.thresholds": torch.rand(16)}
    write_artifact(tmp_path, LINEARS, sparse_head=head, more=more)
    assert main(["inspect", str(tmp_path)]) == 0
    sparsity = rows(capsys.readouterr().out, "sparsity")
    assert sparsity["layer"] == ["q_proj", "down_proj", "lm_head"]
    assert sparsity["-"] == ["-", "-", "0.375"]


def test_bytes_per_token(
    write_artifact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n = 1024
    write_artifact(tmp_path, {"model.layers.0.mlp.up_proj": (n, n, 64, True)})
    assert main(["inspect", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    block = next(p for p in output.split("\n\n") if p.startswith("bytes read"))
    figures = {line[:28].strip(): line.split()[-2:] for line in block.splitlines()}
    # float32, in MiB: half of 4; 64 (1024 + 1024) 4 bytes; 2 * 1024 * 4 bytes.
    assert figures["kept columns"] == ["2.000", "0.500"]
    assert figures["factors"] == ["0.500", "0.125"]
    assert figures["thresholds and corrections"] == ["0.008", "0.002"]
    assert figures["sparse, in all"] == ["2.508", "0.627"]
    assert figures["dense"] == ["4.000", "1.000"]


def test_prepared_directory(
    write_artifact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_artifact(tmp_path / "rsparse", LINEARS)
    (tmp_path / "config.json").write_text(
        '{"quantization_config": {"quant_method": "rsparse", "artifact": "rsparse"}}'
    )
    assert main(["inspect", str(tmp_path)]) == 0
    assert "linears: 3" in capsys.readouterr().out


def test_errors(
    write_artifact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "neither a prepared directory" in capsys.readouterr().err

    (tmp_path / "config.json").write_text("{")
    assert main(["inspect", str(tmp_path)]) == 1
    assert "config.json: not valid JSON" in capsys.readouterr().err

    write_artifact(tmp_path, LINEARS)
    tensors = tmp_path / "rsparse.safetensors"
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["inspect", str(tmp_path)]) == 1
    assert "the file was changed" in capsys.readouterr().err


def test_heat_map(write_artifact: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_artifact(tmp_path, LINEARS)
    picture = tmp_path / "map.png"
    assert main(["inspect", str(tmp_path), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_heat_map_without_matplotlib(
    write_artifact: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_artifact(tmp_path, LINEARS)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    picture = tmp_path / "map.png"
    assert main(["inspect", str(tmp_path), "--plot", str(picture)]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not picture.exists()
