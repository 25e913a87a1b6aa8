# SPDX-License-Identifier: Apache-2.0
"""What a model is asked: prompts from JSONL, and their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.texts.documents import read_text
from vllm_rsparse.texts.jsonl import read_chat
from vllm_rsparse.validation import parse_json, shown


@dataclass(frozen=True)
class Prompt:
    """What a user asks.

    Attributes:
        domain: figures are reported for each.
        ids: tokens, the chat template applied.
    """

    domain: str
    ids: list[int]


def read_prompts(file: Path, tokenizer: Any, option: str = "--chat") -> list[Prompt]:
    """Read JSON lines.

    A line is an object with ``messages`` (a list of ``role`` and ``content``, the last
    one the user's) or ``prompt`` (the text of a single user's message), and optionally
    ``domain``. Without a chat template the messages' texts are the prompt.

    Args:
        file: what to read.
        tokenizer: of the model that is asked.
        option: that named the file, for messages.

    Raises:
        CheckpointError: the file, or a line of it, is not that.
    """
    name = f"{option} {file}"
    prompts = []
    for number, line in enumerate(read_text(file, name).split("\n"), 1):
        if line.strip():
            where = f"{name}, line {number}"
            value = parse_json(line, where, CheckpointError)
            ids = prompt_ids(tokenizer, _messages(value, where), where)
            if not ids:
                raise CheckpointError(f"{where}: is an empty prompt; leave it out")
            prompts.append(Prompt(str(value.get("domain", "chat")), ids))
    return prompts


def prompt_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, advice: str = ""
) -> list[int]:
    """Tokens of messages that the model answers; their texts without a chat template.

    Args:
        tokenizer: of the model.
        messages: of a chat, the last one the user's.
        where: the messages or the model, for an error.
        advice: what to do about an error.

    Raises:
        CheckpointError: the chat template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        text = "\n".join(message["content"] or "" for message in messages)
        return list(tokenizer(text)["input_ids"])
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    # Templates are programs: what they do not expect ends in any exception.
    except Exception as error:
        raise CheckpointError(
            f"{where}: the model's chat template refuses the messages ({error}){advice}"
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _messages(value: Any, where: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, dict) or not value.keys() & {"prompt", "messages"}:
        raise CheckpointError(
            f'{where}: expected an object with "prompt" (text) or "messages" (a chat'
            f" that ends with the user's message), got {shown(value)}"
        )
    if value.keys() >= {"prompt", "messages"}:
        raise CheckpointError(
            f'{where}: has "prompt" and "messages"; leave one of them out'
        )
    if "prompt" in value:
        text = value["prompt"]
        if not isinstance(text, str):
            raise CheckpointError(
                f"{where}: prompt must be a string, got {shown(text)}"
            )
        return [{"role": "user", "content": text}]
    messages, _ = read_chat(value, where)
    if messages[-1]["role"] != "user":
        raise CheckpointError(
            f"{where}: the last message must be the user's, got the role"
            f" {shown(messages[-1]['role'])}; leave out what follows the user's message"
        )
    return messages
