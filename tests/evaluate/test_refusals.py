# SPDX-License-Identifier: Apache-2.0
"""What ``evaluate`` refuses, and that it says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_rsparse.cli import main


def usable(name: str, n: int, k: int) -> dict[str, Tensor]:
    """Tensors that nothing is wrong with."""
    return {"thresholds": torch.full((k,), 0.1)}


def test_a_picture_that_cannot_be_drawn_is_told_first(
    tmp_path: Path, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(held_out), "--plot", "out.docx"]
    assert main(["evaluate", str(tmp_path), *arguments]) == 1
    assert "must end in one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "4096"], "--window 4096 is more than the model's length of 2048"),
        (["--window", "2"], None),
        (["--window", "2", "--json", "/dev/full"], "--json /dev/full: cannot be writ"),
        (["--window", "1"], "leaves no sparse position"),
        (["--window", "0"], "--window must be at least 1"),
        (["--max-windows", "0"], "--max-windows must be at least 1"),
        (["--dense-fraction", "1"], "--dense-fraction must lie in [0, 1)"),
        (["--dense-fraction", "nan"], "--dense-fraction must lie in [0, 1)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_protocol(
    write_prepared: Any,
    held_out: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str | None,
) -> None:
    held_out.write_text(Path(json.__file__).read_text())
    directory = write_prepared("any", usable)
    command = ["evaluate", str(directory), "--data", str(held_out), *options]
    if "--max-windows" not in options:
        command += ["--max-windows", "1"]
    status = main(command)
    assert status == (0 if message is None else 1)
    if message is not None:
        assert message in capsys.readouterr().err


def test_bad_text(
    write_prepared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_prepared("any", usable)
    file = tmp_path / "bad.txt"
    for content, message in (
        (b"", "--data {file}: is empty"),
        (b"x = 1", "--data has 3 tokens, fewer than one window of 512"),
        (b"caf\xe9", "not UTF-8 text (byte 3)"),
        (None, "No such file"),
    ):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        assert main(["evaluate", str(directory), "--data", str(file)]) == 1
        assert message.format(file=file) in capsys.readouterr().err


def test_bad_directories(
    write_prepared: Any,
    pyllama: Path,
    tmp_path: Path,
    held_out: Path,
    edit_json: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = write_prepared("good", usable)
    other = write_prepared("other", usable)
    (other / "model.safetensors").unlink()
    weights = (pyllama / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[:-2] + b"\1\1")
    changed = write_prepared("changed", usable)
    edit_json(
        changed / "config.json",
        lambda raw: raw["quantization_config"].update(artifact_sha256="0" * 64),
    )
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "nowhere: there is no such directory; pass"),
        ([str(pyllama)], "config.json: has no quantization_config; pass a directory"),
        ([str(changed)], "config.json: quantization_config.artifact_sha256 says 0000"),
        ([str(good), "--compare", str(other)], "its weights are not those of"),
    ):
        assert main(["evaluate", *arguments, "--data", str(held_out)]) == 1
        assert message in capsys.readouterr().err


def test_artifact_of_another_model(
    write_prepared: Any,
    held_out: Path,
    edit_json: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = write_prepared("foreign", usable)
    # Same tensors, but the config describes a model with two layers fewer.
    edit_json(directory / "config.json", lambda raw: raw.update(num_hidden_layers=2))
    assert main(["evaluate", str(directory), "--data", str(held_out)]) == 1
    assert "belongs to another model" in capsys.readouterr().err


def test_chats_for_a_model_without_chat_template(
    write_prepared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    file.write_text(json.dumps(chat) + "\n")
    arguments = [str(write_prepared("any", usable)), "--data", str(file)]
    assert main(["evaluate", *arguments]) == 1
    assert f"--data {file}, line 1: has" in capsys.readouterr().err
