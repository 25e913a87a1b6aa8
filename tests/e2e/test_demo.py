# SPDX-License-Identifier: Apache-2.0
"""deploy/demo.py as `make demo` runs it, and interrupted with vLLM running."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.serve

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy/demo.py"
MODEL = ROOT / "tests/assets/pyllama-8m"


def test_whole_demo_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pip finds nothing.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
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
