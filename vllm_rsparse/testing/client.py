# SPDX-License-Identifier: Apache-2.0
"""Requests to a served model over HTTP, with nothing beyond the standard library."""

import json
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_rsparse.testing.server import ServerError

_TIMEOUT_S = 120

# A proxy from the environment must not be used for the loopback interface.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class ModelClient:
    """A model of a server; every request is greedy.

    Attributes:
        base_url: of the server, without ``/v1``.
        model: the name that it serves.
    """

    base_url: str
    model: str

    def complete(self, prompt: str, tokens: int) -> str:
        """The text that follows a prompt."""
        reply = self._post("completions", prompt=prompt, max_tokens=tokens)
        return json.load(reply)["choices"][0]["text"]

    def answer(self, question: str, tokens: int) -> str:
        """The answer to a question, through the model's chat template."""
        messages = [{"role": "user", "content": question}]
        reply = self._post("chat/completions", messages=messages, max_tokens=tokens)
        return json.load(reply)["choices"][0]["message"]["content"]

    def decode_ms(self, prompt: str, tokens: int) -> float:
        """Milliseconds per token from the first to the last of one streamed reply.

        Raises:
            ServerError: the reply does not have the requested number of tokens.
        """
        reply = self._post(
            "completions",
            prompt=prompt,
            max_tokens=tokens,
            ignore_eos=True,
            stream=True,
            stream_options={"include_usage": True},
        )
        received, arrivals = 0, []
        for event in events(reply):
            if event["choices"]:
                arrivals.append(time.perf_counter())
            if event.get("usage"):
                received = event["usage"]["completion_tokens"]
        if received != tokens or len(arrivals) < 2:
            raise ServerError(f"requested {tokens} streamed tokens, got {received}")
        return 1000 * (arrivals[-1] - arrivals[0]) / (received - 1)

    def _post(self, endpoint: str, **options: object) -> Any:
        """The open reply."""
        body = {"model": self.model, "temperature": 0, **options}
        request = urllib.request.Request(
            f"{self.base_url}/v1/{endpoint}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return _opener.open(request, timeout=_TIMEOUT_S)


def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    for line in lines:
        field, _, value = line.partition(b":")
        if field == b"data" and value.strip() != b"[DONE]":
            yield json.loads(value)
