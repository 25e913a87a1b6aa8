# SPDX-License-Identifier: Apache-2.0
"""``prepare`` without calibration data: the model writes its own."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_rsparse.artifact.tensors import file_sha256
from vllm_rsparse.prepare import pipeline
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.texts import writing
from vllm_rsparse.texts.writing import TextWriter

from .runs import contents


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = replace(writing.PACES["cpu"], batch=1, answer=6, window=24)
    monkeypatch.setitem(writing.PACES, "cpu", pace)


def options(model: Path, output: Path, **changes: Any) -> PrepareOptions:
    settings: dict[str, Any] = {"samples": 4, "device": "cpu", "recipe": "wina"}
    return PrepareOptions(str(model), output, 0.5, **(settings | changes))


def test_the_text_is_kept_and_gives_the_same_artifact(
    pyllama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, given = tmp_path / "own", tmp_path / "given"
    with caplog.at_level(logging.INFO):
        info = prepare(options(pyllama, own))
    assert caplog.text.count("writes 96 tokens of calibration text itself") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    text = own / "rsparse" / "calibration.jsonl"
    calibration = info.provenance["calibration"]
    (file,) = calibration["files"]
    assert file["file"] == "rsparse/calibration.jsonl"
    assert file["sha256"] == file_sha256(text)
    assert file["documents"] == len(text.read_text("utf-8").splitlines())
    assert calibration["written"]["sampling"] == dict(writing.SAMPLING)
    assert (calibration["samples"], calibration["tokens"]) == (4, 24)
    prepare(options(pyllama, given, calibration_data=(text,), tokens=24))
    tensors = "rsparse.safetensors"
    assert contents(given)[tensors] == contents(own)[tensors]
    described = json.loads(contents(given)["rsparse.json"])["provenance"]["calibration"]
    assert described["files"] == [file | {"file": str(text)}]


def test_an_interrupted_run_does_not_write_again(
    pyllama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(options(pyllama, tmp_path / "whole"))
    original = TextWriter._write
    written: list[int] = []

    def killed(self: TextWriter, prompts: Any, seed: int, index: int) -> Any:
        if len(written) == 2:
            written.append(-1)
            raise KeyboardInterrupt
        written.append(index)
        return original(self, prompts, seed, index)

    def stopped(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TextWriter, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(options(pyllama, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert written == [0, 1, -1]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "Planner", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(options(pyllama, tmp_path / "out"))
    assert written[3:][0] == 2
    number = len(written)
    prepare(options(pyllama, tmp_path / "out"))
    assert len(written) == number
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.search").exists()


def test_another_run_writes_again(
    pyllama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stopped(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "Planner", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(options(pyllama, tmp_path / "out"))
    monkeypatch.setattr(writing, "SAMPLING", writing.SAMPLING | {"temperature": 0.5})
    with caplog.at_level(logging.WARNING):
        prepare(options(pyllama, tmp_path / "out"))
    assert "differs in the model's own text: starting again" in caplog.text
