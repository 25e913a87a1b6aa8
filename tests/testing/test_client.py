# SPDX-License-Identifier: Apache-2.0
"""Requests over HTTP, to a stand-in for vLLM's server."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from vllm_rsparse.testing import client
from vllm_rsparse.testing.client import ModelClient
from vllm_rsparse.testing.server import ServerError


class Api(BaseHTTPRequestHandler):
    """Replies with `server.reply`, or streams `server.tokens` tokens, as vLLM does."""

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.paths.append(self.path)
        self.server.requests.append(json.loads(self.rfile.read(length)))
        self.send_response(200)
        self.end_headers()
        if not self.server.requests[-1].get("stream"):
            self.wfile.write(json.dumps(self.server.reply).encode())
            return
        for _ in range(self.server.tokens):
            self._send({"choices": [{"text": "x"}], "usage": None})
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
    server.paths, server.requests, server.reply = [], [], {}
    server.tokens = 0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def client_of(api: HTTPServer) -> ModelClient:
    return ModelClient(f"http://127.0.0.1:{api.server_port}", "m")


def test_decode_time_leaves_out_the_first_token(
    api: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.tokens = 5
    # Read once for each token.
    clock = iter([0.5, 1.0, 1.5, 2.0, 3.0])
    monkeypatch.setattr(client.time, "perf_counter", lambda: next(clock))
    assert client_of(api).decode_ms("p", 5) == 1000 * 2.5 / 4
    (request,) = api.requests
    assert request["max_tokens"] == 5
    assert request["ignore_eos"] is True
    assert request["temperature"] == 0


def test_decode_time_of_a_short_reply_is_an_error(api: HTTPServer) -> None:
    api.tokens = 3
    with pytest.raises(ServerError, match="requested 5 streamed tokens, got 3"):
        client_of(api).decode_ms("p", 5)


def test_completion_and_answer(api: HTTPServer) -> None:
    api.reply = {"choices": [{"text": "t", "message": {"content": "c"}}]}
    assert client_of(api).complete("p", 7) == "t"
    assert client_of(api).answer("q", 8) == "c"
    assert api.paths == ["/v1/completions", "/v1/chat/completions"]
    completion, chat = api.requests
    assert (completion["prompt"], completion["max_tokens"]) == ("p", 7)
    assert chat["messages"] == [{"role": "user", "content": "q"}]
    assert {one["temperature"] for one in api.requests} == {0}
