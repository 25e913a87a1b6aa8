# SPDX-License-Identifier: Apache-2.0
"""Clients that stream from a server while something is broken."""

import threading
from dataclasses import dataclass

import httpx
import openai

STREAM_TOKENS = 200


@dataclass
class Client:
    """One streaming request and what became of it."""

    prompt: str
    text: str = ""
    chunks: int = 0
    end: str = ""
    thread: threading.Thread | None = None

    def start(self, base_url: str, model: str) -> None:
        arguments = (base_url, model)
        self.thread = threading.Thread(target=self._stream, args=arguments, daemon=True)
        self.thread.start()

    def _stream(self, base_url: str, model: str) -> None:
        client = openai.OpenAI(
            base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60
        )
        try:
            stream = client.completions.create(
                model=model,
                prompt=self.prompt,
                max_tokens=STREAM_TOKENS,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                self.chunks += 1
                self.text += chunk.choices[0].text
                if chunk.choices[0].finish_reason:
                    self.end = f"finished ({chunk.choices[0].finish_reason})"
            self.end = self.end or "stream closed without a finish reason"
        except openai.APIStatusError as error:
            self.end = f"HTTP {error.status_code}"
        except (openai.APIError, httpx.HTTPError) as error:
            cause = error.__cause__ or error
            self.end = f"{type(cause).__name__}: {cause}"[:120]
