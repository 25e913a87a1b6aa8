# SPDX-License-Identifier: Apache-2.0
"""``inspect``: the figures it prints are those of the artifact."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_rsparse.artifact.reads import covered
from vllm_rsparse.artifact.tensors import Artifact
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
    provenance = {
        "base_model": "somewhere/small",
        "method": {"score": "norm", "trials": {"greedy": 0.06012940432202457}},
        "files": [{"file": "a.txt", "tokens": 3}],
    }
    write_artifact(tmp_path, LINEARS, provenance=provenance)
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
    assert output.endswith(
        "base_model: somewhere/small\n"
        "method:\n  score: norm\n  trials:\n    greedy: 0.06013\n"
        'files:\n  - {"file": "a.txt", "tokens": 3}\n'
    )


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


def figures(output: str, title: str) -> dict[str, list[str]]:
    """A table of bytes: label -> its figures."""
    block = next(part for part in output.split("\n\n") if part.startswith(title))
    lines = [re.split(r"  +", line) for line in block.splitlines()]
    return {label: values for label, *values in lines}


N = 1024
MIB = 1 << 20
# Bytes of a [N, N] weight that is half read: of its channels, and of what is read
# whatever is kept; of all of it.
FORMATS = {
    "float": ({}, 2 * N * N / 2, 0, 2 * N * N),
    "fp8": ({}, N * N / 2, 4 * N, N * N + 4 * N),
    "fp8-block": ({}, (N * N + 64 * 4) / 2, 0, N * N + 64 * 4),
    # Scales of two bytes, and zero points of half a byte, in eight groups.
    "int4": ({"group": 128}, (N * N / 2 + 16 * N) / 2, 0, N * N / 2 + 16 * N),
    "int4 with zeros": (
        {"group": 128, "zeros": True},
        (N * N / 2 + 20 * N) / 2,
        0,
        N * N / 2 + 20 * N,
    ),
    "int4 per channel": ({}, N * N / 4, 2 * N, N * N / 2 + 2 * N),
}


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_per_token(
    write_artifact: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    base, columns, scales, dense = FORMATS[name]
    base = {"format": name.split()[0], "dtype": "bfloat16"} | base
    linears = {"model.layers.0.mlp.up_proj": (N, N, 64, True)}
    write_artifact(tmp_path, linears, torch.bfloat16, base=base)
    assert main(["inspect", str(tmp_path)]) == 0
    found = figures(capsys.readouterr().out, "bytes read")
    factors, vectors = 2 * 64 * 2 * N, 4 * 2 * N
    expected = {
        "kept columns": columns,
        "factors": factors,
        "thresholds and corrections": vectors,
        "sparse, in all": columns + scales + factors + vectors,
        "dense": dense,
    }
    if scales:
        expected["scales of output channels"] = scales
    del found["bytes read per token"]
    assert found == {
        label: [f"{size / MIB:.3f}", f"{size / dense:.3f}"]
        for label, size in expected.items()
    }


@pytest.mark.parametrize("known", [True, False])
def test_bytes_of_the_whole_model(
    write_artifact: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    known: bool,
) -> None:
    linears = {"model.layers.0.mlp.up_proj": (N, N, 0, False)}
    elements = {"linears": N * N, "experts": 0, "others": N * N, "head": 8 * N * N}
    provenance: dict[str, Any] = {"token_reads": elements}
    if known:
        provenance["head"] = {"shape": [8 * N, N]}
    scales = {"model.layers.0.mlp.up_proj.scales": torch.ones(N)}
    write_artifact(
        tmp_path,
        linears,
        torch.bfloat16,
        weights="fp8",
        head="fp8",
        more=scales,
        provenance=provenance,
    )
    assert main(["inspect", str(tmp_path)]) == 0
    found = figures(capsys.readouterr().out, "bytes of the whole")
    mine, others = N * N + 4 * N, 2 * N * N
    head = 8 * (N * N + 4 * N) if known else 8 * N * N
    sparse = N * N / 2 + 4 * N + 4 * N
    total = mine + others + head
    for label, read, dense in (
        ("these linears (fp8)", sparse, mine),
        ("other weights of the layers", others, others),
        ("lm_head (fp8)", head, head),
        ("in all", sparse + others + head, total),
    ):
        sizes = [f"{size / MIB:.3f}" for size in (read, dense)]
        shares = [f"{share:.3f}" for share in (read / dense, dense / total)]
        assert found[label] == [*sizes, *shares]
    assert covered(Artifact(tmp_path).info).startswith(
        f", which cover {mine / total:.0%} of"
    )


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
