# SPDX-License-Identifier: Apache-2.0
"""An HTTP server as a child process that never outlives its ``with`` block."""

import atexit
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

HOST = "127.0.0.1"
_LOG_TAIL_LINES = 40
# Once the server itself is gone its helpers (vLLM's resource trackers) need a moment.
_GROUP_GRACE_S = 5.0

# A proxy from the environment must not be used for the loopback interface.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server exited or did not answer; ends with the last lines of its log."""


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def hold_port() -> socket.socket:
    """A socket that keeps a free port from everyone who looks for one.

    It does not listen, and a server that sets SO_REUSEADDR or SO_REUSEPORT, as vLLM and
    Python's own do, can bind the port next to it: between the choice of a port and the
    server's start, seconds later, no other program takes it.
    """
    held = socket.socket()
    try:
        held.bind((HOST, 0))
        # After the choice: before it, the kernel could choose a port that is held.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except BaseException:
        held.close()
        raise
    return held


class ServerProcess:
    """A server that is up when the ``with`` block starts and gone when it ends.

    The child leads its own session, so Ctrl-C in the terminal reaches only this
    process, which then ends the whole group: SIGTERM first, SIGKILL after
    ``stop_timeout_s``. SIGTERM and SIGHUP end Python without unwinding ``with`` blocks:
    a program that must also clean up then calls :func:`exit_on_signals`, which turns
    them into exceptions.

    Args:
        argv: the command; ``--host`` and ``--port`` are appended.
        log_path: file that takes the server's output, overwritten.
        env: environment variables on top of this process's own.
        start_timeout_s: seconds until ``GET /health`` must have answered 200.
        stop_timeout_s: seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        argv: Sequence[str],
        log_path: Path,
        *,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 600.0,
        stop_timeout_s: float = 30.0,
    ) -> None:
        self._port = hold_port()
        port = self._port.getsockname()[1]
        self.argv = [*argv, "--host", HOST, "--port", str(port)]
        self.base_url = f"http://{HOST}:{port}"
        self.log_path = log_path
        self._env = {**os.environ, **(env or {})}
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the server, and id of its process group.

        Raises:
            ServerError: it is not running.
        """
        if self._process is None:
            raise ServerError(f"{self.argv[0]} is not running")
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status of a server that ended inside the block; None while it runs."""
        return None if self._process is None else self._process.poll()

    def __enter__(self) -> Self:
        """Start the server and wait for its health check.

        Raises:
            ServerError: it exited, did not answer in time, or is already running.
            OSError: the command or the log file cannot be opened.
        """
        if self._process is not None:
            raise ServerError(f"{self.argv[0]} is already running (pid {self.pid})")
        try:
            self._wait_until_healthy(self._start())
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and its whole process group; safe to call twice."""
        with _deferred_signals():
            process, self._process = self._process, None
            if process is None:
                return
            atexit.unregister(self.stop)
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._stop_timeout_s)
                if _wait_for_empty_group(process.pid, _GROUP_GRACE_S):
                    return
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
            _wait_for_empty_group(process.pid, _GROUP_GRACE_S)

    def log_tail(self) -> str:
        """The last lines that the server wrote."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def _start(self) -> subprocess.Popen[bytes]:
        # If interrupted between fork and assignment, the child would be orphaned.
        with _deferred_signals(), self.log_path.open("wb") as log:
            process = self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
            # For a signal that arrives before the caller's `with` block is entered.
            atexit.register(self.stop)
        return process

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            status = process.poll()
            if status is not None:
                raise self._error(f"exited with status {status} before it was ready")
            with (
                contextlib.suppress(OSError, http.client.HTTPException),
                _opener.open(f"{self.base_url}/health", timeout=5),
            ):
                return
            if time.monotonic() > deadline:
                raise self._error(
                    f"did not answer /health within {self._start_timeout_s:g} s"
                )
            time.sleep(0.2)

    def _error(self, what: str) -> ServerError:
        return ServerError(
            f"{' '.join(self.argv)}\n{what}. The end of {self.log_path}:\n"
            f"{self.log_tail()}"
        )


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit, as SIGINT raises KeyboardInterrupt."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signum, leave)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[None]:
    """Defer signals that would interrupt the block, and deliver them afterwards.

    Blocking the signals instead would let the child inherit the mask.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only.
        return
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    previous = [(signum, signal.signal(signum, note)) for signum in signals]
    try:
        yield
    finally:
        for held, handler in previous:
            signal.signal(held, handler)
        for pending in dict.fromkeys(received):
            os.kill(os.getpid(), pending)


def _signal_group(pgid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pgid, signum)


def _wait_for_empty_group(pgid: int, timeout_s: float) -> bool:
    """Whether the group's last process ended within the time."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            os.killpg(pgid, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
