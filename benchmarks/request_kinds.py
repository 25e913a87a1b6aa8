# SPDX-License-Identifier: Apache-2.0
"""One request of every kind that ``load_serve.py`` sends besides plain completions."""

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import openai

from vllm_rsparse.testing.server import ServerProcess

MAX_MODEL_LEN = 512
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer"},
    },
    "required": ["name", "age"],
}
PROMPTS = ["def read_lines(path):\n", "import os\n\n\nclass Walker:\n", "for key in "]


class Kinds:
    """One request of every kind that is not a plain completion, and its outcome.

    An outcome is "ok", an HTTP status, or what was wrong with an answer.
    """

    def __init__(self, server: ServerProcess) -> None:
        self.url = f"{server.base_url}/v1"
        self.client = openai.OpenAI(
            base_url=self.url, api_key="none", max_retries=0, timeout=300
        )
        self.all: dict[str, Callable[[], str]] = {
            "streamed": self.streamed,
            "cancelled": self.cancelled,
            "logprobs": self.logprobs,
            "n = 3": self.several,
            "stop string": self.stop_string,
            "structured output": self.structured,
            "unknown model": lambda: self.invalid(model="other"),
            "negative max_tokens": lambda: self.invalid(max_tokens=-1),
            "prompt too long": lambda: self.invalid(prompt=[5] * (MAX_MODEL_LEN + 1)),
            "temperature below 0": lambda: self.invalid(temperature=-1),
            "LoRA that is not loaded": lambda: self.invalid(model="some-lora"),
            "not JSON": self.not_json,
        }

    def complete(self, **options: Any) -> Any:
        arguments = {"model": "m", "prompt": random.choice(PROMPTS), "max_tokens": 32}
        return self.client.completions.create(**{**arguments, **options})

    def streamed(self) -> str:
        chunks = list(self.complete(stream=True, extra_body={"ignore_eos": True}))
        return "ok" if chunks[-1].choices[0].finish_reason == "length" else "cut off"

    def cancelled(self) -> str:
        stream = self.complete(stream=True, max_tokens=300)
        for _ in itertools.islice(stream, 3):
            pass
        stream.close()
        return "ok"

    def logprobs(self) -> str:
        # Keyed by token: two tokens that are fragments of characters decode to the same
        # text, and would leave four entries of five.
        body = {"return_tokens_as_token_ids": True}
        choice = self.complete(logprobs=5, extra_body=body).choices[0]
        top = choice.logprobs.top_logprobs
        bad = [t for t in top if len(t) < 5 or max(t.values()) > 0]
        return "ok" if top and not bad else f"bad log probabilities: {bad[:1]}"

    def several(self) -> str:
        choices = self.complete(n=3, temperature=1).choices
        return "ok" if [c.index for c in choices] == [0, 1, 2] else "bad choices"

    def stop_string(self) -> str:
        choice = self.complete(stop=["\n"], max_tokens=64).choices[0]
        return "ok" if "\n" not in choice.text else "stop string in the text"

    def structured(self) -> str:
        body = {"structured_outputs": {"json": SCHEMA}}
        choice = self.complete(max_tokens=200, extra_body=body).choices[0]
        if choice.finish_reason == "length":
            return "ok"  # valid so far; a small model may fill it with spaces
        try:
            return (
                "ok" if set(json.loads(choice.text)) == {"name", "age"} else "bad JSON"
            )
        except ValueError as error:
            return f"bad JSON: {error}"

    def invalid(self, **options: Any) -> str:
        try:
            self.complete(**options)
        except openai.APIStatusError as error:
            return str(error.status_code)
        return "accepted"

    def not_json(self) -> str:
        return str(httpx.post(f"{self.url}/completions", content=b"{").status_code)

    def run(self, name: str) -> str:
        try:
            return self.all[name]()
        except openai.APIStatusError as error:
            return str(error.status_code)
        except (openai.APIError, httpx.HTTPError) as error:
            return type(error).__name__
