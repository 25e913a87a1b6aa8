# SPDX-License-Identifier: Apache-2.0
"""deploy/demo.py: its parts on stand-ins, and all of it as `make demo` runs it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_rsparse.testing.server import ServerError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy/demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rsparse_demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_texts_are_disjoint_and_the_same_each_time(demo: ModuleType) -> None:
    calibration, held_out = demo.stdlib_texts()
    assert not set(calibration) & set(held_out)
    assert (calibration, held_out) == demo.stdlib_texts()
    # 16 windows of 2048 tokens for calibration, of about three bytes each.
    assert sum(path.stat().st_size for path in calibration) > 16 * 2048 * 4
    for path in (*calibration, *held_out):
        path.read_text(encoding="utf-8")


def test_texts_of_a_python_without_sources(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="0 modules"):
        demo.stdlib_texts()


def test_failing_command_is_an_error(demo: ModuleType) -> None:
    with pytest.raises(subprocess.CalledProcessError, match="vllm-rsparse evaluate"):
        demo.vllm_rsparse("evaluate", "no-such-directory", "--data", SCRIPT)


class Api(BaseHTTPRequestHandler):
    """Streams `server.tokens` tokens, `server.pause_s` apart, as vLLM does."""

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.requests.append(json.loads(self.rfile.read(length)))
        self.send_response(200)
        self.end_headers()
        for _ in range(self.server.tokens):
            self._send({"choices": [{"text": "x"}], "usage": None})
            time.sleep(self.server.pause_s)
        self._send({"choices": [], "usage": {"completion_tokens": self.server.tokens}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def api() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Api)
    server.requests, server.tokens, server.pause_s = [], 0, 0.0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_decode_time_leaves_out_the_first_token(
    demo: ModuleType, api: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TIMED_TOKENS", 5)
    api.tokens, api.pause_s = 5, 0.05
    milliseconds = demo.decode_ms(f"http://127.0.0.1:{api.server_port}", Path("m"))
    # Four pauses lie between five tokens. A busy machine can only make them longer.
    assert milliseconds >= 50
    (request,) = api.requests
    assert request["max_tokens"] == 5
    assert request["ignore_eos"] is True
    assert request["temperature"] == 0


def test_decode_time_of_a_short_reply_is_an_error(
    demo: ModuleType, api: HTTPServer
) -> None:
    api.tokens = 3
    with pytest.raises(ServerError, match="got 3"):
        demo.decode_ms(f"http://127.0.0.1:{api.server_port}", Path("m"))


@pytest.mark.serve
def test_whole_demo(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, "--output", tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["completion"].strip()
    assert summary["prompt"] + summary["completion"] in result.stdout
    # Thresholds come from other text than they are measured on.
    assert summary["achieved_sparsity"] == pytest.approx(0.5, abs=0.03)
    assert 1 < summary["perplexity_dense"] < summary["perplexity_sparse"] < 20
    assert summary["decode_ms_per_token_dense"] > 0
    assert summary["decode_ms_per_token_sparse"] > 0
    assert f"{summary['achieved_sparsity']:.3f}" in result.stdout
    assert f"{summary['perplexity_dense']:.2f}" in result.stdout
    assert f"{summary['perplexity_sparse']:.2f}" in result.stdout
    assert summary["hardware"] in result.stdout
    assert summary["versions"]["vllm"] in result.stdout


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
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("demo", {str(SCRIPT)!r})
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)
demo.exit_on_signals()
argv = [str(demo.BIN / "vllm"), "serve", str(demo.MODEL), *demo.SERVE_FLAGS]
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
    """The process group of the parent's child, once it has so many processes."""
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
    def run(output: Path, sparsity: float) -> None:
        raise ServerError("exited with status 1; last words")

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "exit_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path)])
    assert demo.main() == 1
    assert "last words" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
