# SPDX-License-Identifier: Apache-2.0
"""ServerProcess: up when the block starts, gone when it ends, whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_rsparse.testing import server as serving
from vllm_rsparse.testing.server import (
    HOST,
    ServerError,
    ServerProcess,
    free_port,
    hold_port,
)

# A server with the faults that a large one can have. `stubborn`: ignores SIGTERM.
# `orphan`: leaves a helper behind that ignores it. `never`: is never healthy.
SERVER = """
import http.server, signal, subprocess, sys, time
mode, port = sys.argv[1], int(sys.argv[-1])
print("mode is", mode, flush=True)
if mode == "exit":
    sys.exit("no such model")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "orphan":
    helper = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
              "print('helper ready', flush=True); time.sleep(600)")
    child = subprocess.Popen([sys.executable, "-c", helper], stdout=subprocess.PIPE)
    child.stdout.readline()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mode == "never" else 200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# A program that uses ServerProcess and says where it is.
DRIVER = """
import sys, time
from pathlib import Path
from vllm_rsparse.testing.server import ServerProcess, exit_on_signals
exit_on_signals()
server = ServerProcess(sys.argv[2:], Path(sys.argv[1]), stop_timeout_s=1.0)
with server:
    print("serving", server.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def server(tmp_path: Path) -> Callable[..., ServerProcess]:
    script = tmp_path / "server.py"
    script.write_text(SERVER)

    def make(mode: str, **options: float) -> ServerProcess:
        argv = [sys.executable, str(script), mode]
        return ServerProcess(argv, tmp_path / "server.log", **options)

    return make


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def group_is_empty(pgid: int) -> bool:
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return True
    return False


def test_free_port_can_be_bound() -> None:
    with socket.socket() as probe:
        probe.bind((HOST, free_port()))


def test_answers_inside_the_block_and_is_gone_after_it(server) -> None:
    with server("good") as running:
        pgid = running.pid
        with urllib.request.urlopen(f"{running.base_url}/health") as response:
            assert response.status == 200
    assert group_is_empty(pgid)
    with pytest.raises(ServerError, match="not running"):
        _ = running.pid
    running.stop()


def test_status_tells_of_a_server_that_ended(server) -> None:
    with server("good") as running:
        assert running.status is None
        os.kill(running.pid, signal.SIGKILL)
        assert wait_until(lambda: running.status == -signal.SIGKILL)


def test_can_be_started_again(server) -> None:
    process = server("good")
    for _ in range(2):
        with process:
            assert not group_is_empty(process.pid)


def test_refuses_to_start_twice_and_goes_on(server) -> None:
    with server("good") as running:
        with pytest.raises(ServerError, match="already running"):
            running.__enter__()
        assert not group_is_empty(running.pid)


def test_exit_at_start_is_reported_with_the_log(server) -> None:
    with (
        pytest.raises(ServerError, match=r"status 1 before[\s\S]*no such model"),
        server("exit", start_timeout_s=60),
    ):
        pytest.fail("the block must not run")


def test_silent_server_is_ended_after_the_time_limit(server) -> None:
    process = server("never", start_timeout_s=1.5)
    with (
        pytest.raises(ServerError, match=r"/health within 1\.5 s[\s\S]*mode is never"),
        process,
    ):
        pytest.fail("the block must not run")
    assert not wait_until(lambda: _listens(process.base_url), timeout_s=0.5)


def _listens(base_url: str) -> bool:
    host, port = base_url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_command_that_does_not_exist(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="no-such-command"),
        ServerProcess(["no-such-command"], tmp_path / "log"),
    ):
        pytest.fail("the block must not run")


def test_exception_in_the_block_ends_the_server(server) -> None:
    def fail() -> None:
        with server("good") as running:
            pgids.append(running.pid)
            raise ZeroDivisionError

    pgids: list[int] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert group_is_empty(pgids[0])


@pytest.mark.parametrize("mode", ["stubborn", "orphan"])
def test_what_ignores_sigterm_is_killed(
    server, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_GROUP_GRACE_S", 1.0)
    with server(mode, stop_timeout_s=1.0) as running:
        pgid = running.pid
    assert wait_until(lambda: group_is_empty(pgid))


@pytest.mark.parametrize("mode", ["good", "never", "stubborn"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_to_the_program_leaves_no_server(
    tmp_path: Path, mode: str, signum: signal.Signals
) -> None:
    """While it starts (never), while it serves, and again while it is being ended."""
    script, log = tmp_path / "server.py", tmp_path / "server.log"
    script.write_text(SERVER)
    program = subprocess.Popen(
        [sys.executable, "-c", DRIVER, log, sys.executable, script, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Under nohup the suite ignores SIGHUP, and so would the program.
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),
    )
    try:
        assert wait_until(lambda: log.exists() and "mode is" in log.read_text())
        if mode == "never":
            pgid = _child_of(program.pid)
        else:
            assert program.stdout is not None
            pgid = int(program.stdout.readline().split()[1])
        program.send_signal(signum)
        if mode == "stubborn":
            time.sleep(0.3)
            program.send_signal(signum)
        assert program.wait(timeout=30) in (-signum, 128 + signum)
        assert wait_until(lambda: group_is_empty(pgid))
    finally:
        program.kill()
        program.wait()


def _child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def test_a_held_port_is_nobody_elses_until_the_server_binds_it() -> None:
    with hold_port() as held:
        port = held.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((HOST, port))
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            with socket.socket() as server:
                server.setsockopt(socket.SOL_SOCKET, option, 1)
                server.bind((HOST, port))
                server.listen()
                socket.create_connection((HOST, port), timeout=5).close()
